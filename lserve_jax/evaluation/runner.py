"""The run: measures every prompt with every variant, skips existing results, and stores each result before the next."""

import ctypes
import dataclasses
import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched, groupby
from typing import Any

import jax

from lserve_jax.config.attention import AttentionConfig
from lserve_jax.config.errors import InputError
from lserve_jax.engine.setup import Setup
from lserve_jax.evaluation.measurement import Item, Measurement
from lserve_jax.evaluation.reference import StoredReference, has_distributions
from lserve_jax.evaluation.store import Key, PromptKey, Store
from lserve_jax.evaluation.variants import Variant
from lserve_jax.llm import LLM

_STEP = 256
"""Contexts are multiples of this many tokens, so that slightly different runs compile the same programs."""

LOGITS_BYTES = 256 * 2**20
"""The most bytes of logits that the prompts of a batch may have together; one prompt alone may have more."""

type OnProgress = Callable[[str, int, int], None]
"""Stage, done, total."""
type Todo = Mapping[PromptKey, tuple[Measurement, list[Variant]]]
"""The prompts without results of some variants, with these variants."""
type OpenSetup = Callable[[Variant, AttentionConfig, int], Setup]
"""Variant, its policy, and the context in tokens → an opened model that is not loaded."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run measures.

    Attributes:
      measurements: the measurements in the order of the results.
      lengths: lengths of prompts in tokens (or words, as the measurements define).
      samples: prompts per measurement and length, or all if there are fewer.
      variants: the variants, the reference first.
      context: tokens of the model's context.
    """

    measurements: Sequence[Measurement]
    lengths: Sequence[int]
    samples: int
    variants: Sequence[Variant]
    context: int

    def prompts(self) -> Iterator[tuple[Measurement, PromptKey]]:
        """Yields every prompt, by length, measurement and index."""
        for length in self.lengths:
            for measurement in self.measurements:
                count = measurement.count(length)
                for index in range(self.samples if count is None else min(count, self.samples)):
                    yield measurement, (measurement.name, length, index)

    def shortages(self) -> list[str]:
        """Returns a line for each cell that has fewer samples than asked for.

        Raises:
          InputError: if a cell has none.
        """
        lines = []
        for length in self.lengths:
            for measurement in self.measurements:
                count = measurement.count(length)
                if count == 0:
                    raise InputError(f"{measurement.name} at length {length} has no samples: its text is too short")
                if count is not None and count < self.samples:
                    lines.append(f"{measurement.name} at length {length} has {count} samples, {self.samples} asked for")
        return lines


@dataclass(frozen=True, kw_only=True)
class Load:
    """The work of one loaded model: a variant, and the prompts for which its settings are the same.

    Attributes:
      variant: the variant.
      setup: the opened model, with room for the longest of these prompts and what follows it.
      items: the prompts, each with its measurement.
    """

    variant: Variant
    setup: Setup
    items: Sequence[tuple[Measurement, Item]]


def missing(plan: Plan, rows: Mapping[Key, Any]) -> Todo:
    """Returns the prompts without results of some variants, with these variants.

    Raises:
      InputError: if a result was made with other settings than its variant now has.
    """
    found = {}
    for measurement, key in plan.prompts():
        for variant in plan.variants:
            _require_same_settings(variant, key[1], rows.get((*key, variant.label)))
        variants = [variant for variant in plan.variants if (*key, variant.label) not in rows]
        if variants:
            found[key] = measurement, variants
    return found


def _require_same_settings(variant: Variant, length: int, row: Any) -> None:
    if row is None:
        return
    heads = variant.heads(length)
    if "heads" in row and row["heads"] != (None if heads is None else heads.digest):
        raise InputError(
            f"variant {variant.label!r} was measured with another head pattern: other heads streamed; name a new --out"
        )
    # Earlier versions had numbers alone, those of the file.
    before = row.get("weight_dtype", "numbers" if variant.weight_dtype in ("int8", "int4") else variant.weight_dtype)
    if before != variant.weight_dtype:
        raise InputError(
            f"variant {variant.label!r} was measured with weight_dtype={before} and now has "
            f"{variant.weight_dtype}: name a new --out, or the same --weight-dtype"
        )
    stored, settings = row["attention"], json.loads(json.dumps(dataclasses.asdict(variant.config(length))))
    changed = [name for name in settings | stored if settings.get(name) != stored.get(name)]
    if changed:
        name = changed[0]
        raise InputError(
            f"variant {variant.label!r} was measured with {name}={stored.get(name)} and now has {settings.get(name)}: "
            "its defaults have changed; name a new --out"
        )


def make_items(todo: Todo, report: OnProgress) -> dict[PromptKey, Item]:
    """Returns the prompts that are needed; raises InputError, before anything is loaded, if one cannot be made."""
    items = {}
    for done, (key, (measurement, _)) in enumerate(todo.items(), start=1):
        _, length, index = key
        items[key] = measurement.make(length, index)
        report("prompts", done, len(todo))
    return items


