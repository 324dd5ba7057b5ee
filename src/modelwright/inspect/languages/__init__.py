"""How a model and a corpus treat languages: balance, tokens, shared space, bias, and what taking it away costs."""
