"""Scores of KV heads without training: what each head would lose by streaming, at the answers of synthetic prompts."""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from lserve_jax.calibration.probe import probe, slopes
from lserve_jax.calibration.progress import Done
from lserve_jax.calibration.prompts import Prompt
from lserve_jax.calibration.reader import Reader
from lserve_jax.config.errors import InputError
from lserve_jax.config.heads import QUOTAS
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.models.llama import Params

type Scores = dict[str, NDArray[np.float64]]
"""Name of a score → [L, K]; a higher score means that a head is needed more."""

type OnProgress = Callable[[str, int, int], None]
"""Stage, done, total."""

MEASURES = {
    "mass": "share of the head's attention outside sink and window, mean over its query heads",
    "mass_max": "the same share, of the query head with the largest",
    "needle": "share of the head's attention on the passage of the answer, mean over its query heads",
    "needle_max": "the same share, of the query head with the largest",
    "error": "relative error of its output when streaming: |dense - streaming| / |dense|",
    "output_error": "that error after the output projection, relative to the layer's whole attention output",
    "residual_error": "that error after the output projection, relative to the hidden states that it is added to",
}
SLOPES = {
    "loss": "first-order increase of the answer's negative log-likelihood, mean over gates of 1 and 1/2",
    "divergence": "first-order increase of the divergence from the dense model's predictions, at gates of 1/2",
}
SCORES = MEASURES | SLOPES
"""What each score means, at the tokens that predict the answer. Slopes need gradients and take several times longer."""

BEST_PLACE, RANDOM = "best_place", "random"
RANKINGS = SCORES | {
    BEST_PLACE: "its better place of two: by needle for facts, by residual_error for copying",
    RANDOM: "nothing: the seed's own order, to compare others with",
}
"""What heads may be ranked by: one score on all kinds of prompts, the merged rankings of the kinds, or chance."""

DEFAULT_RANKING = BEST_PLACE
_RANKS_KIND = {"copying": "residual_error"}
"""The score that ranks the heads for a kind of prompt; `_RANKS_OTHERS` ranks them for the other kinds. A few heads with
much attention on a fact find it. Copying depends on many heads, whose weight attention alone does not show."""
_RANKS_OTHERS = "needle"


def score_heads(
    params: Params,
    config: InferenceConfig,
    prompts: Sequence[Prompt],
    *,
    names: Sequence[str] = tuple(SCORES),
    chunk: int = 512,
    done: Done | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Scores]:
    """Returns scores by kind of prompt and name, each [L, K] the mean over the prompts of that kind.

    Prompts are read by dense attention, chunk by chunk. The dense and the streaming output of a head are compared on
    the same queries, keys and values. The memory is that of the pages of one prompt, one KV head's scores at an
    answer's tokens and, for slopes, one layer's activations.

    Args:
      params: the model's parameters in the checkpoint's order of heads.
      config: a dense model; its ``attention`` has the ``sink`` and ``local`` of streaming.
      prompts: prompts of any lengths.
      names: rows of `SCORES`; all rows of `MEASURES` together cost no more than one.
      chunk: prompt tokens per call.
      done: scores by prompt and name, which are not computed again; new ones are added prompt by prompt.
      on_progress: called with ("scores", prompts done, prompts).

    Raises:
      InputError: for an unknown name, no prompt, or a model that is not dense.
    """
    for name in names:
        _require_known(name)
    reader, done = Reader(params, config, prompts, chunk=chunk), {} if done is None else done
    found: dict[str, list[Scores]] = {}
    for number, prompt in enumerate(prompts, start=1):
        keys = {name: f"score {prompt.digest} {name}" for name in names}
        if not done.keys() >= set(keys.values()):
            done.update({keys[name]: score for name, score in _score(reader, prompt, names).items()})
        found.setdefault(prompt.kind, []).append({name: done[key] for name, key in keys.items()})
        if on_progress is not None:
            on_progress("scores", number, len(prompts))
    return {
        kind: {name: np.mean([row[name] for row in rows], axis=0) for name in names} for kind, rows in found.items()
    }


