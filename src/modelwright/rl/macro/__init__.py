"""Macro actions: where they begin, and what a reward, a value and an advantage is over them."""
