"""Resolves what a user names (a model, a preset, sizes) to everything that an engine needs; loads nothing."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lserve_jax.config.attention import AttentionConfig, from_preset
from lserve_jax.config.errors import InputError
from lserve_jax.config.generation import not_honoured, recommended_params
from lserve_jax.config.heads import CONFIG_FILE, GATES_FILE, HeadClasses, classify, load_gates, load_settings
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.config.sizes import Sizes, check_sizes
from lserve_jax.engine.device import Device, overlooked_gpu, this_device
from lserve_jax.engine.memory import MemoryPlan, plan_memory
from lserve_jax.runtime.implementations import describe, implementations
from lserve_jax.weights import embedded
from lserve_jax.weights.load import Checkpoint, open_checkpoint
from pallas_kernels import BACKENDS, Choice

logger = logging.getLogger("lserve_jax")

DEFAULT_MODEL = embedded.MODEL_NAME
IMPLEMENTATIONS = ("auto", *(name for name in BACKENDS if name != "reference"))
_PREFILL_CHUNK = {"cpu": 512}
_GPU_PREFILL_CHUNK = 2048


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model that is opened but not loaded, all its settings, and the memory that they need.

    Attributes:
      checkpoint: the open checkpoint.
      config: model, attention, head classes and number types.
      plan: sizes and memory.
      device: what it is for.
      has_pattern: whether a head pattern says which heads stream.
      has_recall: whether the recall of page selection is measured.
    """

    checkpoint: Checkpoint
    config: InferenceConfig
    plan: MemoryPlan
    device: Device
    has_pattern: bool = False
    has_recall: bool = False

    @property
    def sizes(self) -> Sizes:
        """Returns the sequences, context and calls of the engine."""
        return self.plan.sizes

    @cached_property
    def implementations(self) -> tuple[Choice, ...]:
        """Returns the implementations of the ops, and why others refused (see `lserve_jax.runtime.implementations`).

        Empty for a device that is not here.
        """
        if not self.device.is_here:
            return ()
        return implementations(self.config, self.sizes, self.plan.pools)

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Returns one line per setting that is valid but hardly intended; `warn` logs them."""
        return tuple(_warnings(self))

    def warn(self) -> None:
        """Logs the warnings."""
        for warning in self.warnings:
            logger.warning(warning)


def prepare(
    model: str = DEFAULT_MODEL,
    *,
    attention: str = "lserve",
    head_pattern: str | Path | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int = 4,
    prefill_chunk: int | None = None,
    steps_per_call: int = 8,
    implementation: str | None = None,
    assume_streaming: bool = False,
    recall_interval: int | None = None,
    device: Device | None = None,
    **options: Any,
) -> Setup:
    """Returns the settings of an engine, validated; reads metadata only.

    Args:
      model: see `open_checkpoint`.
      attention: preset name.
      head_pattern: folder with head gates in DuoAttention's format, and optionally settings that suit the model (see
        `lserve_jax.config.heads.load_settings`); None takes the pattern that ships with the package for this model.
      dtype: "auto", "bfloat16" or "float32".
      max_model_len: tokens per sequence; None takes the model's maximum.
      max_num_seqs: sequences that decode together.
      prefill_chunk: prompt tokens per prefill call; None takes a value that suits the device.
      steps_per_call: decode steps per call, after which the host acts.
      implementation: the kernels' backend; None or "auto" takes the first that accepts.
      assume_streaming: whether any heads stream if there is no pattern: for a plan without weights.
      recall_interval: decode steps from one measurement of the recall of page selection to the next, which are then
        also the steps per call; None measures nothing and costs nothing. An interval that is not a multiple of
        ``selector_interval`` measures selections of every age.
      device: the device to plan for; None takes jax's default device (`lserve_jax.engine.device.this_device`).
      **options: fields of `AttentionConfig` that replace the preset's and the pattern's; None keeps theirs, and
        ``token_budget="all"`` lifts a preset's budget.

    Raises:
      InputError: if a model or setting is invalid, in one line.
    """
    named = {"max_model_len": max_model_len, "prefill_chunk": prefill_chunk, "recall_interval": recall_interval}
    _check(implementation, max_num_seqs=max_num_seqs, steps_per_call=steps_per_call, **named)
    from_preset(attention, **options)  # reports invalid options before a checkpoint is opened
    device = device or this_device()
    checkpoint = open_checkpoint(model)
    policy = from_preset(attention, of_model=model_settings(checkpoint, head_pattern), **options)
    heads = _head_classes(checkpoint, policy, head_pattern, assume_streaming)
    named_implementation = None if implementation == "auto" else implementation
    config = InferenceConfig(
        model=checkpoint.config, attention=policy, heads=heads, dtype=dtype, implementation=named_implementation
    )
    length = max_model_len or checkpoint.config.max_context
    chunk = min(prefill_chunk or _PREFILL_CHUNK.get(device.platform, _GPU_PREFILL_CHUNK), length)
    calls = {"prefill_chunk": chunk, "steps_per_call": min(recall_interval or steps_per_call, length)}
    sizes = Sizes(max_model_len=length, max_num_seqs=max_num_seqs, **calls)
    plan = plan_memory(config, sizes, available_bytes=device.free_bytes)
    found = {"has_pattern": heads is not None, "has_recall": recall_interval is not None}
    setup = Setup(checkpoint=checkpoint, config=config, plan=plan, device=device, **found)
    if config.implementation is not None:
        try:  # here, before anything is loaded
            _ = setup.implementations
        except NotImplementedError as error:
            raise InputError(str(error)) from None
    return setup


def _check(implementation: str | None, **sizes: int | None) -> None:
    """Raises InputError for what is wrong without a look at any model; sizes that are None are not named."""
    check_sizes(**{name: value for name, value in sizes.items() if value is not None})
    if implementation not in (None, *IMPLEMENTATIONS):
        raise InputError(f"implementation={implementation!r} must be one of {', '.join(IMPLEMENTATIONS)}")


def _warnings(setup: Setup) -> Iterator[str]:
    name, config, model = setup.checkpoint.name, setup.config, setup.checkpoint.config
    yield from setup.checkpoint.warnings
    if config.attention.static_sparsity > 0 and not setup.has_pattern:
        yield f"no head pattern for {name}: all KV heads are retrieval heads (a pattern is given with head_pattern)"
    if ignored := not_honoured(setup.checkpoint.generation_config):
        yield f"{name}: generation_config.json asks for what is not supported and ignored: {', '.join(ignored)}"
    if setup.sizes.max_model_len > model.max_context:
        yield (
            f"max_model_len={setup.sizes.max_model_len} is beyond the {model.max_context} tokens that this model was "
            "made for: expect nonsense past them"
        )
    if (warning := overlooked_gpu(setup.device)) is not None:
        yield warning
    if setup.device.platform == "gpu":
        slow = [choice for choice in setup.implementations if choice.implementation == "xla" and choice.refusals]
        if slow:
            yield f"attention is slow on this GPU: {describe(slow, with_ops=True)}"


def default_sampling_params(checkpoint: Checkpoint) -> SamplingParams:
    """Returns the sampling settings in the checkpoint's ``generation_config.json``, greedy if it names none."""
    return recommended_params(checkpoint.generation_config, source=checkpoint.name)


