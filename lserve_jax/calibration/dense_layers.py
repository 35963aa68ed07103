"""Finds the layers that must read all pages: those that alone take away much of what page selection changes.

What selection costs is the Kullback-Leibler divergence of the predictions of answers from those of the same model that
reads all pages.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lserve_jax.calibration.progress import Done
from lserve_jax.calibration.prompts import Prompt
from lserve_jax.calibration.replay import Replayer
from lserve_jax.calibration.scores import OnProgress
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.models.llama import Params

MOST = 2
"""Most dense layers of a model."""
LEAST_SHARE = 0.15
"""Share of selection's cost for a kind of prompt that a dense layer must take away, mean over prompts."""
ERRORS = 2
"""Standard errors of that mean which the mean must exceed."""
_NOTHING = 0.005
"""Nats per token that cost nothing: a prompt that selection costs less counts as if it cost so much."""

type Costs = Mapping[str, NDArray[np.floating]]
"""Kind of prompt → what selection costs [prompts, 1 + layers]: as it is, and with each layer dense besides."""


@dataclass(frozen=True, kw_only=True)
class SelectionCost:
    """What page selection costs if some layers read all pages.

    Attributes:
      dense_layers: these layers.
      divergence: mean divergence in nats per token, by kind of prompt.
      is_kept: whether the last of the layers takes enough away.
    """

    dense_layers: tuple[int, ...]
    divergence: dict[str, float]
    is_kept: bool


def selecting_layers(config: InferenceConfig) -> tuple[int, ...]:
    """Returns the layers that select pages."""
    return tuple(layer for layer, kind in enumerate(config.kinds) if kind.decode.num_selected is not None)


def selection_costs(
    params: Params,
    config: InferenceConfig,
    prompts: Sequence[Prompt],
    *,
    chunk: int,
    done: Done | None = None,
    on_progress: OnProgress | None = None,
) -> list[SelectionCost]:
    """Returns what selection costs without dense layers, with each one that is found, and with the best of the others.

    Args:
      params: the model's parameters in the checkpoint's order of heads.
      config: streaming heads and page selection as they will be used, without dense layers.
      prompts: several of each kind.
      chunk: prompt tokens per call.
      done: costs by prompt and layers, which are not measured again; new ones are added prompt by prompt.
      on_progress: called with the stage, prompts done and prompts, for each layer that is sought.
    """
    layers, done = selecting_layers(config), {} if done is None else done
    replayer = Replayer(params, config, prompts, rows=1 + len(layers), chunk=chunk)
    assert config.heads is not None
    setting = f"{config.heads.digest} {config.attention.local}"

    def measure(dense: tuple[int, ...]) -> Costs:
        rows = _rows(dense, layers, config.model.num_layers)
        costs: dict[str, list[NDArray[np.floating]]] = {}
        for number, prompt in enumerate(prompts, start=1):
            key = f"selection {prompt.digest} {setting} {dense}"
            if key not in done:
                done[key] = replayer.divergences(prompt, rows)
            costs.setdefault(prompt.kind, []).append(done[key])
            if on_progress is not None:
                on_progress(f"dense layer {len(dense) + 1}", number, len(prompts))
        return {kind: np.stack(found) for kind, found in costs.items()}

    return search(measure, layers)


def _rows(dense: tuple[int, ...], layers: Sequence[int], num_layers: int) -> NDArray[np.bool_]:
    """Returns which layers are dense [1 + layers, L]: those of ``dense``, and in each row after the first one more."""
    rows = np.zeros((1 + len(layers), num_layers), bool)
    rows[:, list(dense)] = True
    rows[np.arange(1, len(rows)), list(layers)] = True
    return rows


def search(measure: Callable[[tuple[int, ...]], Costs], layers: Sequence[int]) -> list[SelectionCost]:
    """Returns the costs of the dense layers found one after the other, the best at each time.

    Args:
      measure: dense layers → what selection costs with them, and with each of ``layers`` besides.
      layers: the layers that select pages.
    """
    found: tuple[int, ...] = ()
    costs = measure(found)
    alone = {kind: np.maximum(cost[:, :1], _NOTHING) for kind, cost in costs.items()}
    rows = [SelectionCost(dense_layers=(), divergence=_means(costs, 0), is_kept=True)]
    while layers and rows[-1].is_kept:
        shares = [(cost[:, :1] - cost[:, 1:]) / alone[kind] for kind, cost in costs.items()]
        taken = np.max([np.where(_is_sure(share), share.mean(axis=0), 0.0) for share in shares], axis=0)
        best = int(np.argmax(taken))
        found = (*found, layers[best])
        is_kept = bool(taken[best] >= LEAST_SHARE)
        rows.append(SelectionCost(dense_layers=found, divergence=_means(costs, 1 + best), is_kept=is_kept))
        if len(found) == MOST:
            break
        if is_kept:
            costs = measure(found)
    return rows


def _is_sure(shares: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Returns for which layers the mean of ``shares`` [prompts, layers] is hardly chance: never with one prompt."""
    count = len(shares)
    if count == 1:
        return np.zeros(shares.shape[1], bool)
    return shares.mean(axis=0) > ERRORS * shares.std(axis=0, ddof=1) / np.sqrt(count)


def _means(costs: Costs, row: int) -> dict[str, float]:
    return {kind: float(cost[:, row].mean()) for kind, cost in costs.items()}


def dense_layers(costs: Sequence[SelectionCost]) -> tuple[int, ...]:
    """Returns the layers that `selection_costs` found, ascending."""
    return tuple(sorted([cost for cost in costs if cost.is_kept][-1].dense_layers))
