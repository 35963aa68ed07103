"""Scores of KV heads without training: what each would lose by streaming, at the answers of synthetic prompts."""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from lserve_jax.calibration.probe import probe, slopes
from lserve_jax.calibration.prompts import Prompt
from lserve_jax.calibration.reader import Reader
from lserve_jax.config.heads import QUOTAS
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.models.llama import Params

type Scores = dict[str, NDArray[np.float64]]
"""Score by name → [L, K]; the higher, the more a head is needed."""

type OnProgress = Callable[[str, int, int], None]
"""Stage, done, total."""

MEASURES = {
    "mass": "share of the head's attention outside sink and window, mean over its query heads",
    "mass_max": "the same, of the query head with the largest share",
    "needle": "share of its attention on the passage that the answer comes from, mean over its query heads",
    "needle_max": "the same, of the query head with the largest share",
    "error": "relative error of its output when streaming: |dense - streaming| / |dense|",
    "output_error": "that error after the output projection, relative to the layer's whole attention output",
    "residual_error": "that error after the output projection, relative to the hidden states that it is added to",
}
SLOPES = {
    "loss": "what the answer's negative log-likelihood gains to first order, mean over gates of 1 and 1/2",
    "divergence": "what the divergence from the dense model's predictions gains to first order, at gates of 1/2",
}
SCORES = MEASURES | SLOPES
"""What each score is, at the tokens that predict the answer. Slopes need gradients, which take several times longer."""

BEST_PLACE, RANDOM = "best_place", "random"
RANKINGS = SCORES | {
    BEST_PLACE: "its better place of two: by needle for facts, by residual_error for copying",
    RANDOM: "nothing: the seed's own order, to compare others with",
}
"""What heads may be ranked by: one score on all kinds of prompts, the kinds' own rankings merged, or by chance."""

DEFAULT_RANKING = BEST_PLACE
_RANKS_KIND = {"copying": "residual_error"}
"""Which score ranks the heads for a kind of prompt; others are ranked by `_RANKS_OTHERS`. What finds a fact is few
heads with much attention on it; what copies leans on many, of which attention alone does not tell the weight."""
_RANKS_OTHERS = "needle"


def score_heads(
    params: Params,
    config: InferenceConfig,
    prompts: Sequence[Prompt],
    *,
    names: Sequence[str] = tuple(SCORES),
    chunk: int = 512,
    on_progress: OnProgress | None = None,
) -> dict[str, Scores]:
    """Returns scores by kind of prompt and name, each [L, K] the mean over the prompts of that kind.

    Prompts are read densely, chunk by chunk; the dense and the streaming output of a head are compared on the same
    queries, keys and values. Memory: the pages of one prompt, one KV head's scores at an answer's tokens, and for
    slopes one layer's activations.

    Args:
      params: the model's parameters in the checkpoint's order of heads.
      config: a dense model; its ``attention`` has the ``sink`` and ``local`` that heads would stream with.
      prompts: of any lengths.
      names: rows of `SCORES`; those of `MEASURES` cost no more together than one alone.
      chunk: prompt tokens a call.
      on_progress: called with ("scores", prompts done, prompts).

    Raises:
      ValueError: for an unknown name, no prompt, or a model that is not dense.
    """
    for name in names:
        _require_known(name)
    reader = Reader(params, config, prompts, chunk=chunk)
    found: dict[str, list[Scores]] = {}
    for number, prompt in enumerate(prompts, start=1):
        found.setdefault(prompt.kind, []).append(_score(reader, prompt, names))
        if on_progress is not None:
            on_progress("scores", number, len(prompts))
    return {
        kind: {name: np.mean([row[name] for row in rows], axis=0) for name in names} for kind, rows in found.items()
    }


def _score(reader: Reader, prompt: Prompt, names: Sequence[str]) -> Scores:
    params, config, chunk = reader.params, reader.config, reader.read(prompt)
    found, hidden = probe(params, reader.cache, chunk, config=config)
    if any(name in SLOPES for name in names):
        ones = jnp.ones((config.model.num_layers, config.model.num_kv_heads))
        full, half = (slopes(params, reader.cache, chunk, gate * ones, hidden, config=config) for gate in (1.0, 0.5))
        found |= {"loss": (full.nll + half.nll) / 2, "divergence": half.divergence}
    return {name: np.asarray(found[name], np.float64) for name in names}


def combine(scores: Mapping[str, Scores], name: str) -> NDArray[np.float64]:
    """Returns one score [L, K] of all kinds of prompts.

    A head that one kind of prompt needs is needed, however little the others do: it counts by its largest share of a
    kind's total, and for `BEST_PLACE` by its best place in a kind's ranking. Slopes below 0 count as 0.

    Args:
      scores: from `score_heads`.
      name: a row of `SCORES`, or `BEST_PLACE`.
    """
    if name == BEST_PLACE:
        return _best_places(scores)
    _require_known(name)
    kinds = [np.maximum(found[name], 0.0) for found in scores.values()]
    # Of a kind that says nothing, as plain text of needles, the total is 0.
    return np.stack([kind / max(kind.sum(), np.finfo(np.float64).tiny) for kind in kinds]).max(axis=0)


def _best_places(scores: Mapping[str, Scores]) -> NDArray[np.float64]:
    """Returns minus the best place [L, K] of each head in a kind's ranking; of equal places that for copying is worse.

    Kinds whose answers come from no passage, as plain text, rank nothing: their loss is spread over all heads.
    """
    rankings = [
        scores[kind][_RANKS_KIND.get(kind, _RANKS_OTHERS)]
        for kind in sorted(scores, key=lambda kind: kind in _RANKS_KIND)
        if np.any(scores[kind]["needle"] > 0)
    ]
    if not rankings:
        raise ValueError(f"{BEST_PLACE} needs prompts whose answers come from a passage; rank by another score")
    places = [_places(ranking.ravel()) + kind / len(rankings) for kind, ranking in enumerate(rankings)]
    return -np.min(np.asarray(places, np.float64), axis=0).reshape(rankings[0].shape)


def _places(scores: NDArray[np.floating]) -> NDArray[np.intp]:
    """Returns how many of the last axis rank higher than each; of equal scores the first ranks higher."""
    return np.argsort(np.argsort(-scores, axis=-1, kind="stable"), axis=-1)


def _require_known(name: str) -> None:
    if name not in SCORES:
        raise ValueError(f"score {name!r} must be one of {', '.join(SCORES)}")


def to_gates(scores: NDArray[np.floating], quota: str = "model") -> NDArray[np.float64]:
    """Returns gates [L, K] in (0, 1] that rank heads as the scores [L, K] do.

    A gate is the share of heads that rank no higher: a head keeps the whole context at every static sparsity below its
    gate. Of equal scores the first by (layer, head) ranks higher, as in `lserve_jax.config.heads.classify`.

    Args:
      scores: finite.
      quota: "model" ranks all heads together; "layer" each layer's, so that layers have equally many streaming heads
        (where the sparsity does not divide them, the first layers have one less).
    """
    if quota not in QUOTAS:
        raise ValueError(f"quota must be one of {', '.join(QUOTAS)}, got {quota!r}")
    groups = scores.reshape(1, -1) if quota == "model" else scores
    return ((groups.shape[1] - _places(groups)) / groups.shape[1]).reshape(scores.shape)
