"""What inspect.experts is made of: reading the experts of any mixture, comparing weights, comparing outputs, advice."""
