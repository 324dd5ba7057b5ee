"""Checkpoints: parameter roles, reading, writing, certificates, lineage, hooks."""
