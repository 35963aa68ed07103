"""The Llama family (Llama, Mistral, Qwen2, Qwen3): one stateless Flax model that receives its attention as a callable.

Letters: B sequences, T tokens, D model width, F feed-forward width, N query heads, K KV heads, H head size, V words.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from lserve_jax.config.model import ModelConfig
from lserve_jax.models.layers import Linear, RMSNorm, project
from lserve_jax.models.rope import apply_rope, rope_tables

type Params = dict[str, Any]
type RopeTables = tuple[jax.Array, jax.Array]


class Attend(Protocol):
    """What the model knows of attention: queries, keys and values in; outputs and the layer's next state out."""

    def __call__(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Returns outputs [B, T, N, H] and the new state, for q [B, T, N, H] and k, v [B, T, K, H] after RoPE.

        ``layer`` is the layer's index; `run_model` passes 0 for all, and tells them apart by state.
        """
        ...


class Attention(nn.Module):
    """Projections, q/k norms and rotary positions around ``attend``."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, rope: RopeTables, layer: int, state: Any, attend: Attend) -> tuple[jax.Array, Any]:
        """Returns outputs [B, T, D] and the layer's new state, for ``x`` [B, T, D]."""
        c = self.config
        q = Linear((c.num_heads, c.head_dim), c.qkv_bias, self.dtype, name="q_proj")(x)
        k = Linear((c.num_kv_heads, c.head_dim), c.qkv_bias, self.dtype, name="k_proj")(x)
        v = Linear((c.num_kv_heads, c.head_dim), c.qkv_bias, self.dtype, name="v_proj")(x)
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, self.dtype, name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, self.dtype, name="k_norm")(k)
        out, state = attend(layer, apply_rope(q, rope), apply_rope(k, rope), v, state)
        return Linear((c.hidden_size,), c.o_bias, self.dtype, in_axes=2, name="o_proj")(out), state


class MLP(nn.Module):
    """``down(silu(gate(x)) · up(x))``."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [..., D] for ``x`` [..., D]."""
        c = self.config
        # On CPUs not rounded before they are multiplied: more exact, and faster.
        gate, up = (
            Linear((c.intermediate_size,), c.mlp_bias, self.dtype, out_dtype=jnp.dtype("float32"), name=name)(x)
            for name in ("gate_proj", "up_proj")
        )
        hidden = (nn.silu(gate) * up).astype(self.dtype)
        return Linear((c.hidden_size,), c.mlp_bias, self.dtype, name="down_proj")(hidden)


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, rope: RopeTables, layer: int, state: Any, attend: Attend) -> tuple[jax.Array, Any]:
        """Returns hidden states [B, T, D] and the layer's new state, for ``x`` [B, T, D]."""
        epsilon = self.config.rms_norm_eps
        normed = RMSNorm(epsilon, self.dtype, name="input_norm")(x)
        out, state = Attention(self.config, self.dtype, name="attention")(normed, rope, layer, state, attend)
        x = x + out
        normed = RMSNorm(epsilon, self.dtype, name="post_attention_norm")(x)
        return x + MLP(self.config, self.dtype, name="mlp")(normed), state


class Llama(nn.Module):
    """A decoder-only transformer without state of its own: caches and attention kernels live in ``attend``."""

    config: ModelConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        """Declares the layers under the names of the parameter tree."""
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, param_dtype=self.dtype)
        self.layers = [Layer(c, self.dtype) for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c.rms_norm_eps, self.dtype)
        if not c.tie_embeddings:
            wide = {"out_dtype": jnp.dtype("float32"), "is_stored_wide": True}
            self.lm_head = Linear((c.vocab_size,), False, self.dtype, **wide)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, state: tuple[Any, ...], attend: Attend
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Returns hidden states [B, T, D] after the final norm, and the new state, one entry a layer.

        Args:
          tokens: [B, T] int32 token ids.
          positions: [B, T] int32 absolute positions.
          state: what ``attend`` keeps for each layer.
          attend: the attention, see `Attend`.
        """
        x, rope = self.begin(tokens, positions)
        new_state = []
        for index, layer in enumerate(self.layers):
            x, layer_state = layer(x, rope, index, state[index], attend)
            new_state.append(layer_state)
        return self.end(x), tuple(new_state)

    def begin(self, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, RopeTables]:
        """Returns what the layers take: embeddings [B, T, D] and rotary tables."""
        # Behind a barrier: else XLA's CPU computes sines anew for every head of every layer (6% of a prefill).
        rope = jax.lax.optimization_barrier(rope_tables(self.config.rope, self.config.head_dim, positions))
        return self.embed(tokens), rope

    def end(self, x: jax.Array) -> jax.Array:
        """Returns the hidden states [..., D] that logits come from."""
        return self.final_norm(x)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Returns logits [..., V] float32 of hidden states [..., D]; never rounded to bfloat16, in which many tie."""
        if self.config.tie_embeddings:
            return project(hidden, self.embed.embedding, jnp.dtype("float32"), is_stored_wide=True)
        return self.lm_head(hidden)


def abstract_params(config: ModelConfig, dtype: jnp.dtype) -> dict[str, Any]:
    """Returns the parameter tree as `jax.ShapeDtypeStruct`, the template of every checkpoint. Allocates nothing."""
    model = Llama(config, dtype)

    def initialise() -> Any:
        def everything(model: Llama, tokens: jax.Array) -> jax.Array:
            hidden, _ = model(tokens, tokens, (None,) * config.num_layers, lambda layer, q, k, v, state: (q, state))
            return model.unembed(hidden)

        return model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), method=everything)

    return jax.eval_shape(initialise)["params"]
