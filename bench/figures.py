"""What all pictures share: colours, sizes, titles, the axis of tokens, and writing to files."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

type Line = dict[str, Any]

COLOURS = {"dense": "#555555", "streaming": "#1f77b4", "quest": "#9467bd", "qserve": "#ff7f0e", "lserve": "#d62728"}
SIZE, RESOLUTION = (12.0, 5.2), 150


def save(figures: Mapping[str, Figure | None], folder: Path) -> int:
    """Writes the existing figures by file name; returns 1 if there is none."""
    for name, figure in figures.items():
        if figure is None:
            print(f"{name}: not drawn: {folder} holds no results for it")
            continue
        figure.savefig(folder / name, dpi=RESOLUTION)
        print(folder / name)
    return 0 if any(figures.values()) else 1


def of_newest_device(lines: list[Line]) -> list[Line]:
    """Returns the lines of the newest line's device, oldest first."""
    lines = sorted((line for line in lines if "device" in line), key=lambda line: line.get("date", ""))
    return [line for line in lines if line["device"] == lines[-1]["device"]]


def titled_figure(title: str, lines: list[Line]) -> Figure:
    """Returns an empty figure whose title names the quantity, the model, the device, the date and the commit."""
    newest = lines[-1]
    models = sorted({line["model"] for line in lines if "model" in line})
    about = [title, *models, newest["device"], newest.get("date", "")[:10], f"commit {newest.get('commit', 'unknown')}"]
    figure = Figure(figsize=SIZE, layout="constrained")
    figure.suptitle(" · ".join(part for part in about if part), fontsize=11)
    return figure


def token_axis(axes: Axes, tokens: Iterable[int], label: str) -> None:
    """Makes the x-axis count tokens in powers of two, with a tick at each value."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(tokens))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: context_name(n)))
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


def context_name(tokens: float) -> str:
    """Returns 131072 as 128K."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if tokens >= size:
            return f"{tokens / size:g}{unit}"
    return f"{tokens:g}"
