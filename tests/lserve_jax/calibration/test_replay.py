"""An answer decoded in many rows at once is what the engine's steps give, each row with its own dense layers."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from lserve_jax import classify, open_checkpoint
from lserve_jax.calibration.prompts import Prompt
from lserve_jax.calibration.replay import STEPS, Replayer, replay
from tests.lserve_jax.runtime.tiny_steps import TINY, Stepper, tiny_config

pytestmark = pytest.mark.slow

GATES = np.array(
    [[0.2, 0.9], [0.6, 0.4]]
)  # streaming: head 0 of layer 0, which then stands last, and head 1 of layer 1
CONFIG = tiny_config(heads=classify(GATES, 0.5), token_budget=64, sink=5, local=24, prefill_local=24)
CHUNK = 48
SETS = ((), (0,), (1,), (0, 1))


def prompt(rng: np.random.Generator, length: int, answer: int) -> Prompt:
    tokens = tuple(rng.integers(0, 128, length + answer).tolist())
    return Prompt(kind="x", tokens=tokens, num_answer=answer, sources=(0,) * len(tokens), asks=(0,) * answer)


def replayer(*prompts: Prompt, config: Any = CONFIG) -> Replayer:
    params = open_checkpoint(str(TINY / "llama3")).load_params("float32")  # in the checkpoint's order
    return Replayer(params, config, prompts, rows=len(SETS), chunk=CHUNK)


def dense(*sets: tuple[int, ...]) -> np.ndarray:
    return np.array([[layer in layers for layer in range(2)] for layers in sets])


def logs(prompt: Prompt, layers: tuple[int, ...], steps: int, kv_dtype: str) -> np.ndarray:
    """Log-probabilities [steps, V] after each token of the answer, by the engine's steps and weights in their order."""
    attention = dataclasses.replace(CONFIG.attention, dense_layers=layers, kv_dtype=kv_dtype)
    stepper = Stepper(dataclasses.replace(CONFIG, attention=attention), max_pages=24)
    start = len(prompt.tokens) - prompt.num_answer
    answer = np.array(prompt.tokens[start : start + steps], np.int32)
    logits = stepper.run(np.array(prompt.tokens[:start], np.int32), CHUNK, answer)[start:]
    return np.asarray(jax.nn.log_softmax(logits))


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("length", [200, 208])  # with an open page, and without
def test_each_row_diverges_as_an_engine_with_its_dense_layers(rng: np.random.Generator, length: int, kv_dtype: str):
    asked, config = prompt(rng, length, 20), CONFIG
    if kv_dtype != "float32":
        config = dataclasses.replace(config, attention=dataclasses.replace(config.attention, kv_dtype=kv_dtype))
    found = replayer(asked, config=config).divergences(asked, dense(*SETS))
    wanted, *others = (logs(asked, layers, 20, kv_dtype) for layers in ((0, 1), *SETS))
    expected = [np.mean(np.sum(np.exp(wanted) * (wanted - other), axis=-1)) for other in others]
    assert found[3] == 0 and min(found[:3]) > 1e-4  # selection changes something, and not where all pages are read
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-7)


def test_prompts_of_other_lengths_share_pages_and_programs_and_leave_nothing_behind(rng: np.random.Generator):
    first, short, long = (prompt(rng, *size) for size in ((200, 20), (90, 5), (230, STEPS + 9)))
    alone = [replayer(first, short, long).divergences(one, dense(*SETS)) for one in (first, short, long)]
    programs, one = compiled(), replayer(first, short, long)
    together = [one.divergences(each, dense(*SETS)) for each in (first, short, long)]
    assert compiled() == programs
    np.testing.assert_array_equal(together, alone)


def compiled() -> int:
    step: Any = replay
    return step._cache_size()
