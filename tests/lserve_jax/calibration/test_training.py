"""Training of gates: streaming attention that has a gradient, planted heads, interruption and resumption."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax.calibration.progress import PROGRESS_FILE, Progress
from lserve_jax.calibration.training import TrainingConfig, TrainingState, train, train_step
from lserve_jax.calibration.two_streams import BLOCK, Example, distillation_loss, streaming_attention
from lserve_jax.models.llama import Llama
from lserve_jax.weights import abstract_params
from tests.lserve_jax.calibration import planted

pytestmark = pytest.mark.slow

SHORT = TrainingConfig(steps=6, learning_rate=0.1)


def example(step: int) -> Example:
    """A planted prompt, padded; the tokens that predict a value are labelled."""
    prompt = planted.prompt(1000 + step)
    tokens, is_labelled = np.zeros(BLOCK, np.int32), np.zeros(BLOCK, bool)
    tokens[: len(prompt.tokens)] = prompt.tokens
    first = len(prompt.tokens) - prompt.num_answer - 1
    is_labelled[first : first + prompt.num_answer] = np.array(prompt.asks) > 0
    return Example(tokens, is_labelled)


def run(training: TrainingConfig = SHORT, **options: Any) -> np.ndarray:
    return train(planted.params(), planted.CONFIG, example, training, **options)


def visible(length: int, sink: int, local: int) -> np.ndarray:
    query, key = np.arange(length)[:, None], np.arange(length)
    return (key <= query) & ((key > query - local) | (key < sink))


def dense_masked(q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray) -> jax.Array:
    group = q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
    products = jnp.einsum("tnh,snh->nts", q, k, precision="highest") / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask, products, -jnp.inf), axis=-1)
    return jnp.einsum("nts,snh->tnh", weights, v, precision="highest")


@pytest.mark.parametrize(
    ("length", "sink", "local"),
    [(4 * BLOCK, 20, 100), (3 * BLOCK, 0, BLOCK + 1), (2 * BLOCK, 300, 7), (96, 5, 1), (BLOCK, 1000, 2000)],
)
def test_streaming_attention_and_its_gradient_are_those_of_the_mask(
    length: int, sink: int, local: int, rng: np.random.Generator
):
    shapes = ((length, 4, 8), (length, 2, 8), (length, 2, 8))
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)

    def mean(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda *arrays: jnp.sum(jnp.sin(attend(*arrays) * jnp.arange(8.0)))

    def mine(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return streaming_attention(q, k, v, sink=sink, local=local)

    def theirs(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return dense_masked(q, k, v, visible(length, sink, local))

    np.testing.assert_allclose(jax.jit(mine)(q, k, v), jax.jit(theirs)(q, k, v), atol=2e-6)
    slopes = (jax.jit(jax.grad(mean(attend), argnums=(0, 1, 2)))(q, k, v) for attend in (mine, theirs))
    for got, expected in zip(*slopes, strict=True):
        np.testing.assert_allclose(got, expected, atol=5e-5)


def test_the_loss_and_its_slopes_are_those_of_two_whole_streams(rng: np.random.Generator):
    """The full stream's outputs first, then a model in which they are blended with streaming ones."""
    sequence, params = example(3), planted.params()
    length, layers = sequence.tokens.size, planted.LAYERS
    gates = jnp.asarray(rng.uniform(0.2, 0.9, (layers, planted.HEADS)), jnp.float32)
    model = Llama(planted.MODEL, jnp.dtype("float32"))

    def apply(attend: Any) -> Any:
        tokens = jnp.asarray(sequence.tokens)[None]
        return model.apply({"params": params}, tokens, jnp.arange(length)[None], (None,) * layers, attend)

    def full(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, state: None) -> tuple[jax.Array, jax.Array]:
        out = dense_masked(q[0], k[0], v[0], visible(length, 0, length))[None]
        return out, out

    wanted, outputs = jax.jit(lambda: apply(full))()

    def loss(gates: jax.Array) -> jax.Array:
        def blended(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, state: None) -> tuple[jax.Array, None]:
            own = dense_masked(q[0], k[0], v[0], visible(length, planted.SINK, planted.LOCAL))
            gate = jnp.repeat(gates[layer], planted.GROUP)[:, None]
            return gate * outputs[layer] + (1 - gate) * own[None], state

        return jnp.mean(jnp.square(wanted - apply(blended)[0])[0, np.flatnonzero(sequence.is_labelled)])

    def mine(gates: jax.Array) -> jax.Array:
        return distillation_loss(params, sequence, gates, planted.CONFIG)

    (got, slopes), (expected, expected_slopes) = (jax.jit(jax.value_and_grad(f))(gates) for f in (mine, loss))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(slopes, expected_slopes, rtol=1e-3, atol=1e-6)


