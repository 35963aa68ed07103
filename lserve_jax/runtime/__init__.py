"""What is compiled: pure functions of pytrees over the paged KV cache."""
