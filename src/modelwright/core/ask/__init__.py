"""Asking models: prompts in, answers out, from a checkpoint, an endpoint or a record; kept on disk, counted, never paid for twice."""