def model_settings(checkpoint: Checkpoint, head_pattern: str | Path | None = None) -> dict[str, Any]:
    """Returns the fields of `AttentionConfig` that a head pattern recommends (`prepare` says which pattern it is).

    Raises:
      InputError: if they are not valid fields, in one line that names the file.
    """
    with _pattern_folder(checkpoint, head_pattern) as folder:
        if folder is None:
            return {}
        settings = load_settings(folder)
        try:
            from_preset("lserve", **settings)
        except InputError as error:
            raise InputError(f"{folder / CONFIG_FILE}: attention: {error}") from None
        return settings


def _head_classes(
    checkpoint: Checkpoint, policy: AttentionConfig, head_pattern: str | Path | None, assume_streaming: bool
) -> HeadClasses | None:
    """Returns the head classes of the policy and the pattern; None (all retrieval) without sparsity or a pattern."""
    layers, heads = checkpoint.config.num_layers, checkpoint.config.num_kv_heads
    if policy.static_sparsity == 0:
        return None
    with _pattern_folder(checkpoint, head_pattern) as folder:
        if folder is not None:
            return classify(load_gates(folder, layers, heads), policy.static_sparsity)
    if assume_streaming:  # which heads stream does not affect a plan: all layers have pools with the same page count
        return classify(np.zeros((layers, heads)), policy.static_sparsity)
    return None


@contextmanager
def _pattern_folder(checkpoint: Checkpoint, head_pattern: str | Path | None) -> Iterator[Path | None]:
    """Yields the named folder, else the folder of the pattern that ships with the package for this model, or None."""
    if head_pattern is not None:
        yield Path(head_pattern)
        return
    folder = resources.files("lserve_jax") / "data" / "patterns" / Path(checkpoint.name).name
    if not (folder / GATES_FILE).is_file():
        yield None
        return
    with resources.as_file(folder) as path:
        yield path
