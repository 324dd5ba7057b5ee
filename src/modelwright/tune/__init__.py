"""Training-time methods: each is a Technique over the one training loop."""
