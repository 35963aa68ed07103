"""Other libraries at the work of our ops, timed in the same run."""
