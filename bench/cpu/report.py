"""What `bench.cpu` measured, as tables: `python -m bench.cpu.report DIR` reads DIR/results.jsonl.

  targets.txt    the targets for the CPU (design/targets.md), a column a setting of ours; then all speeds
  medians.jsonl  median, quartiles and number of samples of everything that was measured

Only results of the newest sources in the file count: ratios are of medians of one run.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.measure import read_lines

type Line = dict[str, Any]

FIELDS = (
    "prefill_tok_per_s",
    "ms_per_token",
    "first_token_s",
    "answer_s",
    "compile_s",
    "peak_bytes",
    "plan_ratio",
    "num_compilations",
    "grown",
)
TRANSFORMERS, LLAMA_CPP = ("transformers bf16",), ("llama.cpp F16", "llama.cpp F16 flash")


class Point(NamedTuple):
    """What a number is of."""

    part: str
    system: str
    length: int
    batch: int
    cache: str
    field: str


class Spread(NamedTuple):
    """Median and quartiles of so many samples."""

    median: float
    low: float
    high: float
    samples: int


type Medians = Mapping[Point, Spread]


def samples(lines: Iterable[Line]) -> list[Line]:
    """Returns the measurements of the newest sources."""
    found = [line for line in lines if line["kind"] == "sample"]
    return [line for line in found if line["sources"] == found[-1]["sources"]]


def medians(lines: Iterable[Line]) -> dict[Point, Spread]:
    """Returns the median and spread of every number in the measurements."""
    values: dict[Point, list[float]] = {}
    for line in samples(lines):
        if (ratio := plan_ratio(line)) is not None:
            line = {**line, "plan_ratio": ratio}  # noqa: PLW2901
        for field in FIELDS:
            if line.get(field) is not None:
                point = Point(line["part"], line["system"], line["length"], line["batch"], line["cache"], field)
                values.setdefault(point, []).append(line[field])
    return {point: spread(found) for point, found in values.items()}


def spread(found: Sequence[float]) -> Spread:
    """Returns the median and the quartiles of samples."""
    low, median, high = (float(share) for share in np.percentile(found, [25, 50, 75]))
    return Spread(median, low, high, len(found))


def plan_ratio(line: Line) -> float | None:
    """Returns a process's peak memory, less what it had before it loaded anything, over what the plan says."""
    facts = line.get("facts", {})
    if "plan_bytes" not in facts or line["part"] not in ("memory", "long"):
        return None
    return (line["peak_bytes"] - facts["base_bytes"]) / facts["plan_bytes"]


# --- targets ----------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A row: its text, the number for one of our settings (None where something was not measured), its bound."""

    text: str
    value: Callable[[Medians, str], float | None]
    bound: float
    is_least: bool


def speed(part: str, field: str, length: int, over: Sequence[str]) -> Callable[[Medians, str], float | None]:
    """Returns how many times faster one of ours is than the fastest of others, one sequence of that length."""

    def ratio(numbers: Medians, ours: str) -> float | None:
        def at(system: str) -> float | None:
            found = numbers.get(Point(part, system, length, 1, "warm", field))
            return None if found is None else found.median if field == "prefill_tok_per_s" else 1 / found.median

        mine, theirs = at(ours), [other for name in over if (other := at(name)) is not None]
        return mine / max(theirs) if mine is not None and theirs else None

    return ratio


def growth(part: str, field: str, short: int, long: int) -> Callable[[Medians, str], float | None]:
    """Returns a number at one length over that at a shorter one."""

    def ratio(numbers: Medians, ours: str) -> float | None:
        found = [numbers.get(Point(part, ours, length, 1, "warm", field)) for length in (long, short)]
        return found[0].median / found[1].median if found[0] and found[1] else None

    return ratio


def worst(part: str, field: str, cache: str = "warm") -> Callable[[Medians, str], float | None]:
    """Returns the largest median of a field over all lengths."""

    def value(numbers: Medians, ours: str) -> float | None:
        wanted = (part, ours, cache, field)
        found = [
            number.median
            for point, number in numbers.items()
            if (point.part, point.system, point.cache, point.field) == wanted
        ]
        return max(found, default=None)

    return value


K = 1024
_PREFILL, _DECODE = "prefill_tok_per_s", "ms_per_token"
TARGETS = (
    Target("prefill 2K over transformers bf16", speed("single", _PREFILL, 2 * K, TRANSFORMERS), 1.0, True),
    Target("prefill 8K over transformers bf16", speed("single", _PREFILL, 8 * K, TRANSFORMERS), 1.5, True),
    Target("decode 2K over llama.cpp F16", speed("single", _DECODE, 2 * K, LLAMA_CPP), 1.0, True),
    Target("decode 8K over llama.cpp F16", speed("single", _DECODE, 8 * K, LLAMA_CPP), 1.5, True),
    Target("decode ms, 8K over 1K", growth("single", _DECODE, K, 8 * K), 1.3, False),
    Target("decode 8K over our dense", speed("single", _DECODE, 8 * K, ("dense",)), 1.6, True),
    Target("prefill 8K over our dense", speed("single", _PREFILL, 8 * K, ("dense",)), 1.3, True),
    Target("first answer of a process, nothing compiled, s", worst("start", "answer_s", "cold"), 20.0, False),
    Target("first token of a process, warm, s", worst("start", "first_token_s"), 3.0, False),
    Target("compilations that other prompts add", worst("programs", "grown"), 0.0, False),
    Target("decode ms, 128K over 8K", growth("long", _DECODE, 8 * K, 128 * K), 1.3, False),
    Target("peak memory over the plan, largest", worst("long", "plan_ratio"), 1.05, False),
)
"""Rows of design/targets.md and of what is asked of compilation and of long contexts; llama.cpp: its faster setting."""


