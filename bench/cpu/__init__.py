"""Our settings compared with other libraries on a CPU: one model, the same token ids, one process per system."""
