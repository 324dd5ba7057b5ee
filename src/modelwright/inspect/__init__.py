"""What is inside a model: whether its experts differ, and which neurons and experts carry which function."""
