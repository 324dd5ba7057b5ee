"""From a recipe to a result: reading, running step by step, resuming, publishing."""
