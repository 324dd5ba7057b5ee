"""What methods that prune share: the smaller model that is saved."""
