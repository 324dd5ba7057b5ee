"""Intervals, tests and curves."""
