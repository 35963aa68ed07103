"""Whole models as curves over context: times, and speedups over our dense setting."""

from collections.abc import Iterable
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.figures import COLOURS, Line, of_newest_device, titled_figure, token_axis

PEER, OTHERS = "#2ca02c", ("#8c564b", "#e377c2", "#17becf", "#bcbd22")
DASHES = ("-", "--", ":", "-.")


class Quantity(NamedTuple):
    """A part of the end-to-end bench, the field with its time, and its name in pictures."""

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


def latency(lines: Iterable[Line]) -> Figure | None:
    """Returns times against context, or None without data."""
    lines = of_newest_device([line for line in lines if line.get("part") in ("decode", "prefill", "peer")])
    panels = [(quantity.label, series(lines, quantity)) for quantity in QUANTITIES]
    return _against_context(lines, "Time against context", panels)


def speedup(lines: Iterable[Line]) -> Figure | None:
    """Returns the speedup of each preset and the peer over our dense setting, or None without data."""
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
    """Returns our dense setting's values divided by the curves', at the same batch, where they were measured."""
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
    figure = titled_figure(title, lines)
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
    token_axis(axes, {n for one in curves for n in one.values}, "context, tokens")


def _colour(preset: str, all_presets: list[str]) -> str:
    if preset in COLOURS:
        return COLOURS[preset]
    others = list(dict.fromkeys(name for name in all_presets if name not in COLOURS and ":" in name))
    return OTHERS[others.index(preset) % len(OTHERS)] if preset in others else PEER
