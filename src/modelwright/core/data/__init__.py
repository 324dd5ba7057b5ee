"""From sources to token rows."""
