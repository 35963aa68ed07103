"""Everything that a GPU is measured for, in one run of processes."""
