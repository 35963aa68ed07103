"""`python -m lserve_jax.evaluate`: settings side by side on tasks, perplexity and drift, with confidence intervals.

A variant is PRESET[:field=value[+field=value...]], such as lserve:static_sparsity=0.75+token_budget=25%; the first one
is what the others are compared with. Results go to --out as they come; the same command goes on where it was stopped.
"""

import argparse
import importlib.util
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lserve_jax.cli.common import OneLineParser, ProgressBars, run_command, use_compilation_cache
from lserve_jax.config.attention import AttentionConfig
from lserve_jax.config.inference import DTYPES
from lserve_jax.engine.setup import DEFAULT_MODEL, IMPLEMENTATIONS, Setup, model_settings, prepare
from lserve_jax.evaluation import ablations, drift, longbench, perplexity, plots
from lserve_jax.evaluation.answers import Answers
from lserve_jax.evaluation.corpus import Windows, python_reference, read_texts
from lserve_jax.evaluation.haystack import PROSE, open_haystack
from lserve_jax.evaluation.measurement import Measurement
from lserve_jax.evaluation.rendering import chat_render, raw_render
from lserve_jax.evaluation.runner import Plan, make_items, make_loads, missing, run
from lserve_jax.evaluation.store import Store, write_whole
from lserve_jax.evaluation.summary import summarise
from lserve_jax.evaluation.table import format_tables
from lserve_jax.evaluation.tasks import TASKS, get_task
from lserve_jax.evaluation.variants import Variant, parse_variant, parse_variants
from lserve_jax.llm import LLM
from lserve_jax.text.tokenizer import Tokenizer, open_tokenizer
from lserve_jax.weights.load import Checkpoint

logger = logging.getLogger("lserve_jax")

FORMAT = 1
"""Of the files in --out."""

_LONGBENCH = "longbench:"
_VARIANTS = "dense,lserve:token_budget=25%+kv_dtype=int8"
_SETTINGS = (
    *("model", "tokenizer", "dtype", "implementation", "seed", "raw", "word_lengths", "head_pattern", "haystack"),
    *("longbench", "qa", "corpus", "tail", "drift_tokens", "recall_interval"),
)
"""What all results in a folder must have in common; variants, tasks, lengths and samples may be added later."""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all flags."""
    parser = OneLineParser(
        prog="python -m lserve_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--tasks",
        default="niah_single_1,niah_single_2,vt_direct,copy,perplexity",
        help=f"of {', '.join(TASKS)}, {perplexity.NAME}, {drift.NAME}, {_LONGBENCH}NAME (%(default)s)",
    )
    what.add_argument("--lengths", default="1024,2048", help="tokens of a prompt (%(default)s)")
    what.add_argument("--samples", type=int, default=20, help="of each task and length (%(default)s)")
    what.add_argument("--variants", help=f"with commas between ({_VARIANTS.replace('%', '%%')})")
    what.add_argument(
        "--ablation",
        nargs="?",
        const=",".join(ablations.AXES),
        metavar="AXIS,AXIS",
        help=f"one field at a time away from --base: {', '.join(ablations.AXES)} (all of these); "
        f"or {ablations.DENSE_LAYER}: each layer in turn reads everything",
    )
    what.add_argument("--base", default=ablations.BASE, help="variant of the ablation (%(default)s)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", default=DEFAULT_MODEL, help="folder, .gguf file, hub id or name (%(default)s)")
    model.add_argument("--tokenizer", help="folder or .gguf file to take the tokenizer from instead")
    model.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of weights and activations")
    model.add_argument("--head-pattern", metavar="DIR", help="head gates for variants that name none")
    model.add_argument("--implementation", choices=IMPLEMENTATIONS, default="auto", help="kernels (%(default)s)")
    model.add_argument("--batch", type=int, default=4, help="prompts that are worked on together (%(default)s)")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--seed", type=int, default=0, help="prompts are a function of it (%(default)s)")
    prompts.add_argument("--raw", action="store_true", help="without the model's chat format")
    prompts.add_argument("--word-lengths", action="store_true", help="--lengths count words (tasks of RULER's kind)")
    prompts.add_argument("--haystack", default=PROSE, metavar="DIR", help="texts to hide needles in (prose of our own)")
    prompts.add_argument("--longbench", metavar="DIR", help="folder of LongBench's *.jsonl (else from the hub)")
    prompts.add_argument("--qa", metavar="DIR", help="squad.json and hotpotqa.json for qa_1 and qa_2 (else invented)")
    prompts.add_argument("--corpus", metavar="PATH", help="text for perplexity and drift (Python's language reference)")
    prompts.add_argument("--tail", type=int, default=128, help="perplexity: last tokens, decoded (%(default)s)")
    prompts.add_argument("--drift-tokens", type=int, default=1024, help="drift: tokens to generate (%(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, required=True, metavar="DIR", help="results; a run there is continued")
    output.add_argument("--recall-interval", type=int, help="measure page selection's recall at every so many steps")
    output.add_argument("--json", action="store_true", help="the summary as JSON, a line a cell")
    output.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line on stderr that says what to change; 130 (an exit) if stopped."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: _resumable(args))


def _resumable(args: argparse.Namespace) -> None:
    try:
        _evaluate(args)
    except KeyboardInterrupt:
        print(f"stopped: what was done is in {args.out}, and the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None


class _Once(logging.Filter):
    """Lets a message through once: many models are loaded that have the same to say."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        is_new = record.getMessage() not in self._seen
        self._seen.add(record.getMessage())
        return is_new


