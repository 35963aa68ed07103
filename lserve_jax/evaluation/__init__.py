"""Tasks, metrics and runs that show how a sparsity setting answers beside dense attention."""
