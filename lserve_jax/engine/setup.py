"""From what a user names — a model, a preset, sizes — to everything that an engine needs, with nothing loaded yet."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lserve_jax.config.attention import AttentionConfig, from_preset
from lserve_jax.config.heads import CONFIG_FILE, GATES_FILE, HeadClasses, classify, load_gates, load_settings
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.sizes import Sizes, check_sizes
from lserve_jax.engine.memory import MemoryPlan, plan_memory
from lserve_jax.runtime.implementations import describe, implementations
from lserve_jax.runtime.sampling import SamplingParams
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
    """A model opened but not loaded, all settings in force, and the memory that they take.

    ``warnings`` are for whoever goes on with it: what is legal but hardly meant.
    """

    checkpoint: Checkpoint
    config: InferenceConfig
    plan: MemoryPlan
    has_recall: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def sizes(self) -> Sizes:
        """Sequences, context and calls of the engine."""
        return self.plan.sizes

    @cached_property
    def implementations(self) -> tuple[Choice, ...]:
        """What the ops take, and why others refused (see `lserve_jax.runtime.implementations`)."""
        return implementations(self.config, self.sizes, self.plan.pools)

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
    **options: Any,
) -> Setup:
    """Returns the settings of an engine, validated; reads metadata only.

    Args:
      model: see `open_checkpoint`.
      attention: preset name.
      head_pattern: folder with head gates in DuoAttention's format, and perhaps settings that suit the model (see
        `lserve_jax.config.heads.load_settings`); None takes the pattern that ships for this model.
      dtype: "auto", "bfloat16" or "float32".
      max_model_len: tokens of a sequence; None takes the model's own.
      max_num_seqs: sequences that decode together.
      prefill_chunk: prompt tokens a prefill call; None suits the device.
      steps_per_call: decode steps between two looks of the host.
      implementation: kernels' backend; None or "auto" chooses.
      assume_streaming: for a plan without weights: where there is no pattern, let any heads stream.
      recall_interval: measure the recall of page selection at every so many decode steps, which are then also the
        steps of a call; None does not, and costs nothing. An interval that is no multiple of ``selector_interval``
        sees selections of every age.
      **options: fields of `AttentionConfig` that replace the preset's and the pattern's; None keeps theirs, and
        ``token_budget="all"`` lifts a preset's budget.

    Raises:
      ValueError: for anything that cannot be, in one line.
    """
    named = {"max_model_len": max_model_len, "prefill_chunk": prefill_chunk, "recall_interval": recall_interval}
    named = {name: value for name, value in named.items() if value is not None}
    check_sizes(max_num_seqs=max_num_seqs, steps_per_call=steps_per_call, **named)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r} must be one of {', '.join(IMPLEMENTATIONS)}")
    from_preset(attention, **options)  # what is wrong with them is found before a checkpoint is opened
    checkpoint = open_checkpoint(model)
    policy = from_preset(attention, of_model=model_settings(checkpoint, head_pattern), **options)
    heads = _head_classes(checkpoint, policy, head_pattern, assume_streaming)
    config = InferenceConfig(
        model=checkpoint.config,
        attention=policy,
        heads=heads,
        dtype=dtype,
        implementation=None if implementation == "auto" else implementation,
    )
    length = max_model_len or checkpoint.config.max_context
    chunk = min(prefill_chunk or _PREFILL_CHUNK.get(jax.default_backend(), _GPU_PREFILL_CHUNK), length)
    calls = {"prefill_chunk": chunk, "steps_per_call": recall_interval or steps_per_call}
    sizes = Sizes(max_model_len=length, max_num_seqs=max_num_seqs, **calls)
    plan = plan_memory(config, sizes)
    setup = Setup(checkpoint=checkpoint, config=config, plan=plan, has_recall=recall_interval is not None)
    return replace(setup, warnings=tuple(_warnings(setup, has_pattern=heads is not None)))


def _warnings(setup: Setup, *, has_pattern: bool) -> Iterator[str]:
    """Yields what is legal but hardly meant.

    Raises:
      NotImplementedError: if the implementation that is named refuses: before anything is loaded.
    """
    name, config, model = setup.checkpoint.name, setup.config, setup.checkpoint.config
    if config.attention.static_sparsity > 0 and not has_pattern:
        yield f"no head pattern for {name}: all KV heads are retrieval heads (a pattern is given with head_pattern)"
    if setup.sizes.max_model_len > model.max_context:
        yield (
            f"max_model_len={setup.sizes.max_model_len} is beyond the {model.max_context} tokens that this model was "
            "made for: expect nonsense past them"
        )
    if config.implementation is not None or jax.default_backend() == "gpu":
        for choice in setup.implementations:
            if choice.implementation == "xla" and choice.refusals:
                yield f"{choice.op} runs as xla on this GPU, which is slow: {describe([choice])}"


def default_sampling_params(checkpoint: Checkpoint) -> SamplingParams:
    """Returns the checkpoint's own sampling settings (generation_config.json), greedy where it names none."""
    given = checkpoint.generation_config
    if not given.get("do_sample", False):
        return SamplingParams()
    known = {name: given[name] for name in ("temperature", "top_p", "top_k", "min_p") if given.get(name) is not None}
    try:
        return SamplingParams(**{"temperature": 1.0, **known})
    except ValueError as error:
        raise ValueError(f"{checkpoint.name}: generation_config.json: {error}") from None


def model_settings(checkpoint: Checkpoint, head_pattern: str | Path | None = None) -> dict[str, Any]:
    """Returns the fields of `AttentionConfig` that a head pattern recommends (see `prepare` for which one it is).

    Raises:
      ValueError: if they are none, in one line that names the file.
    """
    with _pattern_folder(checkpoint, head_pattern) as folder:
        if folder is None:
            return {}
        settings = load_settings(folder)
        try:
            from_preset("lserve", **settings)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG_FILE}: attention: {error}") from None
        return settings


def _head_classes(
    checkpoint: Checkpoint, policy: AttentionConfig, head_pattern: str | Path | None, assume_streaming: bool
) -> HeadClasses | None:
    """Returns the head classes that the policy and the pattern make; None, all retrieval, where there is no pattern."""
    layers, heads = checkpoint.config.num_layers, checkpoint.config.num_kv_heads
    if policy.static_sparsity == 0:
        return None
    with _pattern_folder(checkpoint, head_pattern) as folder:
        if folder is not None:
            return classify(load_gates(folder, layers, heads), policy.static_sparsity)
    if assume_streaming:  # which heads does not matter to a plan: all layers have pools of the same number of pages
        return classify(np.zeros((layers, heads)), policy.static_sparsity)
    return None


@contextmanager
def _pattern_folder(checkpoint: Checkpoint, head_pattern: str | Path | None) -> Iterator[Path | None]:
    """Yields the named folder, or that of the pattern that ships with the package for a model of this name, or None."""
    if head_pattern is not None:
        yield Path(head_pattern)
        return
    folder = resources.files("lserve_jax") / "data" / "patterns" / Path(checkpoint.name).name
    if not (folder / GATES_FILE).is_file():
        yield None
        return
    with resources.as_file(folder) as path:
        yield path
