"""Other libraries that do the work of our ops, timed in the same run."""