def _evaluate(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.ERROR if args.quiet else logging.WARNING, format="%(message)s", force=True)
    logging.root.handlers[0].addFilter(_Once())
    _check_numbers(args)
    lengths, names = _lengths(args.lengths), _task_names(args.tasks)
    named = _variants(args)
    opened = _prepare(args, "dense")
    axes, variants = _suited(args, opened.checkpoint, named)
    for variant in variants:
        for length in lengths:
            variant.config(length)
    common = {"format": FORMAT, "reference": variants[0].label, **{name: getattr(args, name) for name in _SETTINGS}}
    store = Store(args.out, common)
    context = opened.checkpoint.config.max_context
    if max(lengths) > context:
        raise ValueError(f"--lengths: {max(lengths)} is beyond the {context} tokens of the model's context")
    tokenizer = open_tokenizer(opened.checkpoint.tokenizer_source, args.tokenizer)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer: give one with --tokenizer")
    measurements = _measurements(args, names, tokenizer, context)
    plan = Plan(measurements=measurements, lengths=lengths, samples=args.samples, variants=variants, context=context)
    for line in (*store.notes, *plan.shortages()):
        logger.warning(line)
    with ProgressBars(is_shown=not args.quiet) as bars:
        _measure(args, plan, store, tokenizer, bars)
    _report(args, store, variants[0].label, axes)


def _measure(args: argparse.Namespace, plan: Plan, store: Store, tokenizer: Tokenizer, bars: ProgressBars) -> None:
    """Adds to the store what it lacks. All that can be wrong is found before anything is loaded or written."""

    def open_setup(variant: Variant, config: AttentionConfig, max_model_len: int) -> Setup:
        options = {name: value for name, value in vars(config).items() if name != "preset"}
        pattern = variant.head_pattern or args.head_pattern
        return _prepare(args, config.preset, head_pattern=pattern, max_model_len=max_model_len, **options)

    progress = _Progress(bars)
    todo = missing(plan, store.rows)
    if not todo:
        return
    items = make_items(todo, progress.report)
    loads = make_loads(plan, todo, items, open_setup, progress.report)
    use_compilation_cache()
    reference = plan.variants[0].label
    try:
        store.start(item.line for item in items.values())
        run(
            loads,
            store,
            reference=reference,
            batch=args.batch,
            open_llm=lambda setup: LLM.from_setup(setup, tokenizer=tokenizer, on_progress=progress.report_model),
            report=progress.report,
        )
    finally:
        store.close()


class _Progress:
    """One bar for all prompts of a model, between what the model says of loading and compiling."""

    def __init__(self, bars: ProgressBars) -> None:
        self._bars = bars
        self._newest = ("", 0, 1)

    def report(self, stage: str, done: int, total: int) -> None:
        self._newest = (stage, done, total)
        self._bars.report(stage, done, total)

    def report_model(self, stage: str, done: int, total: int) -> None:
        """Shows what a model is at; while that is a prompt, the bar of all of them."""
        self._bars.report(*(self._newest if stage == "prefill" else (stage, done, total)))


