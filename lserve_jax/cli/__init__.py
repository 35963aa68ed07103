"""What the command lines share: flags, errors, progress, reports."""
