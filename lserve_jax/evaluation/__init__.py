"""Tasks, metrics and runs that compare a sparsity setting with dense attention."""
