"""Judging and selecting answers: one judge layer, strategies to compare two outputs, ways to pick one of many answers."""
