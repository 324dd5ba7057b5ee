"""Mixed hidden states of two examples: pairs, the objective, the confidence that parts them."""
