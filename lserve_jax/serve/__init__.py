"""`python -m lserve_jax.serve`: an OpenAI-compatible server for many requests at once."""
