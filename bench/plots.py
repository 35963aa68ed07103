"""Pictures of what the benches wrote: `python -m bench.plots DIR` reads DIR/*.jsonl and writes PNGs beside them.

  latency.png   decode ms a token and prefill seconds against context, a line a preset
  speedup.png   the same, over our own dense
  roofline.png  kernels: FLOP/s against arithmetic intensity under the limits measured in the same run, and their shares

One device a picture: that of the newest line. Of several lines for one point the newest counts.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.measure import read_lines

type Line = dict[str, Any]

COLOURS = {"dense": "#555555", "streaming": "#1f77b4", "quest": "#9467bd", "qserve": "#ff7f0e", "lserve": "#d62728"}
PEER, OTHERS = "#2ca02c", ("#8c564b", "#e377c2", "#17becf", "#bcbd22")
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vP*X"
MOST_BARS = 48
SIZE, RESOLUTION = (12.0, 5.2), 150


class Quantity(NamedTuple):
    """A part of the end-to-end bench, the field that holds its time, and how it is called."""

    part: str
    field: str
    label: str


QUANTITIES = (Quantity("decode", "ms_per_token", "decode, ms a token"), Quantity("prefill", "prefill_s", "prefill, s"))


class Series(NamedTuple):
    """One curve: a preset and a batch, its values by context, and the contexts that were interpolated from chunks."""

    name: str
    preset: str
    batch: int
    values: dict[int, float]
    chunks: set[int]


def main(arguments: list[str] | None = None) -> int:
    """Draws what there is data for; 1 if there is none at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the benches wrote their *.jsonl")
    folder = parser.parse_args(arguments).folder
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in read_lines(file)]
    figures = {"latency.png": latency(lines), "speedup.png": speedup(lines), "roofline.png": roofline(lines)}
    return save(figures, folder)


def save(figures: Mapping[str, Figure | None], folder: Path) -> int:
    """Writes the figures there are, by file name; returns 1 if there is none at all."""
    for name, figure in figures.items():
        if figure is None:
            print(f"{name}: not drawn: {folder} holds no results for it")
            continue
        figure.savefig(folder / name, dpi=RESOLUTION)
        print(folder / name)
    return 0 if any(figures.values()) else 1


# --- end to end -------------------------------------------------------------------------------------------------------


def latency(lines: Iterable[Line]) -> Figure | None:
    """Returns times against context, or None without data."""
    lines = of_newest_device([line for line in lines if line.get("part") in ("decode", "prefill", "peer")])
    panels = [(quantity.label, series(lines, quantity)) for quantity in QUANTITIES]
    return _against_context(lines, "Time against context", panels)


def speedup(lines: Iterable[Line]) -> Figure | None:
    """Returns how many times faster than our own dense each preset and the peer are, or None without data."""
    lines = of_newest_device([line for line in lines if line.get("part") in ("decode", "prefill", "peer")])
    panels = [
        (f"{quantity.part}, times faster than dense", over_dense(series(lines, quantity))) for quantity in QUANTITIES
    ]
    return _against_context(lines, "Speed-up over our own dense", panels, level=1.0)


def series(lines: list[Line], quantity: Quantity) -> list[Series]:
    """Returns a quantity's curves: presets in the order of first mention, then the peer."""
    found: dict[str, Series] = {}
    for line in lines:
        if line["part"] not in (quantity.part, "peer") or quantity.field not in line:
            continue
        preset, batch = line.get("preset") or line["peer"], line["batch"]
        name = preset + (f", batch {batch}" if batch > 1 else "")
        one = found.setdefault(name, Series(name, preset, batch, {}, set()))
        one.values[line["context"]] = line[quantity.field]
        (one.chunks.add if line.get("measured") == "chunks" else one.chunks.discard)(line["context"])
    return sorted(found.values(), key=lambda one: (one.batch, one.preset not in COLOURS))


