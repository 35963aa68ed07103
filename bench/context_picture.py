"""The README's picture: `python -m bench.context_picture` draws docs/context.png from committed results.

Decode ms per token against context, one sequence on a CPU. Points up to 8K are medians of three rounds
(bench/results/cpu, part single); dashed lines are one round of fresh processes (bench/results/cpu_long, part long).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
SIZE, RESOLUTION = (7.5, 3.6), 150
_SETTINGS = {
    "dense": ("dense", "#555555", (-16, -3)),
    "lserve": ("lserve, token budget 1024", "#d62728", (0, -14)),
    "lserve:token_budget=4096": ("lserve, token budget 4096 (the default)", "#ff7f0e", (0, 6)),
}
"""By the name in the results: label, colour, and the place of the last number relative to its point."""


class Curve(NamedTuple):
    """Decode times of one setting: (tokens of context, ms per token) in ascending order."""

    system: str
    part: str
    points: tuple[tuple[int, float], ...]


def curves(results: Path = RESULTS) -> list[Curve]:
    """Returns the curves of `_SETTINGS` that the committed medians hold, one per setting and part."""
    found = []
    for folder, part in (("cpu", "single"), ("cpu_long", "long")):
        text = (results / folder / "medians.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        for system in _SETTINGS:
            wanted = {"part": part, "system": system, "batch": 1, "field": "ms_per_token"}
            points = [(row["length"], row["median"]) for row in rows if wanted.items() <= row.items()]
            if points:
                found.append(Curve(system, part, tuple(sorted(points))))
    return found


def draw(found: Sequence[Curve]) -> Figure:
    """Returns the picture of the curves."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    for curve in found:
        _draw_curve(axes, curve, has_label=curve.part == "single" or not _is_single(curve.system, found))
    lengths = sorted({length for curve in found for length, _ in curve.points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}K" if n >= 1024 else f"{n:g}"))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("decode, ms per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")
    axes.set_title("SmolLM2-135M, one sequence, 2 CPU cores, bfloat16", fontsize=10)
    return figure


def _is_single(system: str, found: Sequence[Curve]) -> bool:
    return any(curve.system == system and curve.part == "single" for curve in found)


def _draw_curve(axes: Axes, curve: Curve, *, has_label: bool) -> None:
    label, colour, offset = _SETTINGS[curve.system]
    is_single = curve.part == "single"
    style: dict[str, Any] = {"linestyle": "-", "marker": "o"} if is_single else {"linestyle": "--", "marker": "s"}
    lengths, times = zip(*curve.points, strict=True)
    axes.plot(lengths, times, color=colour, markersize=5, label=label if has_label else None, **style)
    last = curve.points[-1]
    if not is_single:
        axes.annotate(f"{last[1]:.0f}", last, textcoords="offset points", xytext=offset, ha="center", fontsize=8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the picture and returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "context.png", help="(%(default)s)")
    out = parser.parse_args(arguments).out
    out.parent.mkdir(parents=True, exist_ok=True)
    # Without the date and matplotlib's version, so that the same results give the same file.
    draw(curves()).savefig(out, dpi=RESOLUTION, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
