"""The Llama family (Llama, Mistral, Qwen2, Qwen3): one stateless Flax model that receives its attention as a callable.

Letters: B sequences, T tokens, D model width, F feed-forward width, N query heads, K KV heads, H head size, V words.
"""

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from lserve_jax.config.model import ModelConfig
from lserve_jax.models.layers import Embedding, Linear, RMSNorm, each_layer
from lserve_jax.models.rope import apply_rope, rope_tables

type Params = dict[str, Any]
type RopeTables = tuple[jax.Array, jax.Array]


class Attend(Protocol):
    """The model's view of attention: queries, keys and values in; outputs and the layer's next state out."""

    def __call__(self, kind: Any, q: jax.Array, k: jax.Array, v: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Returns outputs [B, T, N, H] and the new state, for q [B, T, N, H] and k, v [B, T, K, H] after RoPE.

        ``kind`` is the caller's description of the layer: a `LayerKind` in every compiled step.
        """
        ...


class Attention(nn.Module):
    """Projections, q/k norms and rotary positions around ``attend``."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, rope: RopeTables, kind: Hashable, state: Any, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """Returns outputs [B, T, D] and the layer's new state, for ``x`` [B, T, D]."""
        c = self.config
        # Per KV head: its query heads, its key and its value. One product instead of three.
        features = (c.num_kv_heads, c.num_heads // c.num_kv_heads + 2, c.head_dim)
        qkv = Linear(features, c.qkv_bias, self.dtype, join_axis=1, name="qkv_proj")(x)
        q = qkv[..., :-2, :].reshape(*x.shape[:-1], c.num_heads, c.head_dim)
        k, v = qkv[..., -2, :], qkv[..., -1, :]
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, self.dtype, name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, self.dtype, name="k_norm")(k)
        out, state = attend(kind, apply_rope(q, rope), apply_rope(k, rope), v, state)
        out = out.reshape(*x.shape[:-1], -1)
        return Linear((c.hidden_size,), c.o_bias, self.dtype, name="o_proj")(out), state


class MLP(nn.Module):
    """``down(silu(gate(x)) · up(x))``."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [..., D] for ``x`` [..., D]."""
        c = self.config
        # On CPUs, gate and up are not rounded before their product: this is more exact, and faster.
        wide = jnp.dtype("float32")
        y = Linear((2, c.intermediate_size), c.mlp_bias, self.dtype, out_dtype=wide, name="gate_up_proj")(x)
        hidden = (nn.silu(y[..., 0, :]) * y[..., 1, :]).astype(self.dtype)
        return Linear((c.hidden_size,), c.mlp_bias, self.dtype, name="down_proj")(hidden)


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, rope: RopeTables, kind: Hashable, state: Any, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """Returns hidden states [B, T, D] and the layer's new state, for ``x`` [B, T, D]."""
        epsilon = self.config.rms_norm_eps
        normed = RMSNorm(epsilon, self.dtype, name="input_norm")(x)
        out, state = Attention(self.config, self.dtype, name="attention")(normed, rope, kind, state, attend)
        x = x + out
        normed = RMSNorm(epsilon, self.dtype, name="post_attention_norm")(x)
        return x + MLP(self.config, self.dtype, name="mlp")(normed), state


class Llama(nn.Module):
    """A stateless decoder-only transformer: caches and attention kernels are behind ``attend``."""

    config: ModelConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        """Declares the layers under the names of the parameter tree."""
        c = self.config
        self.embed = Embedding(c.vocab_size, c.hidden_size, self.dtype)
        self.layers = [Layer(c, self.dtype) for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c.rms_norm_eps, self.dtype)
        if not c.tie_embeddings:
            wide = {"out_dtype": jnp.dtype("float32"), "is_stored_wide": True}
            self.lm_head = Linear((c.vocab_size,), False, self.dtype, **wide)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        state: tuple[Any, ...],
        attend: Attend,
        kinds: Sequence[Hashable] | None = None,
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Returns hidden states [B, T, D] after the final norm, and the new state, one entry per layer.

        Args:
          tokens: [B, T] int32 token ids.
          positions: [B, T] int32 absolute positions.
          state: the state of ``attend``, one entry per layer.
          attend: the attention, see `Attend`.
          kinds: what ``attend`` gets as ``kind`` for each layer; None takes the layer's number.
        """
        x, rope = self.begin(tokens, positions)
        kinds = range(len(self.layers)) if kinds is None else kinds
        x, new_state = each_layer(
            x, state, lambda index, x, old: self.layers[index](x, rope, kinds[index], old, attend)
        )
        return self.end(x), new_state

    def begin(self, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, RopeTables]:
        """Returns the inputs of the layers: embeddings [B, T, D] and rotary tables."""
        # Without the barrier, XLA on CPUs recomputes the sines for every head of every layer (6% of a prefill).
        rope = jax.lax.optimization_barrier(rope_tables(self.config.rope, self.config.head_dim, positions))
        return self.embed(tokens), rope

    def end(self, x: jax.Array) -> jax.Array:
        """Returns hidden states [..., D] after the final norm."""
        return self.final_norm(x)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Returns logits [..., V] float32 of hidden states [..., D]; rounded to bfloat16, many of them would tie."""
        if self.config.tie_embeddings:
            return self.embed.logits(hidden)
        return self.lm_head(hidden)
