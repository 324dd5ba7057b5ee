"""Serving in less memory: eviction of keys and values from the cache of any decoder, with generate()."""