def over_dense(curves: list[Series]) -> list[Series]:
    """Returns the curves divided into our own dense at the same batch, where it was measured."""
    dense = {one.batch: one.values for one in curves if one.preset == "dense"}
    faster = []
    for one in curves:
        base = dense.get(one.batch, {})
        values = {context: base[context] / value for context, value in one.values.items() if context in base}
        if values and one.preset != "dense":
            faster.append(one._replace(values=values))
    return faster


def _against_context(
    lines: list[Line], title: str, panels: list[tuple[str, list[Series]]], level: float | None = None
) -> Figure | None:
    panels = [(label, curves) for label, curves in panels if curves]
    if not panels:
        return None
    figure = _figure(title, lines)
    for axes, (label, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, curves)
        if level is None:
            axes.set_yscale("log")
        else:
            axes.axhline(level, color=COLOURS["dense"], linewidth=1, label="dense")
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.set_ylabel(label)
        if any(one.chunks for one in curves):
            axes.plot([], [], "o", color="k", markerfacecolor="w", label="hollow: interpolated from chunks")
        axes.legend(fontsize=8)
    return figure


def _draw(axes: Axes, curves: list[Series]) -> None:
    batches = sorted({one.batch for one in curves})
    for one in curves:
        contexts = sorted(one.values)
        colour = _colour(one.preset, [curve.preset for curve in curves])
        style = DASHES[batches.index(one.batch) % len(DASHES)]
        axes.plot(contexts, [one.values[n] for n in contexts], style, color=colour, label=one.name)
        for n in contexts:
            axes.plot(
                n, one.values[n], "o", color=colour, markersize=5, markerfacecolor="w" if n in one.chunks else None
            )
    ticks = sorted({n for one in curves for n in one.values})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: context_name(n)))
    axes.set_xlabel("context, tokens")
    axes.grid(alpha=0.3)


def _colour(preset: str, all_presets: list[str]) -> str:
    if preset in COLOURS:
        return COLOURS[preset]
    others = list(dict.fromkeys(name for name in all_presets if name not in COLOURS and ":" in name))
    return OTHERS[others.index(preset) % len(OTHERS)] if preset in others else PEER


def context_name(tokens: float) -> str:
    """Returns 131072 as 128K."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if tokens >= size:
            return f"{tokens / size:g}{unit}"
    return f"{tokens:g}"


# --- kernels ----------------------------------------------------------------------------------------------------------


def roofline(lines: Iterable[Line]) -> Figure | None:
    """Returns kernels under the device's roof, and the share of the nearer limit that each reaches, or None."""
    lines = of_newest_device([line for line in lines if "op" in line and line.get("median_ms")])
    kernels = list({(line["op"], line["implementation"], line["workload"]): line for line in lines}.values())
    if not kernels:
        return None
    figure = _figure("Kernels against the device's measured limits", kernels)
    bars = sorted(kernels, key=lambda line: (line["op"], line["workload"], line["implementation"]))[:MOST_BARS]
    figure.set_size_inches(SIZE[0] + 1, max(SIZE[1], 1.4 + 0.2 * len(bars)))
    roof, shares = figure.subplots(1, 2)
    colours = {op: f"C{index}" for index, op in enumerate(sorted({line["op"] for line in kernels}))}
    _draw_roof(roof, kernels, colours)
    _draw_shares(shares, bars, colours, len(kernels) - len(bars))
    return figure


def intensity(line: Line) -> float | None:
    """Returns the FLOP a byte of a result; None where one of them was not counted."""
    counted = line.get("tflop_per_s") and line.get("gb_per_s")
    return line["tflop_per_s"] * 1e3 / line["gb_per_s"] if counted else None


def limits(lines: list[Line]) -> tuple[float | None, float | None]:
    """Returns the limits in GB/s and TFLOP/s: as written, else what the shares of them imply."""
    found = []
    for limit, rate, written in (
        ("bandwidth", "gb_per_s", "limit_gb_per_s"),
        ("product", "tflop_per_s", "limit_tflop_per_s"),
    ):
        values = [line[written] for line in lines if line.get(written)]
        shares = [line for line in lines if line.get("limit") == limit and line.get("share_of_limit")]
        values = values or [line[rate] / line["share_of_limit"] for line in shares]
        found.append(float(np.median(values)) if values else None)
    return found[0], found[1]