def test_training_finds_the_planted_heads():
    gates = run(TrainingConfig(steps=40, learning_rate=0.1))
    kept = {(int(layer), int(head)) for layer, head in np.argwhere(gates > 0.5)}
    assert kept == planted.PLANTED
    assert max(gates[layer, head] for layer in range(3) for head in range(4) if (layer, head) not in kept) < 0.1


def test_the_schedule_warms_up_and_decays_to_a_tenth():
    """From the steps that Adam takes where the gradient is always the same: each is the learning rate."""
    training = TrainingConfig(steps=100, learning_rate=0.01)
    optimiser = training.optimiser()
    gates, slope = jnp.zeros(()), jnp.ones(())
    state, rates = optimiser.init(gates), []
    with jax.numpy_dtype_promotion("standard"):  # as in train_step
        update_gates = jax.jit(optimiser.update)
        for _ in range(training.steps):
            update, state = update_gates(slope, state, gates)
            rates.append(-float(update))
    steps = np.arange(100)
    expected = 0.01 * np.clip(np.minimum(steps + 1, 100 - steps) / 20, 0.1, 1)
    np.testing.assert_allclose(rates, expected, rtol=1e-4)


def stop_at(step: int) -> Callable[[int, float, float], None]:
    def on_step(done: int, loss: float, gate: float) -> None:
        if done == step:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.parametrize("interval", [1, 2, 100])
def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path: Path, interval: int):
    for step in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            run(done=Progress(tmp_path, {"seed": 0}), interval=interval, on_step=stop_at(step))
    seen: list[int] = []
    on_step = lambda step, loss, gate: seen.append(step)  # noqa: E731
    resumed = run(done=Progress(tmp_path, {"seed": 0}), interval=interval, on_step=on_step)
    assert seen == [4, 5, 6]
    np.testing.assert_array_equal(resumed, run())


def test_a_killed_training_goes_on_from_what_was_saved(tmp_path: Path):
    path = tmp_path / PROGRESS_FILE
    kept: list[bytes] = []

    def on_step(done: int, loss: float, gate: float) -> None:
        if done == 4:  # what lies on disk now is all that a killed process leaves
            kept.append(path.read_bytes())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(done=Progress(tmp_path, {}), interval=2, on_step=on_step)
    path.write_bytes(kept[0])
    (tmp_path / f".{PROGRESS_FILE}.partial").write_bytes(b"half a file")
    seen: list[int] = []
    resumed = run(done=Progress(tmp_path, {}), on_step=lambda step, loss, gate: seen.append(step))
    assert seen == [3, 4, 5, 6]
    np.testing.assert_array_equal(resumed, run())


def test_the_state_of_a_model_of_another_shape_is_refused(tmp_path: Path):
    done: dict[str, Any] = {}
    run(SHORT, done=done)
    done = {name: value[:2] if value.ndim else value for name, value in done.items()}
    with pytest.raises(ValueError, match=r"^the training was begun for a model of another shape; name another folder$"):
        run(SHORT, done=done)


@pytest.mark.parametrize("field", ["steps", "learning_rate", "regularisation"])
def test_a_schedule_that_cannot_be_is_refused(field: str):
    with pytest.raises(ValueError, match=f"^{field}=-1 must be "):
        TrainingConfig(**{field: -1})


def test_memory_grows_linearly_with_the_sequence():
    config, training = planted.config_of(1), SHORT

    def temporaries(length: int) -> int:
        shape = jax.ShapeDtypeStruct
        sequence = Example(shape((length,), jnp.int32), shape((length,), jnp.bool_))  # type: ignore[arg-type]
        state = jax.eval_shape(lambda: TrainingState.start((1, planted.HEADS), training))
        params = abstract_params(config.model, jnp.dtype("float32"))
        step = train_step.lower(params, state, sequence, config=config, training=training)
        analysis = step.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    at_full, at_half = temporaries(8192), temporaries(4096)
    assert at_full < 2.2 * at_half
    assert at_full < 2 * 8192 * 8192  # half of what one score for each pair of tokens would take
