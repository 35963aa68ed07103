"""What `bench.cpu` measured, as tables: `python -m bench.cpu.report DIR` reads DIR/results.jsonl.

  targets.txt    the targets for the CPU, one column per setting of ours; then all speeds
  medians.jsonl  median, quartiles and number of samples of everything that was measured

Only results of the newest sources in the file count: ratios are of medians of one run.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.command_line import command_parser
from bench.cpu.medians import Line, Medians, medians, samples
from bench.cpu.targets import DECODE, PREFILL, targets_table
from bench.log import read_lines
from bench.spread import Spread
from bench.text import length_name, text_table


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


TABLES: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("prefill, tokens/s", "single", PREFILL, "{:.0f}".format),
    ("decode, ms/step", "single", DECODE, "{:.1f}".format),
    ("decode, ms/step", "batch", DECODE, "{:.1f}".format),
    ("first token of a process, s", "start", "first_token_s", "{:.2f}".format),
    ("first answer of a process, s", "start", "answer_s", "{:.2f}".format),
    ("compile, s", "start", "compile_s", "{:.2f}".format),
    ("programs compiled by a process, XLA's small ones too", "programs", "num_compilations", "{:.0f}".format),
    ("peak memory of a process, GiB", "memory", "peak_bytes", lambda size: f"{size / 2**30:.2f}"),
    ("prefill, tokens/s", "long", PREFILL, "{:.0f}".format),
    ("decode, ms/step", "long", DECODE, "{:.1f}".format),
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
    """Returns how often systems' first greedy tokens equal those of float32, to show that all run the same model."""
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
    """Writes and prints the tables; returns 1 if there is nothing to show."""
    parser = command_parser("bench.cpu.report", __doc__)
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
