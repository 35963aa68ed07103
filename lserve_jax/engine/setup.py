"""Resolves what a user names (a model, a preset, sizes) to everything that an engine needs; loads nothing."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lserve_jax.config.attention import AttentionConfig, from_preset
from lserve_jax.config.errors import InputError, shown_list
from lserve_jax.config.generation import GENERATION_FILE, not_honoured, recommended_params
from lserve_jax.config.heads import HeadClasses, HeadPattern, classify
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.config.settings import BytesOrWord
from lserve_jax.config.sizes import CacheSettings, Sizes, check_sizes
from lserve_jax.engine.device import Device, overlooked_gpu, this_device
from lserve_jax.engine.memory import MemoryPlan, plan_memory
from lserve_jax.engine.patterns import find_pattern, find_smoothing
from lserve_jax.engine.scheduler import Turns
from lserve_jax.models.llama import Params
from lserve_jax.runtime.implementations import describe, implementations
from lserve_jax.weights import embedded
from lserve_jax.weights.forms import Forms
from lserve_jax.weights.load import Checkpoint, open_checkpoint
from lserve_jax.weights.tensors import Progress
from pallas_kernels import BACKENDS, Choice

logger = logging.getLogger("lserve_jax")

DEFAULT_MODEL = embedded.MODEL_NAME
IMPLEMENTATIONS = ("auto", *(name for name in BACKENDS if name != "reference"))
_REMEDY = "name one with --head-pattern (head_pattern), or find one with python -m lserve_jax.calibrate"
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
      pattern: says which heads stream; None if no head streams, or for a plan that assumes a pattern.
      has_recall: whether the recall of page selection is measured.
      has_tails: whether the last chunk of a prompt of several chunks has smaller programs of its own.
      forms: the form of every parameter.
      has_idle_sparsity: whether ``prefill_sparsity`` is set, but no prompt can be so long that it leaves something out.
    """

    checkpoint: Checkpoint
    config: InferenceConfig
    forms: Forms
    plan: MemoryPlan
    device: Device
    pattern: HeadPattern | None = None
    has_recall: bool = False
    has_tails: bool = True
    has_idle_sparsity: bool = False

    @property
    def sizes(self) -> Sizes:
        """Returns the sequences, context and calls of the engine."""
        return self.plan.sizes

    @property
    def turns(self) -> Turns:
        """Returns how calls take turns on the device. Recall is measured once per call, which then has all its steps.

        On a GPU the weights take most of the time of a short prompt, which several prompts can share. On a CPU each row
        takes its own time, empty ones too.
        """
        steps = None if self.has_recall else max(1, self.sizes.steps_per_call // 2)
        rows = self.sizes.max_num_seqs if self.device.platform == "gpu" else 1
        return Turns(busy_steps=steps, short_rows=rows, has_tails=self.has_tails)

    @property
    def params(self) -> Params:
        """Returns the parameter tree of `jax.ShapeDtypeStruct`."""
        return self.checkpoint.abstract(self.forms)

    def load_params(self, progress: Progress | None = None) -> Params:
        """Returns the parameters, with heads in the order of ``config.heads``; ``progress`` gets bytes and total."""
        return self.checkpoint.load(self.forms, self.config.heads, progress)

    @property
    def has_pattern(self) -> bool:
        """Returns whether a head pattern says which heads stream."""
        return self.pattern is not None

    @property
    def has_streaming_heads(self) -> bool:
        """Returns whether any KV head streams."""
        return sum(self.config.num_retrieval) < self.config.model.num_layers * self.config.model.num_kv_heads

    @property
    def pattern_origin(self) -> str:
        """Returns where the head pattern comes from, in words for a plan."""
        if self.pattern is not None:
            return self.pattern.origin
        if self.config.attention.static_sparsity == 0:
            return "none, because no head streams"
        return f"none for {self.checkpoint.name}" + (": this plan assumes one" if self.has_streaming_heads else "")

    @cached_property
    def implementations(self) -> tuple[Choice, ...]:
        """Returns the implementations of the ops, and why others refused (see `lserve_jax.runtime.implementations`).

        Empty for a device that is not here.
        """
        if not self.device.is_here:
            return ()
        return implementations(self.config, self.sizes, self.plan.pools, self.params)

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Returns one line per setting that is valid but hardly intended; `warn` logs them."""
        return tuple(_warnings(self))

    def warn(self) -> None:
        """Logs the warnings."""
        for warning in self.warnings:
            logger.warning(warning)


def prepare(
    model: str | Checkpoint = DEFAULT_MODEL,
    *,
    attention: str = "lserve",
    head_pattern: str | Path | None = None,
    dtype: str = "auto",
    weight_dtype: str | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int = 4,
    prefill_chunk: int | None = None,
    steps_per_call: int = 8,
    kv_memory: BytesOrWord = None,
    swap_memory: int = 0,
    prefix_cache: bool = True,
    prefix_windows: int = 0,
    implementation: str | None = None,
    assume_streaming: bool = False,
    recall_interval: int | None = None,
    has_tails: bool = True,
    device: Device | None = None,
    **options: Any,
) -> Setup:
    """Returns the settings of an engine, validated; reads metadata only.

    Args:
      model: see `open_checkpoint`, or an open checkpoint.
      attention: preset name.
      head_pattern: folder with head gates in DuoAttention's format, and optionally settings that suit the model (see
        `lserve_jax.config.heads.load_settings`); None takes the model's own, or the one that ships with the package
        (see `lserve_jax.engine.patterns.find_pattern`).
      dtype: type of activations and of all numbers that are not quantised: "auto", "bfloat16" or "float32".
      weight_dtype: the form of matrices: "auto" keeps what the file has, packed; "bfloat16" and "float32" make numbers;
        "int8" has 8 bits per weight and multiplies integers (W8A8), "int4" has 4 bits per weight. None takes "auto";
        but "int8" on a CPU for a model whose head pattern comes with smoothing factors.
      max_model_len: tokens per sequence; None takes the model's maximum.
      max_num_seqs: sequences that decode together.
      prefill_chunk: prompt tokens per prefill call; None takes a value that suits the device.
      steps_per_call: decode steps per call, after which the host acts.
      kv_memory: memory of the KV cache; here and in the next three, see `lserve_jax.config.sizes.CacheSettings`.
      swap_memory: host memory.
      prefix_cache: whether pages of earlier prompts are kept.
      prefix_windows: boundaries of prompts.
      implementation: the kernels' backend; None or "auto" takes the first that accepts.
      assume_streaming: whether the heads that the settings ask for stream even if there is no pattern: for a plan
        without weights.
      recall_interval: decode steps from one measurement of the recall of page selection to the next, which are then
        also the steps per call; None measures nothing and costs nothing. An interval that is not a multiple of
        ``selector_interval`` measures selections of every age.
      has_tails: whether the last chunk of a prompt of several chunks has smaller programs of its own: prompts that
        begin alike are then read faster, for another compilation or two. Logits are the same up to rounding.
      device: the device to plan for; None takes jax's default device (`lserve_jax.engine.device.this_device`).
      **options: fields of `AttentionConfig` that replace the preset's and the pattern's; None keeps theirs, and
        ``token_budget="all"`` lifts a preset's budget.

    Raises:
      InputError: if a model or setting is invalid, in one line; also if the preset ``streaming``, or a
        ``static_sparsity`` that is named, asks for streaming heads and the model has no pattern.
    """
    named = {"max_model_len": max_model_len, "prefill_chunk": prefill_chunk, "recall_interval": recall_interval}
    _check(implementation, max_num_seqs=max_num_seqs, steps_per_call=steps_per_call, **named)
    cache = CacheSettings(
        kv_memory=kv_memory, swap_memory=swap_memory, prefix_cache=prefix_cache, prefix_windows=prefix_windows
    )
    from_preset(attention, **options)  # reports invalid options before a checkpoint is opened
    device = device or this_device()
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    pattern = find_pattern(checkpoint, head_pattern)
    length = max_model_len or checkpoint.config.max_context
    wanted = from_preset(attention, of_model=pattern.settings if pattern else None, **options)
    policy = wanted.capped(length)
    pattern = pattern if policy.static_sparsity > 0 else None
    config = InferenceConfig(
        model=checkpoint.config,
        attention=policy,
        heads=_head_classes(checkpoint, policy, pattern, _streaming_wish(policy, options), assume_streaming),
        dtype=dtype,
        implementation=None if implementation == "auto" else implementation,
    )
    forms = _forms(checkpoint, config, device, weight_dtype, head_pattern)
    chunk = min(prefill_chunk or _PREFILL_CHUNK.get(device.platform, _GPU_PREFILL_CHUNK), length)
    calls = {"prefill_chunk": chunk, "steps_per_call": min(recall_interval or steps_per_call, length)}
    sizes = Sizes(max_model_len=length, max_num_seqs=max_num_seqs, **calls)
    setup = Setup(
        checkpoint=checkpoint,
        config=config,
        forms=forms,
        plan=plan_memory(
            config, sizes, available_bytes=device.free_bytes, cache=cache, params=checkpoint.abstract(forms)
        ),
        device=device,
        pattern=pattern,
        has_recall=recall_interval is not None,
        has_tails=has_tails,
        has_idle_sparsity=wanted.prefill_sparsity != "none" and not any(kind.prefill.blocks for kind in config.kinds),
    )
    if config.implementation is not None:
        try:  # here, before anything is loaded
            _ = setup.implementations
        except NotImplementedError as error:
            raise InputError(str(error)) from None
    return setup


def _forms(
    checkpoint: Checkpoint,
    config: InferenceConfig,
    device: Device,
    weight_dtype: str | None,
    head_pattern: str | Path | None,
) -> Forms:
    """Returns the form of every parameter; ``weight_dtype`` of None takes a default.

    That is what the file has, except that CPUs multiply integers fastest: they take 8 bits if factors are known that
    keep the accuracy, and if nobody asked for float32.
    """
    suits_integers = device.platform != "gpu" and config.dtype == "bfloat16" and not checkpoint.is_w8a8
    may_be_int8 = weight_dtype == "int8" or (weight_dtype is None and suits_integers)
    smoothing = find_smoothing(checkpoint, head_pattern) if may_be_int8 else None
    default = "int8" if suits_integers and smoothing is not None else "auto"
    return checkpoint.forms(config.dtype, weight_dtype or default, smoothing)


def _check(implementation: str | None, **sizes: int | None) -> None:
    """Raises InputError for what is wrong without a look at any model; sizes that are None are not named."""
    check_sizes(**{name: value for name, value in sizes.items() if value is not None})
    if implementation not in (None, *IMPLEMENTATIONS):
        raise InputError(f"implementation={implementation!r} must be one of {', '.join(IMPLEMENTATIONS)}")


def _streaming_wish(policy: AttentionConfig, options: Mapping[str, Any]) -> str | None:
    """Returns the setting that asks for streaming heads; None if none does, or only by a default."""
    if policy.static_sparsity == 0:
        return None
    if options.get("static_sparsity") is not None:
        return f"static_sparsity={policy.static_sparsity:g}"
    return f"attention={policy.preset}" if policy.preset == "streaming" else None


def _head_classes(
    checkpoint: Checkpoint, policy: AttentionConfig, pattern: HeadPattern | None, wish: str | None, is_plan: bool
) -> HeadClasses | None:
    """Returns the classes of all heads, None if all are retrieval heads; ``wish`` is a setting that asks for others."""
    if pattern is not None:
        return pattern.classify(policy.static_sparsity)
    if wish is None:
        return None
    if not is_plan:
        raise InputError(f"{wish} needs a head pattern, and {checkpoint.name} has none: {_REMEDY}")
    # Which heads stream does not affect a plan: all layers have pools with the same number of pages.
    return classify(np.zeros((checkpoint.config.num_layers, checkpoint.config.num_kv_heads)), policy.static_sparsity)


def _warnings(setup: Setup) -> Iterator[str]:
    name, config, model = setup.checkpoint.name, setup.config, setup.checkpoint.config
    yield from setup.checkpoint.warnings
    if ignored := not_honoured(setup.checkpoint.generation_config, model.max_context):
        yield f"{name}: {GENERATION_FILE} asks for what is not supported and is ignored: {shown_list(ignored)}"
    if config.attention.static_sparsity > 0 and not setup.has_pattern and not setup.has_streaming_heads:
        yield f"no head pattern for {name}: all KV heads are retrieval heads; {_REMEDY}"
    if setup.pattern is not None and setup.pattern.is_guess:
        yield f"head pattern of {name}: {setup.pattern.origin}; if that is another model, {_REMEDY}"
    if setup.sizes.max_model_len > model.max_context:
        yield (
            f"max_model_len={setup.sizes.max_model_len} is beyond the {model.max_context} tokens that this model was "
            "made for: expect nonsense past them"
        )
    if setup.has_idle_sparsity:
        yield (
            f"prefill_sparsity has no effect: before prefill_from={config.attention.prefill_from}, in layers before "
            "prefill_first_layer, in dense_layers and where all heads stream it leaves out nothing, and here "
            f"max_model_len={setup.sizes.max_model_len}"
        )
    if setup.forms.weight_dtype == "int8" and setup.forms.smoothing is None and not setup.checkpoint.is_w8a8:
        yield (
            f"no smoothing factors for {name}: int8 loses more without them; find some with python -m "
            "lserve_jax.calibrate and name its folder with --head-pattern"
        )
    if (warning := overlooked_gpu(setup.device)) is not None:
        yield warning
    if setup.device.platform == "gpu":
        slow = [choice for choice in setup.implementations if choice.implementation == "xla" and choice.refusals]
        if slow:
            yield f"slow on this GPU: {describe(slow, with_ops=True)}"


def default_sampling_params(checkpoint: Checkpoint) -> SamplingParams:
    """Returns the sampling settings in the checkpoint's ``generation_config.json``, greedy if it names none."""
    vocabulary = checkpoint.config.vocab_size
    return recommended_params(checkpoint.generation_config, source=checkpoint.name, vocabulary=vocabulary)