def verdict(target: Target, value: float | None) -> str:
    """Returns PASS, or by how much a target is missed."""
    if value is None:
        return "not measured"
    if value >= target.bound if target.is_least else value <= target.bound:
        return f"{value:.2f} PASS"
    away = abs(value - target.bound) / (target.bound or 1.0)
    return f"{value:.2f} {'short' if target.is_least else 'over'} by {away:.0%}"


def targets_table(numbers: Medians) -> str:
    """Returns the targets, with a column for each of our sparse settings that was measured."""
    columns = [name for name in dict.fromkeys(point.system for point in numbers) if name.startswith("lserve")]
    rows = [
        [target.text, f"{'≥' if target.is_least else '≤'} {target.bound:g}"]
        + [verdict(target, target.value(numbers, name)) for name in columns]
        for target in TARGETS
    ]
    return text_table([["target", "", *columns], *rows])


# --- speeds -----------------------------------------------------------------------------------------------------------


def spread_table(numbers: Medians, part: str, field: str, batch: int, form: Callable[[float], str]) -> str:
    """Returns a field by system and length, median and quartiles; empty if it was not measured."""
    found = {
        (point.system, point.length, point.cache): number
        for point, number in numbers.items()
        if (point.part, point.field, point.batch) == (part, field, batch)
    }
    caches = sorted({cache for *_, cache in found})
    columns = sorted({(length, cache) for _, length, cache in found})
    rows = [["", *(length_name(n) + (f" {cache}" if len(caches) > 1 else "") for n, cache in columns)]]
    for system in dict.fromkeys(system for system, *_ in found):
        rows.append([system, *(_shown(found.get((system, *column)), form) for column in columns)])
    return text_table(rows) if found else ""


def _shown(number: Spread | None, form: Callable[[float], str]) -> str:
    if number is None:
        return "–"
    return form(number.median) + (f" ({form(number.low)}–{form(number.high)})" if number.samples > 1 else "")


def length_name(tokens: int) -> str:
    """Returns 8192 as 8K."""
    return f"{tokens // K}K" if tokens % K == 0 else str(tokens)


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of cells as lines of text; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0].ljust(sum(widths))), *lines[1:]])


TABLES: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("prefill, tokens/s", "single", _PREFILL, "{:.0f}".format),
    ("decode, ms/step", "single", _DECODE, "{:.1f}".format),
    ("decode, ms/step", "batch", _DECODE, "{:.1f}".format),
    ("first token of a process, s", "start", "first_token_s", "{:.2f}".format),
    ("first answer of a process, s", "start", "answer_s", "{:.2f}".format),
    ("compile, s", "start", "compile_s", "{:.2f}".format),
    ("programs compiled by a process, XLA's small ones too", "programs", "num_compilations", "{:.0f}".format),
    ("peak memory of a process, GiB", "memory", "peak_bytes", lambda size: f"{size / 2**30:.2f}"),
    ("prefill, tokens/s", "long", _PREFILL, "{:.0f}".format),
    ("decode, ms/step", "long", _DECODE, "{:.1f}".format),
    ("peak memory of a process, GiB", "long", "peak_bytes", lambda size: f"{size / 2**30:.2f}"),
    ("peak memory over the plan", "long", "plan_ratio", "{:.3f}".format),
)


def report(lines: Sequence[Line]) -> str:
    """Returns all tables as text."""
    numbers, found = medians(lines), samples(lines)
    batches = {part: sorted({point.batch for point in numbers if point.part == part}) for _, part, *_ in TABLES}
    parts = ["Targets", targets_table(numbers)]
    for title, part, field, form in TABLES:
        for batch in batches[part]:
            if table := spread_table(numbers, part, field, batch, form):
                parts += [f"\n{title} (part {part}, batch {batch}; median, quartiles)", table]
    missing = {line["system"]: line["reason"] for line in lines if line["kind"] == "missing"}
    parts += ["", *(f"missing: {name}: {reason}" for name, reason in missing.items())]
    errors = [line for line in lines if line["kind"] == "error" and line["sources"] == found[-1]["sources"]]
    parts += [f"failed: {line['part']} {line['system']} {line['length']}: {line['reason']}" for line in errors]
    parts += [agreement(found)] if agreement(found) else []
    last = found[-1]
    parts.append(
        f"{last['model']}, {last['threads']} threads, jax {last['jax']}, commit {last['commit']}, {last['date']}"
    )
    return "\n".join(parts) + "\n"


def agreement(found: Sequence[Line]) -> str:
    """Returns how often systems' first greedy tokens are those of float32: whether all run the same model."""
    tokens = {
        (line["system"], line["length"]): line["tokens"][0]
        for line in found
        if line["part"] == "single" and line.get("tokens")
    }
    reference = {length: token for (system, length), token in tokens.items() if system == "transformers f32"}
    if not reference:
        return ""
    shares = []
    for name in dict.fromkeys(system for system, _ in tokens):
        same = [token == reference[n] for (system, n), token in tokens.items() if system == name and n in reference]
        shares.append(f"{name} {sum(same)}/{len(same)}")
    return "first token as transformers f32: " + ", ".join(shares)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes and prints the tables; 1 if there is nothing to show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where bench.cpu wrote results.jsonl")
    folder = parser.parse_args(arguments).folder
    lines = read_lines(folder / "results.jsonl")
    if not samples(lines):
        print(f"{folder} holds no measurements")
        return 1
    numbers = [{**point._asdict(), **number._asdict()} for point, number in medians(lines).items()]
    text = report(lines)
    _write(folder / "medians.jsonl", "".join(json.dumps(line) + "\n" for line in numbers))
    _write(folder / "targets.txt", text)
    print(text)
    return 0


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
