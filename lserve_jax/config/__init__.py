"""What models, sparsity and sizes are: plain Python, hashable, without jax."""
