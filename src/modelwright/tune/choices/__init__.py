"""Questions with a choice of answers: their rows, and how a model scores the answers."""
