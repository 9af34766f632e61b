"""What a training step is made of: optimizers, non-finite steps, hypergradients, CUDA graphs."""
