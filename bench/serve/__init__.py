"""A load generator for OpenAI-compatible servers, and the comparison of ours with others."""
