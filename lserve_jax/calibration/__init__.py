"""Which KV heads of a model may stream, by scores or by DuoAttention's training, and which settings suit them."""
