"""Sparse differences to frozen weights: the layer that adds them, the optimizers, dropping and growing."""
