"""Finds the window of streaming heads: the smallest that changes the model's predictions hardly more than a larger one.

What a window costs is the Kullback-Leibler divergence of the predictions of answers from those of dense attention. It
tells windows apart with a few prompts, where the loss of the right answers needs hundreds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lserve_jax.calibration.masked import answer_states, divergence
from lserve_jax.calibration.progress import Done
from lserve_jax.calibration.prompts import Prompt
from lserve_jax.calibration.reader import Reader
from lserve_jax.calibration.scores import OnProgress
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.models.llama import Params

WINDOWS = (128, 256, 512, 1024)
MARGIN = 0.005
"""Nats per token that a window may cost more than the best one: about half a percent of perplexity."""


@dataclass(frozen=True, kw_only=True)
class WindowCost:
    """Mean divergence from dense attention in nats per token, by kind of prompt, with a window of ``local`` tokens."""

    local: int
    divergence: dict[str, float]


def candidates(prompts: Sequence[Prompt]) -> tuple[int, ...]:
    """Returns the windows that prompts can tell apart: those below half of the shortest prompt."""
    shortest = min(len(prompt.tokens) for prompt in prompts)
    return tuple(local for local in WINDOWS if 2 * local < shortest)


def window_costs(
    params: Params,
    config: InferenceConfig,
    prompts: Sequence[Prompt],
    is_retrieval: NDArray[np.bool_],
    *,
    chunk: int,
    done: Done | None = None,
    on_progress: OnProgress | None = None,
) -> list[WindowCost]:
    """Returns what each of the `candidates` costs, ascending.

    Heads that are not ``is_retrieval`` [L, K] stream from the first token of a prompt on. ``done`` has costs by prompt
    and heads; other arguments are those of `lserve_jax.calibration.scores.score_heads`.
    """
    reader, windows = Reader(params, config, prompts, chunk=chunk), candidates(prompts)
    done = {} if done is None else done
    costs: dict[str, list[NDArray[np.floating]]] = {}
    for number, prompt in enumerate(prompts, start=1):
        key = f"windows {prompt.digest} {np.packbits(is_retrieval).tobytes().hex()}"
        if key not in done:
            done[key] = _costs(reader, prompt, is_retrieval, windows)
        costs.setdefault(prompt.kind, []).append(done[key])
        if on_progress is not None:
            on_progress("windows", number, len(prompts))
    means = {kind: np.mean(rows, axis=0) for kind, rows in costs.items()}
    return [
        WindowCost(local=local, divergence={kind: float(mean[index]) for kind, mean in means.items()})
        for index, local in enumerate(windows)
    ]


def _costs(
    reader: Reader, prompt: Prompt, is_retrieval: NDArray[np.bool_], windows: Sequence[int]
) -> NDArray[np.floating]:
    """Returns the mean divergence of a prompt's answer with each window."""
    wanted = answer_states(reader, prompt, np.ones_like(is_retrieval), windows[0])

    def cost(local: int) -> np.floating:
        found = answer_states(reader, prompt, is_retrieval, local)
        costs = divergence(reader.params, wanted, found, config=reader.config)
        return np.asarray(costs)[: prompt.num_answer].mean()

    return np.asarray([cost(local) for local in windows])


def choose_window(costs: Sequence[WindowCost]) -> int:
    """Returns the smallest window that costs, for every kind of prompt, at most `MARGIN` more than the best one."""
    best = {kind: min(cost.divergence[kind] for cost in costs) for kind in costs[0].divergence}
    return min(cost.local for cost in costs if all(cost.divergence[kind] <= best[kind] + MARGIN for kind in best))
