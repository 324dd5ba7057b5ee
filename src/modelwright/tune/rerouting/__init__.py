"""What the ways to tune with another routing share."""
