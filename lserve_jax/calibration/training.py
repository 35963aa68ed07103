"""DuoAttention's gates by gradient descent (Xiao et al., arXiv 2410.10819, section 3.2), resumable bit for bit."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from lserve_jax.calibration.progress import Done
from lserve_jax.calibration.two_streams import Example, distillation_loss
from lserve_jax.config.errors import InputError
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.models.llama import Params


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The paper's schedule: a fifth of the steps warms up, a fifth decays to a tenth of the learning rate.

    The "help" of a field says what it is.
    """

    steps: int = field(default=2000, metadata={"help": "gradient steps, of one text each"})
    learning_rate: float = field(default=0.02, metadata={"help": "highest learning rate of AdamW without weight decay"})
    regularisation: float = field(
        default=0.05, metadata={"help": "weight in the loss of the gates' mean, which pulls them towards 0"}
    )

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps={self.steps} must be at least 1")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate={self.learning_rate} must be more than 0")
        if not self.regularisation >= 0:
            raise InputError(f"regularisation={self.regularisation} must be at least 0")

    def optimiser(self) -> optax.GradientTransformation:
        """Returns AdamW under the schedule."""
        ramp = max(self.steps // 5, 1)

        def rate(step: Any) -> jax.Array:
            return self.learning_rate * jnp.clip(jnp.minimum(step + 1, self.steps - step) / ramp, 0.1, 1.0)

        return optax.adamw(rate, weight_decay=0.0)


class TrainingState(NamedTuple):
    """Steps done, gates [L, K] float32, and the optimiser's state."""

    step: jax.Array
    gates: jax.Array
    optimiser: Any

    @classmethod
    def start(cls, shape: tuple[int, int], training: TrainingConfig) -> "TrainingState":
        """Returns the state before the first step: every head attends to everything."""
        gates = jnp.ones(shape, jnp.float32)
        return cls(jnp.int32(0), gates, training.optimiser().init(gates))


@partial(jax.jit, static_argnames=("config", "training"))
def train_step(
    params: Params, state: TrainingState, example: Example, *, config: InferenceConfig, training: TrainingConfig
) -> tuple[TrainingState, jax.Array]:
    """Returns the state after a step and the distillation loss before it."""

    def loss(gates: jax.Array) -> tuple[jax.Array, jax.Array]:
        distilled = distillation_loss(params, example, gates, config)
        return distilled + training.regularisation * jnp.mean(jnp.abs(gates)), distilled

    slopes, distilled = jax.grad(loss, has_aux=True)(state.gates)
    # Optax raises a float to the power of an integer, whose type is float64 under jax_enable_x64.
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        updates, optimiser = training.optimiser().update(slopes, state.optimiser, state.gates)
    gates = jnp.clip(optax.apply_updates(state.gates, updates), 0.0, 1.0)  # type: ignore[arg-type]
    return TrainingState(state.step + 1, gates, optimiser), distilled


def train(
    params: Params,
    config: InferenceConfig,
    examples: Callable[[int], Example],
    training: TrainingConfig,
    *,
    done: Done | None = None,
    interval: int = 20,
    on_step: Callable[[int, float, float], None] | None = None,
) -> NDArray[np.float32]:
    """Returns the gates [L, K] in [0, 1] after all steps, continuing from the state in ``done`` if there is one.

    After an error or a keyboard interrupt, ``done`` holds the last finished step; after a killed process, the last
    saved one. The gates do not depend on where a run was interrupted.

    Args:
      params: the model's parameters in the checkpoint's order of heads.
      config: a dense model; its ``attention`` has the ``sink`` and ``local`` of streaming.
      examples: step → sequence.
      training: the schedule.
      done: where the state is kept.
      interval: steps from one save to the next.
      on_step: called with the steps done, the distillation loss before the last step, and the mean gate after it.

    Raises:
      InputError: if the state in ``done`` is that of a model of another shape.
    """
    model, done = config.model, {} if done is None else done
    state = _restored(TrainingState.start((model.num_layers, model.num_kv_heads), training), done)
    saved = int(state.step)
    try:
        for step in range(saved, training.steps):
            state, loss = train_step(params, state, examples(step), config=config, training=training)
            if on_step is not None:
                on_step(step + 1, float(loss), float(jnp.mean(state.gates)))
            if (step + 1) % interval == 0:
                done.update(_named(state))
                saved = step + 1
    finally:
        if int(state.step) > saved:
            done.update(_named(state))
    return np.asarray(state.gates)


def _named(state: TrainingState) -> dict[str, NDArray[Any]]:
    """Returns the arrays of a state by name."""
    return {f"training {index}": np.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(state))}


def _restored(state: TrainingState, done: Done) -> TrainingState:
    """Returns the saved state, or ``state``, which has the same structure, if there is none."""
    names = _named(state)
    if not names.keys() <= done.keys():
        return state
    if any(done[name].shape != leaf.shape for name, leaf in names.items()):
        raise InputError("the training was begun for a model of another shape; name another folder")
    return jax.tree.unflatten(jax.tree.structure(state), [jnp.asarray(done[name]) for name in names])
