"""Entities of a knowledge base in a text: their vectors, their mentions, and how mapped vectors take the place of embeddings."""
