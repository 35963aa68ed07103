"""Which KV heads of a model may stream: scores without training, DuoAttention's training, the pattern's folder."""