def _prepare(args: argparse.Namespace, attention: str, **settings: Any) -> Setup:
    return prepare(
        args.model,
        attention=attention,
        dtype=args.dtype,
        implementation=args.implementation,
        max_num_seqs=args.batch,
        recall_interval=args.recall_interval,
        **settings,
    )


# --- what the flags say ----------------------------------------------------------------------------------------------


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("samples", "batch", "tail", "drift_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")


def _lengths(text: str) -> list[int]:
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        lengths = [0]
    if lengths[0] < 1:
        raise ValueError(f"--lengths {text!r} must be whole numbers from 1 with commas between, such as 1024,2048")
    return lengths


def _task_names(text: str) -> list[str]:
    """Returns the names of tasks, each once; ValueError for one that is not known."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    known = (*TASKS, perplexity.NAME, drift.NAME)
    for name in names:
        if name.startswith(_LONGBENCH) and name.removeprefix(_LONGBENCH) not in longbench.NAMES:
            raise ValueError(f"--tasks: {name!r} must be {_LONGBENCH} with one of {', '.join(longbench.NAMES)}")
        if not name.startswith(_LONGBENCH) and name not in known:
            raise ValueError(f"--tasks: {name!r} must be one of {', '.join(known)} or {_LONGBENCH}NAME")
    return names


def _variants(args: argparse.Namespace) -> list[Variant]:
    """Returns what is compared, the reference first, and the base of an ablation last."""
    named = args.variants or ("dense" if args.ablation else _VARIANTS)
    return [*parse_variants(named), parse_variant(args.base)]


def _suited(
    args: argparse.Namespace, checkpoint: Checkpoint, named: Sequence[Variant]
) -> tuple[list[ablations.Setting], list[Variant]]:
    """Returns the settings of an ablation and all variants, with what suits the model as defaults."""

    def suited(variant: Variant) -> Variant:
        return replace(variant, of_model=model_settings(checkpoint, variant.head_pattern or args.head_pattern))

    *compared, base = map(suited, named)
    axes = args.ablation.split(",") if args.ablation else []
    settings = ablations.settings(base, axes, checkpoint.config.num_layers)
    return settings, list({one.label: one for one in (*compared, *(one.variant for one in settings))}.values())


def _measurements(
    args: argparse.Namespace, names: Sequence[str], tokenizer: Tokenizer, context: int
) -> list[Measurement]:
    """Returns what is named, opened: its texts and files read."""
    windows = Windows(python_reference() if args.corpus is None else read_texts(args.corpus), tokenizer, args.seed)
    haystack = open_haystack(args.haystack)
    qa_folder = Path(args.qa) if args.qa else None

    def answers(task: Any, *, is_raw: bool, **fields: Any) -> Answers:
        render = raw_render(tokenizer) if is_raw or not tokenizer.has_chat_template else chat_render(tokenizer)
        common = {"tokenizer": tokenizer, "context": context, "seed": args.seed, "haystack": haystack}
        return Answers(task=task, render=render, **common, **fields)

    found: list[Measurement] = []
    for name in names:
        if name == perplexity.NAME:
            found.append(perplexity.Perplexity(windows=windows, context=context, tail=args.tail))
        elif name == drift.NAME:
            found.append(drift.Drift(windows=windows, context=context, tokens=args.drift_tokens))
        elif name.startswith(_LONGBENCH):
            task = longbench.open_task(name.removeprefix(_LONGBENCH), args.longbench, tokenizer)
            is_raw = args.raw or not task.use_chat_format
            found.append(answers(task, name=name, is_raw=is_raw, samples=len(task)))
        else:
            found.append(
                answers(get_task(name, qa_folder), name=name, is_raw=args.raw, has_word_lengths=args.word_lengths)
            )
    return found


# --- what came of it -------------------------------------------------------------------------------------------------


def _report(args: argparse.Namespace, store: Store, reference: str, axes: Sequence[ablations.Setting]) -> None:
    """Prints the summary of all results in the folder, and writes it there with its pictures."""
    rows = list(store.rows.values())
    cells = summarise(rows, reference)
    by_axis = ablations.by_axis(axes, cells)
    summary = {"settings": store.settings, "cells": cells, "ablation": [asdict(setting) for setting in axes]}
    write_whole(args.out / "summary.json", json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    if args.json:
        print("\n".join(json.dumps(cell, ensure_ascii=False) for cell in cells))
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
