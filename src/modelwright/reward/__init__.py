"""Reward scores: calibration after the fact, benchmarks from score files."""