def make_loads(
    plan: Plan, todo: Todo, items: Mapping[PromptKey, Item], open_setup: OpenSetup, report: OnProgress
) -> list[Load]:
    """Returns the work by variant: one load for all lengths, or one for each at which the variant's settings differ.

    Raises:
      InputError: before anything is loaded, if a model cannot be set up like this or does not fit into the memory.
    """
    loads = []
    for done, variant in enumerate(plan.variants, start=1):
        by_config: dict[AttentionConfig, list[tuple[Measurement, Item]]] = {}
        for key, (measurement, variants) in todo.items():
            if variant in variants:
                by_config.setdefault(variant.config(items[key].length), []).append((measurement, items[key]))
        for config, members in by_config.items():
            longest = max(len(item.prompt) + item.room for _, item in members)
            setup = open_setup(variant, config, min(-(-longest // _STEP) * _STEP, plan.context))
            setup.plan.require_fit()
            loads.append(Load(variant=variant, setup=setup, items=members))
        report("variants", done, len(plan.variants))
    return loads


def without_distributions(todo: Todo, items: Mapping[PromptKey, Item], store: Store, reference: str) -> int:
    """Returns for how many prompts the reference was measured, but not what ``kl`` needs, as in earlier versions."""
    return sum(
        bool(items[key].continuation) and (*key, reference) in store.rows and not has_distributions(store.folder, key)
        for key in todo
    )


def run(
    loads: Sequence[Load],
    store: Store,
    *,
    reference: str,
    max_num_seqs: int,
    open_llm: Callable[[Setup], LLM],
    report: OnProgress,
) -> None:
    """Measures everything and adds it to the store, one row per prompt and variant.

    Args:
      loads: see `make_loads`; those of the reference come first.
      store: a started store.
      reference: label of the variant with which the others are compared.
      max_num_seqs: prompts that are processed together.
      open_llm: loads a model; the previous one is released before.
      report: called with the progress of a load.

    Raises:
      InputError: if a model's results are not numbers.
    """
    for number, load in enumerate(loads, start=1):
        stage = f"{load.variant.label} ({number}/{len(loads)})"
        llm = open_llm(load.setup)

        led_by = StoredReference(store=store, label=reference, is_measured=load.variant.label == reference)
        done = 0
        report(stage, done, len(load.items))
        for measurement, items in _batches(load.items, max_num_seqs, load.setup.config.model.vocab_size):
            begin, compiled = time.perf_counter(), llm.compile_seconds
            try:
                found = measurement.measure(llm, items, led_by)
            except InputError as error:  # such as logits that are not finite
                first = items[0]
                raise InputError(
                    f"variant {load.variant.label!r} on {first.task} at length {first.length}: {error}"
                ) from None
            seconds = time.perf_counter() - begin - (llm.compile_seconds - compiled)
            densities = [llm.prefill_density(tuple(item.prompt.tolist())) for item in items]
            for item, values, density in zip(items, found, densities, strict=True):
                store.append(_row(load, item, {**values, "prefill_density": density}, seconds / len(items)))
            done += len(items)
            report(stage, done, len(load.items))
        del llm
        _release()


def _release() -> None:
    """Releases the memory of the previous model: there may be no room for two models, or for what compilers leave.

    (glibc keeps the gigabyte that compiling a model has taken in the heap of each compiling thread.)
    """
    jax.clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _batches(
    items: Sequence[tuple[Measurement, Item]], size: int, vocabulary: int
) -> Iterator[tuple[Measurement, list[Item]]]:
    """Yields up to ``size`` consecutive items of the same measurement and length, less if their logits are large."""
    for _, members in groupby(items, key=lambda pair: (pair[0].name, pair[1].length)):
        group = list(members)
        logits = 4 * vocabulary * max(len(item.continuation) for _, item in group)
        most = max(1, LOGITS_BYTES // logits) if logits else size
        for pairs in batched(group, min(size, most)):
            yield pairs[0][0], [item for _, item in pairs]


def _row(load: Load, item: Item, values: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    broken = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    if broken:
        raise InputError(
            f"variant {load.variant.label!r} gave no number for {broken[0]} on {item.task} at length {item.length}, "
            f"index {item.index}: the model overflows (try --dtype float32)"
        )
    config = load.setup.config
    assert config.heads is not None
    heads = config.model.num_layers * config.model.num_kv_heads
    return {
        "task": item.task,
        "length": item.length,
        "index": item.index,
        "variant": load.variant.label,
        **values,
        "prompt_tokens": len(item.prompt),
        "heads": config.heads.digest,
        "streaming_share": round(1 - sum(config.num_retrieval) / heads, 6),
        "attention": dataclasses.asdict(config.attention),
        "weight_dtype": load.variant.weight_dtype,
        "weights": load.setup.plan.weight_words,
        "smoothing": None if load.setup.forms.smoothing is None else load.setup.forms.smoothing.digest,
        "seconds": round(seconds, 4),
    }
