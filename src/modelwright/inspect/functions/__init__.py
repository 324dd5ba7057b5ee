"""What inspect.modularity is made of: predictivity of neurons, functional experts, perturbation, stabilisation."""
