"""Pictures of what `bench.cpu` wrote: `python -m bench.cpu.plots DIR` reads DIR/results.jsonl, writes PNGs next to it.

  prefill.png  tokens per second against the prompt's length
  decode.png   ms per step against context, one panel per batch size
  speedup.png  both over our own dense
  long.png     prefill seconds and decode ms of fresh processes up to the longest context
  memory.png   peak memory of those processes, and what the plan said

Medians of the newest sources, with the quartiles as bars.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.command_line import command_parser
from bench.cpu.medians import Medians, medians, samples
from bench.figures import COLOURS, SIZE, save, token_axis
from bench.log import read_lines
from bench.spread import Spread
from bench.text import length_name

type Line = dict[str, Any]
type Curves = dict[str, dict[int, Spread]]
"""By system, its numbers by length."""

SPARSE_COLOURS = ("#d62728", "#ff7f0e", "#e377c2", "#9467bd", "#8c564b", "#17becf")
PEER_COLOURS = {"transformers": "#2ca02c", "llama.cpp": "#7f7f7f"}
PEER_MARKERS = "sD^v"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws all pictures with data; returns 1 if there is no data."""
    parser = command_parser("bench.cpu.plots", __doc__)
    parser.add_argument("folder", type=Path, help="where bench.cpu wrote results.jsonl")
    folder = parser.parse_args(arguments).folder
    lines = read_lines(folder / "results.jsonl")
    figures = {name: draw(lines) for name, draw in PICTURES.items()} if samples(lines) else {}
    return save(figures, folder)


def prefill(lines: Sequence[Line]) -> Figure | None:
    """Returns prefill speeds against length, or None without data."""
    panels = [("prefill, tokens/s", curves(medians(lines), "single", "prefill_tok_per_s", 1))]
    return _figure(lines, "Prefill on the CPU", panels)


def decode(lines: Sequence[Line]) -> Figure | None:
    """Returns decode times against context, or None without data."""
    numbers = medians(lines)
    batches = sorted({(point.batch, point.part) for point in numbers if point.part in ("single", "batch")})
    panels = [
        (f"decode, ms a step, batch {batch}", curves(numbers, part, "ms_per_token", batch)) for batch, part in batches
    ]
    return _figure(lines, "Decode on the CPU", panels)


def speedup(lines: Sequence[Line]) -> Figure | None:
    """Returns the speedups over our dense setting, or None without data."""
    numbers = medians(lines)
    panels = [
        ("prefill, times our dense", over_dense(curves(numbers, "single", "prefill_tok_per_s", 1), is_rate=True)),
        ("decode, times our dense", over_dense(curves(numbers, "single", "ms_per_token", 1), is_rate=False)),
    ]
    return _figure(lines, "Speed-up over our own dense on the CPU", panels, level=1.0)


def long_contexts(lines: Sequence[Line]) -> Figure | None:
    """Returns prefill and decode times up to the longest contexts, or None without data."""
    numbers = medians(lines)
    rates = curves(numbers, "long", "prefill_tok_per_s", 1)
    seconds = {
        name: {n: Spread(n / one.median, n / one.high, n / one.low, one.samples) for n, one in values.items()}
        for name, values in rates.items()
    }
    panels = [("prefill, s", seconds), ("decode, ms a step", curves(numbers, "long", "ms_per_token", 1))]
    return _figure(lines, "Long contexts on the CPU, fresh processes", panels, is_log=True)


