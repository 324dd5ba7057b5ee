"""Helpers of reshape.grow and reshape.gqa: which block is copied where, how each axis of a matrix grows, what the config becomes."""
