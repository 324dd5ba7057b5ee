"""The benchmarks of reward models."""
