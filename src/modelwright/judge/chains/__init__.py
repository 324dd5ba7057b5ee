"""Sampled chains of reasoning: answers, votes, scores, budgets."""
