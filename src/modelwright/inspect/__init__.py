"""What is inside: experts, modules, depth, laws."""
