"""Asking a judge: prompts, endpoints, local models, recordings, verdicts."""
