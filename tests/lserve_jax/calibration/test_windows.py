"""The window of streaming heads: what windows cost is measured, and the smallest that costs little is chosen."""

import random
from typing import Any

import jax
import numpy as np
import pytest

from lserve_jax.calibration import windows
from lserve_jax.calibration.masked import answer_loss, answer_states, divergence
from lserve_jax.calibration.prompts import Prompt
from lserve_jax.calibration.reader import Reader
from lserve_jax.calibration.windows import MARGIN, WindowCost, candidates, choose_window, window_costs
from lserve_jax.models import layerwise
from tests.lserve_jax.calibration import planted

STREAMING = np.zeros((planted.LAYERS, planted.HEADS), bool)
CHUNK = 64


def costs(*rows: tuple[int, float, float]) -> list[WindowCost]:
    return [WindowCost(local=local, divergence={"copying": one, "text": other}) for local, one, other in rows]


@pytest.mark.parametrize(
    ("rows", "window"),
    [
        ([(128, 0.020, 0.026), (256, 0.012, 0.013), (512, 0.006, 0.007)], 512),
        ([(128, 0.020, 0.026), (256, 0.010, 0.011), (512, 0.006, 0.007)], 256),
        ([(128, 0.007, 0.026), (256, 0.006, 0.013), (512, 0.006, 0.007)], 512),  # one kind needs it
        ([(128, 0.004, 0.003), (256, 0.002, 0.001), (512, 0.000, 0.000)], 128),
        ([(128, 0.300, 0.300), (256, 0.100, 0.100), (512, 0.096, 0.098)], 256),  # heads that cost much with any window
        ([(128, 0.300, 0.300)], 128),
    ],
)
def test_the_smallest_window_that_costs_hardly_more_than_the_best_is_chosen(rows: Any, window: int):
    assert choose_window(costs(*rows)) == window


def test_the_margin_is_that_of_the_documentation():
    assert MARGIN == 0.005


@pytest.mark.parametrize(("length", "expected"), [(1536, (128, 256, 512)), (1024, (128, 256)), (4096, windows.WINDOWS)])
def test_windows_are_below_half_of_the_shortest_prompt(length: int, expected: tuple[int, ...]):
    prompts = [planted.prompt(seed, length=size) for seed, size in enumerate((length, length + 900))]
    assert candidates(prompts) == expected


def lookup(seed: int, back: int, length: int = 260) -> Prompt:
    """A key and its value, and the key again ``back`` tokens after the value, with nothing else to be found."""
    rng = random.Random(seed)
    tokens = [rng.choice(planted.FILLERS) for _ in range(length - 2)]
    key, value = rng.choice(planted.KEYS), rng.choice(planted.VALUES)
    tokens[length - 2 - back - 1 : length - 2 - back + 1] = key, value
    return Prompt(kind="lookup", tokens=(*tokens, key, value), num_answer=1, sources=(0,) * length, asks=(0,))


@pytest.mark.slow
def test_a_window_that_reaches_what_is_looked_up_costs_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(windows, "WINDOWS", (16, 48, 96))
    prompts = [lookup(seed, back) for seed, back in enumerate((40, 70, 30))]
    found = window_costs(planted.params(), planted.CONFIG, prompts, STREAMING, chunk=CHUNK)
    assert [cost.local for cost in found] == [16, 48, 96]
    near, middle, wide = (cost.divergence["lookup"] for cost in found)
    assert near > 0.5 and 0.2 * near < middle < 0.5 * near  # one of three lies beyond 48
    assert wide < 1e-3
    assert choose_window(found) == 96
    assert choose_window(window_costs(planted.params(), planted.CONFIG, prompts[2:], STREAMING, chunk=CHUNK)) == 48


@pytest.mark.slow
def test_costs_that_were_measured_are_not_measured_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(windows, "WINDOWS", (16, 48))
    prompts, done, calls = [lookup(seed, 30) for seed in range(2)], {}, []
    run: Any = lambda prompts, **options: window_costs(  # noqa: E731
        planted.params(), planted.CONFIG, prompts, STREAMING, chunk=CHUNK, **options
    )
    run(prompts[:1], done=done)
    read = Reader.read_through
    monkeypatch.setattr(Reader, "read_through", lambda *args: (calls.append(1), read(*args))[1])
    resumed = run(prompts, done=done)
    assert len(calls) == 3  # the second prompt: densely, and with each window
    assert resumed == run(prompts)


@pytest.mark.slow
def test_divergence_and_loss_are_those_of_whole_distributions(rng: np.random.Generator):
    params, config, prompt = planted.params(), planted.CONFIG, planted.prompt(0)
    reader = Reader(params, config, [planted.prompt(1, asked=5), prompt], chunk=CHUNK)
    wanted = answer_states(reader, prompt, ~STREAMING, 1)
    found = answer_states(reader, prompt, STREAMING, planted.LOCAL)
    answer = reader.answer(prompt)
    right, other = (np.asarray(layerwise.log_probabilities(params, config, x), np.float64) for x in (wanted, found))
    expected = np.sum(np.exp(right) * (right - other), axis=-1)
    np.testing.assert_allclose(divergence(params, wanted, found, config=config), expected, rtol=1e-4, atol=1e-6)
    rows = divergence(params, wanted, jax.numpy.stack([wanted, found], axis=1), config=config)
    np.testing.assert_allclose(rows, np.stack([0 * expected, expected], axis=1), rtol=1e-4, atol=1e-6)
    assert expected[: prompt.num_answer].max() > 0.5
    targets = prompt.tokens[-prompt.num_answer :]
    nll = -np.mean(other[np.arange(prompt.num_answer), list(targets)])
    assert float(answer_loss(params, found, answer, config=config)) == pytest.approx(nll, abs=1e-5)