def _score(reader: Reader, prompt: Prompt, names: Sequence[str]) -> Scores:
    params, config, chunk = reader.params, reader.config, reader.read(prompt)
    found, hidden = probe(params, reader.cache, chunk, config=config)
    if any(name in SLOPES for name in names):
        ones = jnp.ones((config.model.num_layers, config.model.num_kv_heads), jnp.float32)
        full, half = (slopes(params, reader.cache, chunk, gate * ones, hidden, config=config) for gate in (1.0, 0.5))
        found |= {"loss": (full.nll + half.nll) / 2, "divergence": half.divergence}
    return {name: np.asarray(found[name], np.float64) for name in names}


def combine(scores: Mapping[str, Scores], name: str) -> NDArray[np.float64]:
    """Returns one score [L, K] of all kinds of prompts.

    A head is needed if one kind of prompt needs it, however little the others do. So it counts by its largest share of
    a kind's total, and for `BEST_PLACE` by its best place in a kind's ranking. Slopes below 0 count as 0.

    Args:
      scores: from `score_heads`.
      name: a row of `SCORES`, or `BEST_PLACE`.
    """
    if name == BEST_PLACE:
        return _best_places(scores)
    _require_known(name)
    kinds = [np.maximum(found[name], 0.0) for found in scores.values()]
    # The total is 0 for a kind without information, such as plain text for needles.
    return np.stack([kind / max(kind.sum(), np.finfo(np.float64).tiny) for kind in kinds]).max(axis=0)


def _best_places(scores: Mapping[str, Scores]) -> NDArray[np.float64]:
    """Returns minus the best place [L, K] of each head in a kind's ranking; of equal places that for copying is worse.

    Kinds whose answers come from no passage, such as plain text, rank nothing, since their loss is spread over all
    heads.
    """
    rankings = [
        scores[kind][_RANKS_KIND.get(kind, _RANKS_OTHERS)]
        for kind in sorted(scores, key=lambda kind: kind in _RANKS_KIND)
        if np.any(scores[kind]["needle"] > 0)
    ]
    if not rankings:
        raise InputError(f"{BEST_PLACE} needs prompts whose answers come from a passage; rank by another score")
    places = [_places(ranking.ravel()) + kind / len(rankings) for kind, ranking in enumerate(rankings)]
    return -np.min(np.asarray(places, np.float64), axis=0).reshape(rankings[0].shape)


def _places(scores: NDArray[np.floating]) -> NDArray[np.intp]:
    """Returns for each score how many along the last axis rank higher; of equal scores the first ranks higher."""
    return np.argsort(np.argsort(-scores, axis=-1, kind="stable"), axis=-1)


def _require_known(name: str) -> None:
    if name not in SCORES:
        raise InputError(f"score {name!r} must be one of {', '.join(SCORES)}")


def to_gates(scores: NDArray[np.floating], quota: str = "model") -> NDArray[np.float64]:
    """Returns gates [L, K] in (0, 1] that rank heads as the scores [L, K] do.

    A gate is the share of heads that rank no higher: a head keeps the whole context at every static sparsity below its
    gate. Of equal scores the first by (layer, head) ranks higher, as in `lserve_jax.config.heads.classify`.

    Args:
      scores: finite scores.
      quota: "model" ranks all heads together; "layer" ranks the heads of each layer, so that layers have equally many
        streaming heads (if the sparsity does not divide them, the first layers have one less).
    """
    if quota not in QUOTAS:
        raise InputError(f"quota must be one of {', '.join(QUOTAS)}, got {quota!r}")
    groups = scores.reshape(1, -1) if quota == "model" else scores
    return ((groups.shape[1] - _places(groups)) / groups.shape[1]).reshape(scores.shape)
