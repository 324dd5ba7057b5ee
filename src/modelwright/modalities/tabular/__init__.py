"""Tables as sequences of tokens: columns and their grammar, decoding under it, and what synthetic rows are worth."""
