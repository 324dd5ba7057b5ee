"""The ways to evict, one seam each."""
