"""Data: extraction, rules, quality, generation."""
