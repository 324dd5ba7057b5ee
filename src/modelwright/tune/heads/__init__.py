"""Which heads become one, and how many each layer keeps."""
