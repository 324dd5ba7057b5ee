"""Model to model: each method maps one or several checkpoints to a new one."""
