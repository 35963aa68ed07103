"""Layers that must read all pages: one that averages over everything is found, noise and small change are not."""

import copy
import dataclasses
import random
from typing import Any

import numpy as np
import pytest

from lserve_jax import classify, from_preset
from lserve_jax.calibration.dense_layers import (
    LEAST_SHARE,
    MOST,
    SelectionCost,
    dense_layers,
    search,
    selecting_layers,
    selection_costs,
)
from lserve_jax.calibration.prompts import Prompt
from lserve_jax.calibration.replay import Replayer
from tests.lserve_jax.calibration import planted

CHUNK = 64
GATES = np.array([[head in (0, 1) for head in range(planted.HEADS)]] * planted.LAYERS, np.float64)
for _head in planted.PLANTED:
    GATES[_head] = 1.0
CONFIG = dataclasses.replace(
    planted.CONFIG,
    attention=from_preset(
        "lserve", sink=planted.SINK, local=planted.LOCAL, token_budget=64, page_size=16, sub_page_size=4
    ),
    heads=classify(GATES, 0.25),
)


def prompt(seed: int, length: int = 260, answer: int = 12) -> Prompt:
    """Values in an order of its own, of which a few are much more frequent: the average over all tells which."""
    rng = random.Random(seed)
    favourites = rng.sample(planted.VALUES, 3)
    tokens = [rng.choice([*favourites, *planted.FILLERS[:6]]) for _ in range(length)]
    return Prompt(kind="average", tokens=tuple(tokens), num_answer=answer, sources=(0,) * length, asks=(0,) * answer)


def averaging(layer: int, head: int = 1) -> dict[str, Any]:
    """The planted model with a head that attends to every token alike, and predicts the values that it saw."""
    params = copy.deepcopy(planted.params())
    attention = params[f"layers_{layer}"]["attention"]
    kernel, bias = attention["qkv_proj"]["kernel"], attention["qkv_proj"]["bias"]
    kernel[head], bias[head] = 0.0, 0.0
    kernel[head, -1, :16, planted.VALUE] = np.eye(16)
    outputs = attention["o_proj"]["kernel"].reshape(planted.WIDTH, planted.HEADS, planted.GROUP, planted.HEAD_DIM)
    outputs[:, head] = 0.0
    outputs[planted.ANSWER, head, :, :16] = 4 * np.eye(16)[:, None] / planted.GROUP
    return params


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_whose_attention_is_spread_over_everything_is_found(layer: int):
    prompts = [prompt(seed) for seed in range(3)]
    costs = selection_costs(averaging(layer), CONFIG, prompts, chunk=CHUNK)
    assert dense_layers(costs) == (layer,)
    none, one, two = costs
    assert (none.dense_layers, one.dense_layers, two.dense_layers[:1]) == ((), (layer,), (layer,))
    assert [cost.is_kept for cost in costs] == [True, True, False]
    assert none.divergence["average"] > 0.02 and one.divergence["average"] < 0.1 * none.divergence["average"]


@pytest.mark.slow
def test_a_model_that_finds_what_it_needs_gets_no_dense_layer():
    prompts = [planted.prompt(seed) for seed in range(3)]
    costs = selection_costs(planted.params(), CONFIG, prompts, chunk=CHUNK)
    assert dense_layers(costs) == ()
    assert len(costs) == 2 and not costs[1].is_kept
    assert costs[0].divergence["lookup"] < 1e-3


@pytest.mark.slow
def test_costs_that_were_measured_are_not_measured_again(monkeypatch: pytest.MonkeyPatch):
    prompts, params, done = [prompt(seed) for seed in range(2)], averaging(1), {}
    measure, calls, stages = Replayer.divergences, [], []
    monkeypatch.setattr(Replayer, "divergences", lambda *args: (calls.append(1), measure(*args))[1])
    whole = selection_costs(
        *(params, CONFIG, prompts), chunk=CHUNK, done=done, on_progress=lambda *stage: stages.append(stage)
    )
    assert stages == [(f"dense layer {layer}", number, 2) for layer in (1, 2) for number in (1, 2)]
    kept = dict(list(done.items())[:3])  # as after an interruption
    calls.clear()
    assert selection_costs(params, CONFIG, prompts, chunk=CHUNK, done=kept) == whole
    assert len(calls) == 1


def test_only_layers_with_retrieval_heads_select():
    gates = np.array([[0.0] * 4, [1.0] * 4, [0.0, 0.0, 1.0, 0.0]])
    config = dataclasses.replace(CONFIG, heads=classify(gates, 7 / 12))
    assert selecting_layers(config) == (1, 2)


class Measured:
    """Costs of copies and text in a model of layers that each cost something, alike for all prompts but for noise."""

    def __init__(self, *layers: tuple[float, float], noise: float = 0.0, prompts: int = 4) -> None:
        self.layers, self.asked = layers, []
        rng = np.random.default_rng(0)
        shape = prompts, 1 + len(layers)
        self.noise = [noise * rng.standard_normal(shape) for _ in range(2)]

    def __call__(self, dense: tuple[int, ...]) -> dict[str, np.ndarray]:
        self.asked.append(dense)
        sets = [dense, *({*dense, layer} for layer in range(len(self.layers)))]
        costs = {}
        for index, kind in enumerate(("copying", "text")):
            rows = [sum(cost[index] for layer, cost in enumerate(self.layers) if layer not in one) for one in sets]
            costs[kind] = np.array(rows) + self.noise[index]
        return costs

    def search(self) -> list[SelectionCost]:
        return search(self, range(len(self.layers)))


def test_layers_are_found_one_after_the_other_the_best_first():
    measured = Measured((0.01, 0.01), (0.03, 0.0), (0.0, 0.05), (0.01, 0.0), (0.01, 0.01), (0.01, 0.01))
    costs = measured.search()
    assert measured.asked == [(), (2,)]
    assert [cost.dense_layers for cost in costs] == [(), (2,), (2, 1)]
    assert [cost.is_kept for cost in costs] == [True, True, True]
    assert [cost.divergence["copying"] for cost in costs] == pytest.approx([0.07, 0.07, 0.04])
    assert dense_layers(costs) == (1, 2)


def test_no_more_layers_are_found_than_a_model_may_have():
    costs = Measured(*((0.02, 0.02),) * 3).search()
    assert (MOST, len(dense_layers(costs)), len(costs)) == (2, 2, 3)


def test_layers_that_share_the_cost_are_not_dense():
    costs = Measured(*((0.01, 0.01),) * 7).search()  # a seventh each
    assert LEAST_SHARE == 0.15 and dense_layers(costs) == ()
    assert [cost.is_kept for cost in costs] == [True, False]


def test_a_change_that_prompts_do_not_agree_on_is_not_believed():
    layers = ((0.03, 0.0), *((0.02, 0.02),) * 4)
    assert dense_layers(Measured(*layers, noise=0.001).search())[:1] == (0,)
    assert 0 not in dense_layers(Measured(*layers, noise=0.05).search())
    assert dense_layers(Measured(*layers, prompts=1).search()) == ()


def test_what_selection_hardly_costs_is_not_worth_a_layer():
    assert dense_layers(Measured((0.0004, 0.0004), (0.0001, 0.0001)).search()) == ()
    assert dense_layers(Measured((0.04, 0.04), (0.01, 0.01)).search())[0] == 0
