"""Kernels under the device's measured limits, as a picture."""

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.figures import SIZE, Line, of_newest_device, titled_figure

MARKERS = "osD^vP*X"
MOST_BARS = 48


def roofline(lines: Iterable[Line]) -> Figure | None:
    """Returns kernels under the device's roof, and the share of the nearer limit that each reaches, or None."""
    lines = of_newest_device([line for line in lines if "op" in line and line.get("median_ms")])
    kernels = list({(line["op"], line["implementation"], line["workload"]): line for line in lines}.values())
    if not kernels:
        return None
    figure = titled_figure("Kernels against the device's measured limits", kernels)
    bars = sorted(kernels, key=lambda line: (line["op"], line["workload"], line["implementation"]))[:MOST_BARS]
    figure.set_size_inches(SIZE[0] + 1, max(SIZE[1], 1.4 + 0.2 * len(bars)))
    roof, shares = figure.subplots(1, 2)
    colours = {op: f"C{index}" for index, op in enumerate(sorted({line["op"] for line in kernels}))}
    _draw_roof(roof, kernels, colours)
    _draw_shares(shares, bars, colours, len(kernels) - len(bars))
    return figure


def intensity(line: Line) -> float | None:
    """Returns the FLOPs per byte of a result; None if one of them was not counted."""
    counted = line.get("tflop_per_s") and line.get("gb_per_s")
    return line["tflop_per_s"] * 1e3 / line["gb_per_s"] if counted else None


def limits(lines: list[Line]) -> tuple[float | None, float | None]:
    """Returns the limits in GB/s and TFLOP/s, as recorded or, if they are not, as their recorded shares imply."""
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
    """Returns the rate to compare with the nearer limit, and the time."""
    is_product = line.get("limit") == "product"
    rate = f"{line['tflop_per_s']:.4g} TFLOP/s" if is_product else f"{line['gb_per_s']:,.4g} GB/s"
    return f"{rate}, {line['median_ms']:.3g} ms"