def memory(lines: Sequence[Line]) -> Figure | None:
    """Returns the peak memory of processes next to the planned one, as bars, or None without data."""
    found = {(line["system"], line["length"]): line for line in samples(lines) if line["part"] == "long"}
    if not found:
        return None
    figure = Figure(figsize=(SIZE[0], max(SIZE[1] / 2, 1.2 + 0.45 * len(found))), layout="constrained")
    axes, gib = figure.subplots(), 2**30
    for row, line in enumerate(found.values()):
        facts = line["facts"]
        base, weights, cache = (facts[name] / gib for name in ("base_bytes", "plan_weight_bytes", "plan_cache_bytes"))
        parts = ((base, "process before loading"), (weights, "plan: weights"), (cache, "plan: KV cache"))
        left = 0.0
        for (size, label), colour in zip(parts, ("#cccccc", "#1f77b4", "#aec7e8"), strict=True):
            axes.barh(row + 0.2, size, 0.36, left=left, color=colour, label=None if row else label)
            left += size
        axes.barh(row - 0.2, line["peak_bytes"] / gib, 0.36, color="#d62728", label=None if row else "measured peak")
    axes.set_yticks(range(len(found)), [f"{name}, {length_name(length)}" for name, length in found])
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    axes.grid(alpha=0.3, axis="x")
    figure.legend(fontsize=8, ncols=4, loc="outside lower center")
    figure.suptitle(_title(lines, "Peak memory and the plan"))
    return figure


PICTURES = {
    "prefill.png": prefill,
    "decode.png": decode,
    "speedup.png": speedup,
    "long.png": long_contexts,
    "memory.png": memory,
}


def curves(numbers: Medians, part: str, field: str, batch: int) -> Curves:
    """Returns a field of a part against length, system by system."""
    found: Curves = {}
    for point, spread in numbers.items():
        if (point.part, point.field, point.batch) == (part, field, batch):
            found.setdefault(point.system, {})[point.length] = spread
    return found


def over_dense(found: Mapping[str, Mapping[int, Spread]], *, is_rate: bool) -> Curves:
    """Returns curves as multiples of our dense setting's speed, without spread, which ratios do not have here."""

    def times(one: Spread, base: Spread) -> Spread:
        ratio = one.median / base.median if is_rate else base.median / one.median
        return Spread(ratio, ratio, ratio, 1)

    dense = found.get("dense", {})
    return {
        name: {n: times(one, dense[n]) for n, one in values.items() if n in dense}
        for name, values in found.items()
        if name != "dense" and any(n in dense for n in values)
    }


def _figure(
    lines: Sequence[Line],
    title: str,
    panels: Sequence[tuple[str, Curves]],
    *,
    level: float | None = None,
    is_log: bool = False,
) -> Figure | None:
    panels = [(label, found) for label, found in panels if found]
    if not panels:
        return None
    figure = Figure(figsize=SIZE, layout="constrained")
    figure.suptitle(_title(lines, title))
    libraries = {line["system"]: line["library"] for line in samples(lines)}
    for axes, (label, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, found, libraries)
        axes.set_ylabel(label)
        if is_log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        else:
            axes.set_ylim(bottom=0)
        if level is not None:
            axes.axhline(level, color=COLOURS["dense"], linewidth=1, label="dense")
        axes.legend(fontsize=8)
    return figure


def _draw(axes: Axes, found: Curves, libraries: Mapping[str, str]) -> None:
    sparse = [name for name in libraries if libraries[name] == "ours" and name not in COLOURS]
    for name, values in found.items():
        lengths, peer = sorted(values), libraries[name] in PEER_COLOURS
        if peer:
            colour = PEER_COLOURS[libraries[name]]
            mates = [other for other in libraries if libraries[other] == libraries[name]]
            marker = PEER_MARKERS[mates.index(name) % len(PEER_MARKERS)]
        else:
            colour = COLOURS.get(name) or SPARSE_COLOURS[(1 + sparse.index(name)) % len(SPARSE_COLOURS)]
            marker = "o"
        bars = [[values[n].median - values[n].low for n in lengths]]
        bars.append([values[n].high - values[n].median for n in lengths])
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "--" if peer else "-"}
        axes.errorbar(lengths, [values[n].median for n in lengths], yerr=bars, markersize=5, label=name, **style)
    token_axis(axes, {n for values in found.values() for n in values}, "tokens")


def _title(lines: Sequence[Line], title: str) -> str:
    last = samples(lines)[-1]
    return f"{title}: {last['model']}, {last['threads']} threads, {last['commit']}"


if __name__ == "__main__":
    sys.exit(main())
