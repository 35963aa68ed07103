"""Measures what answers lose as more heads stream, on prompts that were not used to find the gates."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from lserve_jax.calibration.attention import average, scores, weights
from lserve_jax.calibration.pages import Chunk, LayerHeads, forward, visible_keys
from lserve_jax.calibration.progress import Done
from lserve_jax.calibration.prompts import Prompt
from lserve_jax.calibration.reader import Reader
from lserve_jax.calibration.scores import OnProgress
from lserve_jax.config.heads import classify
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.models import layerwise
from lserve_jax.models.llama import Params
from lserve_jax.runtime.cache import KVCache

SHARES = (0.25, 0.5, 0.75, 0.9)


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def masked_step(
    params: Params, cache: KVCache, chunk: Chunk, is_retrieval: jax.Array, *, config: InferenceConfig
) -> tuple[jax.Array, KVCache]:
    """Returns the summed negative log-likelihood of a chunk's targets, and the cache with the chunk.

    The pattern of heads is data, so that one program serves all patterns.

    Args:
      params: the model's parameters in the checkpoint's order of heads.
      cache: the cache of a dense model with the tokens before the chunk; donated.
      chunk: the tokens.
      is_retrieval: [L, K] bool, which heads keep the whole context; the others stream.
      config: a dense model; its ``attention`` has the ``sink`` and ``local`` of streaming.
    """
    is_dense, is_streaming = visible_keys(chunk, config)

    def attend(layer: int, x: jax.Array, heads: LayerHeads, gate: jax.Array) -> tuple[jax.Array, None]:
        def head(index: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return average(weights(scores(q, k), jnp.where(gate[index], is_dense, is_streaming)), v)

        return heads.map(chunk, head), None

    hidden, _, cache = forward(params, cache, chunk, is_retrieval, attend, config)

    def nll() -> jax.Array:
        return jnp.sum(chunk.nll(layerwise.log_probabilities(params, config, hidden)[0]))

    return jax.lax.cond(jnp.any(chunk.targets >= 0), nll, lambda: jnp.float32(0)), cache


@dataclass(frozen=True, kw_only=True)
class ShareLoss:
    """Mean negative log-likelihood of answers in nats per token, by kind of prompt, if a share of the heads streams."""

    share: float
    streaming: int
    nll: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean over kinds."""
        return sum(self.nll.values()) / len(self.nll)


def expected_losses(
    params: Params,
    config: InferenceConfig,
    prompts: Sequence[Prompt],
    gates: NDArray[np.floating],
    *,
    chunk: int,
    shares: Sequence[float] = SHARES,
    done: Done | None = None,
    on_progress: OnProgress | None = None,
) -> list[ShareLoss]:
    """Returns the losses of dense attention and of each share of streaming heads, which have the lowest gates [L, K].

    Heads stream from the first token of a prompt on. ``done`` has losses by prompt and heads; other arguments are those
    of `score_heads`.
    """
    reader, rows = Reader(params, config, prompts, chunk=chunk), []
    done = {} if done is None else done
    for share in (0.0, *shares):
        is_retrieval = retrieval_heads(gates, share)
        losses: dict[str, list[float]] = {}
        for number, prompt in enumerate(prompts, start=1):
            key = f"loss {prompt.digest} {np.packbits(is_retrieval).tobytes().hex()}"
            if key not in done:
                loss = float(reader.read_through(prompt, partial(masked_step, is_retrieval=jnp.asarray(is_retrieval))))
                done[key] = np.asarray(loss / prompt.num_answer)
            losses.setdefault(prompt.kind, []).append(float(done[key]))
            if on_progress is not None:
                on_progress("expected loss", len(rows) * len(prompts) + number, num_readings(prompts, shares))
        nll = {kind: float(np.mean(values)) for kind, values in losses.items()}
        rows.append(ShareLoss(share=share, streaming=int(np.sum(~is_retrieval)), nll=nll))
    return rows


def num_readings(prompts: Sequence[Prompt], shares: Sequence[float] = SHARES) -> int:
    """Returns how many prompts `expected_losses` reads."""
    return (1 + len(shares)) * len(prompts)


def retrieval_heads(gates: NDArray[np.floating], share: float) -> NDArray[np.bool_]:
    """Returns which heads [L, K] keep the whole context at a static sparsity, as the loader chooses them."""
    classes = classify(gates, share)
    heads = np.arange(classes.num_kv_heads)
    kept = zip(classes.order, classes.num_retrieval, strict=True)
    return np.stack([np.isin(heads, order[:count]) for order, count in kept])


def describe(rows: Sequence[ShareLoss]) -> str:
    """Returns a table for people, whose first row is dense attention."""
    dense, kinds = rows[0], list(rows[0].nll)
    lines = [["streaming", "heads", *kinds, "mean", "change"]]
    for row in rows:
        values = [*(row.nll[kind] for kind in kinds), row.mean]
        change = "" if row is dense else f"{row.mean - dense.mean:+.4f}"
        name = "dense" if row is dense else f"{row.share:.0%}"
        lines.append([name, str(row.streaming), *(f"{value:.4f}" for value in values), change])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(["negative log-likelihood of answers to other prompts of the same kinds, nats per token:", *table])