def _draw_roof(axes: Axes, kernels: list[Line], colours: dict[str, str]) -> None:
    placed = [(line, x) for line in kernels if (x := intensity(line)) is not None]
    bandwidth, product = limits(kernels)
    implementations = list(dict.fromkeys(line["implementation"] for line in kernels))
    names = set()
    for line, x in placed:
        name = f"{line['op']}, {line['implementation']}"
        axes.plot(
            *(x, line["tflop_per_s"], MARKERS[implementations.index(line["implementation"]) % len(MARKERS)]),
            color=colours[line["op"]],
            markersize=6,
            label=None if name in names else name,
        )
        names.add(name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    left, right = 0.1, max([1e4, *(x * 2 for _, x in placed)])
    x = np.geomspace(min([left, *(x / 2 for _, x in placed)]), right, 200)
    if bandwidth is not None:
        roof = np.minimum(bandwidth * x / 1e3, product or np.inf)
        axes.plot(x, roof, "k-", linewidth=1.5, label=f"copy {bandwidth:,.0f} GB/s")
    if product is not None:
        axes.axhline(product, color="k", linestyle=":", linewidth=1, label=f"bf16 product {product:,.4g} TFLOP/s")
    missing = len(kernels) - len(placed)
    axes.set_title(f"without a count of FLOP or bytes, at the right alone: {missing}" if missing else "", fontsize=8)
    axes.set_xlabel("arithmetic intensity, FLOP a byte")
    axes.set_ylabel("achieved TFLOP/s")
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    axes.legend(fontsize=7)


def _draw_shares(axes: Axes, bars: list[Line], colours: dict[str, str], left_out: int) -> None:
    shares = [line.get("share_of_limit") or 0.0 for line in bars]
    places = np.arange(len(bars))
    axes.barh(places, shares, color=[colours[line["op"]] for line in bars], height=0.75)
    for place, line, share in zip(places, bars, shares, strict=True):
        axes.text(share + 0.01, float(place), achieved(line), va="center", fontsize=6.5)
    axes.set_yticks(
        places, [f"{line['op']} {line['workload']}, {line['implementation']}" for line in bars], fontsize=6.5
    )
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.35, *(share * 1.3 for share in shares)))
    axes.axvline(1.0, color="0.7", linewidth=1, zorder=0)
    axes.set_xlabel("share of the nearer limit" + (f" ({left_out} more results not shown)" if left_out else ""))


def achieved(line: Line) -> str:
    """Returns the rate that stands against the nearer limit, and the time."""
    is_product = line.get("limit") == "product"
    rate = f"{line['tflop_per_s']:.4g} TFLOP/s" if is_product else f"{line['gb_per_s']:,.4g} GB/s"
    return f"{rate}, {line['median_ms']:.3g} ms"


# --- what all pictures share ------------------------------------------------------------------------------------------


def of_newest_device(lines: list[Line]) -> list[Line]:
    """Returns the lines of the device that the newest line is of, oldest first."""
    lines = sorted((line for line in lines if "device" in line), key=lambda line: line.get("date", ""))
    return [line for line in lines if line["device"] == lines[-1]["device"]]


def _figure(title: str, lines: list[Line]) -> Figure:
    newest = lines[-1]
    models = sorted({line["model"] for line in lines if "model" in line})
    about = [title, *models, newest["device"], newest.get("date", "")[:10], f"commit {newest.get('commit', 'unknown')}"]
    figure = Figure(figsize=SIZE, layout="constrained")
    figure.suptitle(" · ".join(part for part in about if part), fontsize=11)
    return figure


if __name__ == "__main__":
    sys.exit(main())
