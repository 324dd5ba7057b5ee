"""Eviction under generate(): the cache layer, the attention function, the contract of a way to evict."""
