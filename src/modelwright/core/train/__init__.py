"""The training loop, the contract of a training method, processes and shards."""
