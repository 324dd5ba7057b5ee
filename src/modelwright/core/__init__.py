"""The kernel: knows models and training, knows no method."""
