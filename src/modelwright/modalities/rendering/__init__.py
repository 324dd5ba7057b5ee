"""Text as pixels: rendering and rows."""
