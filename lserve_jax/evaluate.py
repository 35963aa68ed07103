"""`python -m lserve_jax.evaluate`: compares settings on tasks, perplexity and drift, with confidence intervals.

A variant is PRESET[:field=value[+field=value...]], such as lserve:static_sparsity=0.75+token_budget=25%; the fields are
the attention flags of generate with underscores, and weight_dtype. All variants are compared with the first one.
Every result is written to --out at once; the same command continues an interrupted run.
"""

import argparse
import importlib.util
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from lserve_jax.cli.common import (
    ProgressBars,
    required_tokenizer,
    run_command,
    set_up_logging,
    use_compilation_cache,
)
from lserve_jax.cli.flags import SHARED, add_fields, add_shared, given, local_path, whole
from lserve_jax.cli.parser import OneLineParser
from lserve_jax.cli.streams import to_json_line
from lserve_jax.config.attention import AttentionConfig
from lserve_jax.config.errors import InputError
from lserve_jax.engine.patterns import find_pattern, find_smoothing
from lserve_jax.engine.setup import Setup, prepare
from lserve_jax.evaluation import ablations, plots
from lserve_jax.evaluation.opening import LONGBENCH, NAMES, PromptSettings, measurement_names, open_measurements
from lserve_jax.evaluation.origin import Origin, origin_of
from lserve_jax.evaluation.runner import Plan, make_items, make_loads, missing, run, without_distributions
from lserve_jax.evaluation.store import Store, write_whole
from lserve_jax.evaluation.summary import summarise
from lserve_jax.evaluation.table import format_tables
from lserve_jax.evaluation.variants import Variant, parse_variant, parse_variants
from lserve_jax.llm import LLM
from lserve_jax.text.tokenizer import Tokenizer, tokenizer_source
from lserve_jax.weights.load import Checkpoint, open_checkpoint

logger = logging.getLogger("lserve_jax")

FORMAT = 1
"""Format version of the files in --out."""

_VARIANTS = "dense,lserve:token_budget=25%+kv_dtype=int8"
SETTINGS = (
    *(
        "format",
        "reference",
        "model",
        "tokenizer",
        "dtype",
        "implementation",
        "seed",
        "raw",
        "word_lengths",
        "head_pattern",
        "haystack",
    ),
    *("longbench", "qa", "corpus", "tail", "drift_tokens", "recall_interval"),
)
"""Settings that are the same for all results in a folder; a later call may add variants, tasks, lengths and samples.

Where results keep the digest of what a setting names (`lserve_jax.evaluation.origin`), the digests must be the same.
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all flags."""
    parser = OneLineParser(
        prog="python -m lserve_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_comparison(parser.add_argument_group("what to measure"))
    model = parser.add_argument_group("model")
    add_shared(model, "--model", "--tokenizer", "--dtype")
    for flag in ("--weight-dtype", "--head-pattern"):
        add_shared(model, flag, help=f"of variants that name none: {SHARED[flag]['help']}")
    add_shared(model, "--implementation")
    add_shared(model, "--max-num-seqs/--batch", default=4)
    add_fields(parser.add_argument_group("prompts"), PromptSettings)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=local_path, required=True, metavar="DIR", help="results; a run there is continued"
    )
    add_shared(output, "--recall-interval")
    output.add_argument("--json", action="store_true", help="print the summary as JSON, one cell per line")
    add_shared(output, "--quiet")
    return parser


