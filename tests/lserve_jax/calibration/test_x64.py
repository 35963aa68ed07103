"""Calibration under ``jax_enable_x64``: the same scores, losses and gates."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from lserve_jax.calibration import windows
from lserve_jax.calibration.dense_layers import selection_costs
from lserve_jax.calibration.masked import answer_loss, divergence, masked_step, retrieval_heads
from lserve_jax.calibration.probe import probe, slopes
from lserve_jax.calibration.reader import Reader
from lserve_jax.calibration.scores import score_heads
from lserve_jax.calibration.shares import expected_losses
from lserve_jax.calibration.training import TrainingConfig, TrainingState, train, train_step
from lserve_jax.calibration.two_streams import BLOCK, Example
from tests import x64
from tests.lserve_jax.calibration import planted
from tests.lserve_jax.calibration.test_dense_layers import CONFIG, GATES

pytestmark = pytest.mark.slow

TRAINING = TrainingConfig(steps=3, learning_rate=0.1)
SHAPE = (planted.LAYERS, planted.HEADS)


def example(step: int) -> Example:
    rng = np.random.default_rng(step)
    return Example(rng.integers(0, planted.MODEL.vocab_size, BLOCK).astype(np.int32), rng.random(BLOCK) < 0.1)


def test_no_equation_of_a_program_has_64_bits():
    params, prompt, config = planted.params(), planted.prompt(1), planted.CONFIG
    with x64.enabled():
        reader = Reader(params, config, [prompt], chunk=64)
        chunk = reader.read(prompt)
        gates, state = np.ones(SHAPE, np.float32), TrainingState.start(SHAPE, TRAINING)
        hidden = jax.eval_shape(partial(probe, config=config), params, reader.cache, chunk)[1]
    states = jax.ShapeDtypeStruct(hidden.shape[1:], hidden.dtype)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((chunk, state, hidden))} == {"int32", "float32"}
    calls: dict[Any, tuple[Any, ...]] = {
        partial(probe, config=config): (params, reader.cache, chunk),
        partial(slopes, config=config): (params, reader.cache, chunk, gates, hidden),
        partial(masked_step, config=config): (params, reader.cache, chunk, gates > 0, np.int32(planted.LOCAL)),
        partial(answer_loss, config=config): (params, states, chunk),
        partial(divergence, config=config): (params, states, states),
        partial(train_step, config=config, training=TRAINING): (params, state, example(0)),
    }
    for function, arguments in calls.items():
        assert x64.wide(x64.traced(function, *arguments)) == set()


def test_scores_and_expected_losses_are_the_same():
    prompts, gates = [planted.prompt(1)], np.random.default_rng(0).random(SHAPE)

    def run() -> Any:
        scores = score_heads(planted.params(), planted.CONFIG, prompts, chunk=64)["lookup"]
        losses = expected_losses(planted.params(), planted.CONFIG, prompts, gates, local=24, chunk=64, shares=(0.5,))
        return {name: score.tolist() for name, score in scores.items()}, losses

    without, within = x64.both(run)
    assert within == without


def test_costs_of_windows_and_of_selection_are_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(windows, "WINDOWS", (16, 48))
    prompts, kept = [planted.prompt(seed) for seed in range(2)], retrieval_heads(GATES, 0.25)

    def run() -> Any:
        return (
            windows.window_costs(planted.params(), planted.CONFIG, prompts, kept, chunk=64),
            selection_costs(planted.params(), CONFIG, prompts, chunk=64),
        )

    without, within = x64.both(run)
    assert within == without


def test_training_gives_the_same_gates():
    def run() -> Any:
        losses: list[float] = []
        gates = train(
            *(planted.params(), planted.CONFIG, example, TRAINING), on_step=lambda _, loss, mean: losses.append(loss)
        )
        return losses, str(gates.dtype), gates.tolist()

    without, within = x64.both(run)
    assert within == without
    assert len(set(without[0])) == TRAINING.steps
