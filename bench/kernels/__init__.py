"""The ops alone: checked, then timed in chains of calls."""