def _add_comparison(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tasks",
        default="niah_single_1,niah_single_2,vt_direct,copy,perplexity",
        metavar="NAME,NAME",
        help=f"of {', '.join(NAMES)}, {LONGBENCH}NAME (default: %(default)s)",
    )
    group.add_argument("--lengths", default="1024,2048", metavar="N,N", help="tokens per prompt (default: %(default)s)")
    group.add_argument("--samples", **whole(20, "prompts per task and length"))
    default = _VARIANTS.replace("%", "%%")
    group.add_argument(
        "--variants",
        metavar="VARIANT,VARIANT",
        help=f"the settings to compare, the reference first (default: {default}; with --ablation: dense)",
    )
    group.add_argument(
        "--ablation",
        nargs="?",
        const=",".join(ablations.AXES),
        metavar="AXIS,AXIS",
        help=f"change one field of --base at a time: {', '.join(ablations.AXES)} (without AXIS: all of these); "
        f"or {ablations.DENSE_LAYER}: each layer in turn reads all pages (default: no ablation)",
    )
    group.add_argument(
        "--base", default=ablations.BASE, metavar="VARIANT", help="variant of the ablation (default: %(default)s)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 2 after one line on stderr that says what to change; 130 if stopped."""
    return run_command(lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    try:
        _evaluate(args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped: what was done is in {args.out}, and the same command goes on from there"
        ) from None


def _evaluate(args: argparse.Namespace) -> None:
    set_up_logging(is_quiet=args.quiet, is_once=True)
    for name in ("samples", "max_num_seqs"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    prompts = PromptSettings(**given(args, PromptSettings))
    lengths, names = _lengths(args.lengths), measurement_names(args.tasks)
    named = _variants(args)
    checkpoint = open_checkpoint(args.model).kept()
    forms = {"weight_dtype": args.weight_dtype, "head_pattern": args.head_pattern}
    setup = _prepare(args, checkpoint, attention="dense", **forms)
    assert setup.forms.weight_dtype is not None
    axes, variants = _suited(args, checkpoint, named, setup.forms.weight_dtype)
    for variant in variants:
        for length in lengths:
            variant.config(length)
    reference = variants[0].label
    context = checkpoint.config.max_context
    if max(lengths) > context:
        raise InputError(f"--lengths: {max(lengths)} is beyond the {context} tokens of the model's context")
    tokenizer = required_tokenizer(checkpoint, args.tokenizer)
    values = {"format": FORMAT, "reference": reference} | vars(args) | asdict(prompts)
    store = Store(args.out, {name: values[name] for name in SETTINGS}, _origin(args, checkpoint))
    measurements = open_measurements(names, prompts, tokenizer, context)
    plan = Plan(measurements=measurements, lengths=lengths, samples=args.samples, variants=variants, context=context)
    for line in (*store.notes, *plan.shortages()):
        logger.warning(line)
    with ProgressBars(is_shown=not args.quiet) as bars:
        _measure(args, plan, store, checkpoint, tokenizer, bars)
    _report(args, store, reference, axes)


def _origin(args: argparse.Namespace, checkpoint: Checkpoint) -> Origin:
    source = tokenizer_source(checkpoint.tokenizer_source, args.tokenizer)
    named = args.head_pattern
    return origin_of(checkpoint, source, find_pattern(checkpoint, named), find_smoothing(checkpoint, named))


def _measure(
    args: argparse.Namespace,
    plan: Plan,
    store: Store,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    bars: ProgressBars,
) -> None:
    """Adds the missing results to the store; raises the user's errors before anything is loaded or written."""

    def open_setup(variant: Variant, config: AttentionConfig, max_model_len: int) -> Setup:
        settings = {"head_pattern": variant.head_pattern or args.head_pattern, "max_model_len": max_model_len}
        return _prepare(args, checkpoint, **settings, **variant.arguments(config))

    progress = _Progress(bars)
    todo = missing(plan, store.rows)
    if not todo:
        return
    items = make_items(todo, progress.report)
    loads = make_loads(plan, todo, items, open_setup, progress.report)
    use_compilation_cache()
    reference = plan.variants[0].label
    if count := without_distributions(todo, items, store, reference):
        logger.warning(
            f"no kl and same_token for {count} of {len(todo)} prompts: {args.out} lacks the reference's distributions, "
            "which earlier versions did not keep; to have them, name a new --out"
        )
    try:
        store.start(item.line for item in items.values())
        run(
            loads,
            store,
            reference=reference,
            max_num_seqs=args.max_num_seqs,
            open_llm=lambda setup: LLM.from_setup(setup, tokenizer=tokenizer, on_progress=progress.report_model),
            report=progress.report,
        )
    finally:
        store.close()


class _Progress:
    """One bar for all prompts of a model; the model's loading and compiling interrupt it."""

    def __init__(self, bars: ProgressBars) -> None:
        self._bars = bars
        self._newest = ("", 0, 1)

    def report(self, stage: str, done: int, total: int) -> None:
        self._newest = (stage, done, total)
        self._bars.report(stage, done, total)

    def report_model(self, stage: str, done: int, total: int) -> None:
        """Shows a stage of the model, or the bar of all prompts during the prefill of a prompt."""
        self._bars.report(*(self._newest if stage == "prefill" else (stage, done, total)))


def _prepare(args: argparse.Namespace, checkpoint: Checkpoint, **settings: Any) -> Setup:
    return prepare(
        checkpoint,
        dtype=args.dtype,
        implementation=args.implementation,
        max_num_seqs=args.max_num_seqs,
        recall_interval=args.recall_interval,
        **settings,
    )


def _lengths(text: str) -> list[int]:
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        lengths = [0]
    if lengths[0] < 1:
        raise InputError(f"--lengths {text!r} must be whole numbers from 1 with commas between, such as 1024,2048")
    return lengths


def _variants(args: argparse.Namespace) -> list[Variant]:
    """Returns the variants to compare, the reference first, and the base of the ablation last."""
    named = args.variants or ("dense" if args.ablation else _VARIANTS)
    return [*parse_variants(named), parse_variant(args.base)]


def _suited(
    args: argparse.Namespace, checkpoint: Checkpoint, named: Sequence[Variant], weight_dtype: str
) -> tuple[list[ablations.Setting], list[Variant]]:
    """Returns the settings of the ablation, and all variants, with the defaults of the model and the run filled in."""

    def suited(variant: Variant) -> Variant:
        pattern = find_pattern(checkpoint, variant.head_pattern or args.head_pattern)
        return replace(variant, pattern=pattern, weight_dtype=variant.weight_dtype or weight_dtype)

    *compared, base = map(suited, named)
    axes = args.ablation.split(",") if args.ablation else []
    settings = ablations.settings(base, axes, checkpoint.config.num_layers)
    return settings, list({one.label: one for one in (*compared, *(one.variant for one in settings))}.values())


def _report(args: argparse.Namespace, store: Store, reference: str, axes: Sequence[ablations.Setting]) -> None:
    """Prints the summary of all results in the folder, and writes it there with pictures."""
    rows = list(store.rows.values())
    cells = summarise(rows, reference)
    by_axis = ablations.by_axis(axes, cells)
    summary = {
        "settings": store.settings,
        "measured_on": store.origin,
        "cells": cells,
        "ablation": [setting.as_json() for setting in axes],
    }
    write_whole(args.out / "summary.json", json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    if args.json:
        print("\n".join(to_json_line(cell) for cell in cells))
    elif axes:
        print("\n\n".join(f"{axis}\n{format_tables(members)}" for axis, members in by_axis.items()))
    else:
        print(format_tables(cells))
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no pictures: they need matplotlib: pip install 'lserve_jax[eval]'")
        return
    pictures = [plots.draw_axis(axis, members, args.out) for axis, members in by_axis.items()] if axes else []
    pictures = pictures or plots.draw(cells, rows, args.out)
    if not args.quiet:
        print("wrote " + ", ".join(str(path) for path in (args.out / "summary.json", *pictures)), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
