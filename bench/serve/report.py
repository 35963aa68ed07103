"""What `bench.serve` measured, as tables: `python -m bench.serve.report DIR` reads DIR/results.jsonl.

  targets.txt  the targets, one column per setting of ours; then the numbers of each workload, medians of the rounds

Only results of the newest sources in the file count.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench.command_line import command_parser
from bench.log import read_lines
from bench.serve.workloads import WORKLOADS
from bench.text import text_table

type Line = dict[str, Any]

OTHERS = "llama.cpp"
"""The peer of the targets; of its settings each row takes the best."""
COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("requests", "requests", "{:.0f}".format),
    ("errors", "errors", "{:.0f}".format),
    ("tok/s", "tok_per_s", "{:.1f}".format),
    ("good tok/s", "good_tok_per_s", "{:.1f}".format),
    ("good", "good_share", "{:.0%}".format),
    ("TTFT p50", "ttft_p50_s", "{:.2f}".format),
    ("p99", "ttft_p99_s", "{:.2f}".format),
    ("first turn p50", "first_turn_ttft_p50_s", "{:.2f}".format),
    ("later p50", "later_turn_ttft_p50_s", "{:.2f}".format),
    ("gap p50 ms", "gap_p50_s", lambda seconds: f"{seconds * 1e3:.1f}"),
    ("p99", "gap_p99_s", lambda seconds: f"{seconds * 1e3:.0f}"),
    ("max", "gap_max_s", lambda seconds: f"{seconds * 1e3:.0f}"),
    ("whole p50", "whole_p50_s", "{:.2f}".format),
    ("cached", "cached_share", "{:.0%}".format),
    ("peak GiB", "peak_bytes", lambda size: f"{size / 2**30:.2f}"),
)


def results(lines: Sequence[Line]) -> list[Line]:
    """Returns the measurements of the newest sources."""
    found = [line for line in lines if line["kind"] in ("run", "baseline")]
    return [line for line in found if line["sources"] == found[-1]["sources"]]


class Numbers:
    """Medians over the rounds, by measurement, system and field."""

    def __init__(self, found: Sequence[Line]) -> None:
        self.systems = {line["system"]: line["library"] for line in found}
        self._lines: dict[tuple[str, str], list[Line]] = {}
        for line in found:
            self._lines.setdefault((line["name"], line["system"]), []).append(line)

    def has(self, name: str, system: str) -> bool:
        """Whether a system has a measurement."""
        return (name, system) in self._lines

    def get(self, name: str, system: str, field: str) -> float | None:
        """Returns the median of a field; None if it was not measured each time."""
        found = [_field(line, field) for line in self._lines.get((name, system), [])]
        return median(found) if found and None not in found else None  # pyright: ignore[reportArgumentType]

    def others(self, name: str, field: str) -> list[float]:
        """Returns a field of all settings of the peer of the targets."""
        found = [self.get(name, system, field) for system, kind in self.systems.items() if kind == OTHERS]
        return [value for value in found if value is not None]


def _field(line: Line, field: str) -> float | None:
    if field == "cached_share":
        cached, prompt = line.get("cached_tokens"), line.get("prompt_tokens")
        return None if cached is None or not prompt else cached / prompt
    return line.get(field)


class Target(NamedTuple):
    """A row: its text, the value for one of our settings (None if something was not measured), and its bound."""

    text: str
    value: Callable[[Numbers, str], float | None]
    bound: float
    is_least: bool = True


def _over_generate(numbers: Numbers, ours: str) -> float | None:
    return _ratio(numbers.get("short", ours, "tok_per_s"), numbers.get("generate", ours, "tok_per_s"))


def _gap_over_chunk_and_burst(numbers: Numbers, ours: str) -> float | None:
    gap, chunk, burst = (numbers.get("long_arrival", ours, f) for f in ("longest_gap_s", "chunk_s", "burst_s"))
    return None if chunk is None or burst is None else _ratio(gap, chunk + burst)


def _over_others(numbers: Numbers, ours: str) -> float | None:
    return _ratio(
        numbers.get("documents", ours, "tok_per_s"), max(numbers.others("documents", "tok_per_s"), default=None)
    )


def _gap_over_others(numbers: Numbers, ours: str) -> float | None:
    return _ratio(
        numbers.get("documents", ours, "gap_p99_s"), min(numbers.others("documents", "gap_p99_s"), default=None)
    )


def _ratio(value: float | None, over: float | None) -> float | None:
    return None if value is None or not over else value / over


TARGETS = (
    Target("16 clients over LLM.generate, tok/s", _over_generate, 0.95),
    Target("longest gap beside a prompt of 20 chunks over chunk + burst", _gap_over_chunk_and_burst, 1.2, False),
    Target("question about 8,000 tokens: first TTFT over second", lambda n, s: n.get("second_question", s, "ratio"), 8),
    Target("8,000 tokens: prefill over restore", lambda n, s: n.get("restore", s, "ratio"), 5),
    Target("4 documents of 4K: tok/s over llama.cpp", _over_others, 1),
    Target("4 documents of 4K: gap p99 over llama.cpp", _gap_over_others, 1, False),
)


def verdict(target: Target, value: float | None) -> str:
    """Returns a value and whether it keeps its bound."""
    if value is None:
        return "not measured"
    is_kept = value >= target.bound if target.is_least else value <= target.bound
    return f"{value:.2f} {'PASS' if is_kept else 'FAIL'}"


def report(lines: Sequence[Line]) -> str:
    """Returns all tables as text."""
    found = results(lines)
    numbers = Numbers(found)
    parts = ["Targets", _targets(numbers)]
    for name, text in WORKLOADS.items():
        systems = [system for system in numbers.systems if numbers.has(name, system)]
        if systems:
            parts += [f"\n{name}: {text} (seconds, medians of the rounds)", _table(numbers, name, systems)]
    parts += ["", *(_baseline(line) for line in found if line["kind"] == "baseline")]
    missing = {line["system"]: line["reason"] for line in lines if line["kind"] == "missing"}
    parts += [f"missing: {name}: {reason}" for name, reason in missing.items()]
    failed = [line for line in lines if line["kind"] == "error" and line["sources"] == found[-1]["sources"]]
    parts += [f"failed: {line['name']} {line['system']}: {line['reason']}" for line in failed]
    last = found[-1]
    versions = {f"{name} {one}" for line in found for name, one in line["facts"].items()}
    about = [last["model"], f"{last['threads']} threads", f"jax {last['jax']}", *sorted(versions)]
    parts.append(f"{', '.join(about)}, commit {last['commit']}, {last['date']}")
    return "\n".join(parts) + "\n"


def _targets(numbers: Numbers) -> str:
    columns = [system for system, kind in numbers.systems.items() if kind == "ours"]
    rows = [
        [target.text, f"{'≥' if target.is_least else '≤'} {target.bound:g}"]
        + [verdict(target, target.value(numbers, name)) for name in columns]
        for target in TARGETS
    ]
    return text_table([["target", "", *columns], *rows])


def _table(numbers: Numbers, name: str, systems: Sequence[str]) -> str:
    def shown(system: str, field: str, form: Callable[[float], str]) -> str:
        value = numbers.get(name, system, field)
        return "–" if value is None else form(value)

    rows = [[system, *(shown(system, field, form) for _, field, form in COLUMNS)] for system in systems]
    return text_table([["", *(title for title, *_ in COLUMNS)], *rows])


def _baseline(line: Line) -> str:
    numbers = {name: value for name, value in line.items() if name.endswith(("_s", "ratio", "bytes"))}
    shown = ", ".join(
        f"{name} {[round(one, 3) for one in value] if isinstance(value, list) else round(value, 3)}"
        for name, value in numbers.items()
    )
    return f"{line['name']} {line['system']}: {shown}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes and prints the tables; returns 1 if there is nothing to show."""
    parser = command_parser("bench.serve.report", __doc__)
    parser.add_argument("folder", type=Path, help="where bench.serve wrote results.jsonl")
    folder = parser.parse_args(arguments).folder
    lines = read_lines(folder / "results.jsonl")
    if not results(lines):
        print(f"{folder} holds no measurements")
        return 1
    text = report(lines)
    (folder / "targets.txt").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
