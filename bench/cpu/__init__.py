"""Our settings and the peers on a CPU, side by side: one model, the same token ids, a process per system."""
