"""The summary as pictures. The first picture loads matplotlib."""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lserve_jax.config.errors import InputError
from lserve_jax.evaluation.summary import Cell, Row, select

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

_DEPTHS = 10
_MOST_COLUMNS = 4
_WIDTH, _HEIGHT, _RESOLUTION = 4.2, 3.6, 150
_DRAWN = {"copy": "token_accuracy", "drift": "agreement"}
"""The field that is drawn instead of a task's score: one wrong word in a long copy leaves no score."""


def new_figure(
    columns: int, rows: int = 1, *, width: float = _WIDTH, height: float | Sequence[float] = _HEIGHT
) -> tuple["Figure", Any]:
    """Returns an empty figure and its panels [rows, columns]; the size of a panel, or of each row, is in inches.

    Raises:
      InputError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'lserve_jax[eval]'") from None
    heights = np.broadcast_to(height, rows).tolist()
    figure = Figure(figsize=(width * columns, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, height_ratios=heights)


def save(figure: "Figure", path: Path) -> Path:
    """Writes a PNG atomically and returns its path."""
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=_RESOLUTION, format="png")
    partial.replace(path)
    return path


def draw(cells: Sequence[Cell], rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws the available results (needles, scores, perplexity, drift by position) and returns the pictures' paths."""
    figures = [
        *((f"{task}.png", _needles(task, members)) for task, members in _with_depths(rows)),
        *((name, draw_it(members)) for name, draw_it, members in _kinds(cells) if members),
    ]
    return [save(figure, folder / name) for name, figure in figures]


def _kinds(cells: Sequence[Cell]) -> Iterator[tuple[str, Callable[[list[Cell]], "Figure"], list[Cell]]]:
    scored = [cell for cell in cells if "score" in cell or "tail_nll" in cell]
    yield "scores.png", score_figure, scored if _compared(scored) else []
    yield "perplexity.png", _perplexity, [cell for cell in cells if "tail_nll" in cell]
    yield "drift.png", _drift, [cell for cell in cells if "agreement" in cell]


def names(cells: Sequence[Mapping[str, Any]], field: str) -> list[Any]:
    """Returns the values of a field, each once, in order."""
    return list(dict.fromkeys(cell[field] for cell in cells))


def _drawn(task: str) -> str:
    """Returns the field of a task that is drawn."""
    return _DRAWN.get(task, "score")


def _likelihood(task: str) -> str:
    """Returns the field of a task's likelihood that is drawn: that of decoded tokens."""
    return "tail_nll" if task == "perplexity" else "nll"


def _title(task: str) -> str:
    return task + {"copy": " (tokens)", "perplexity": " (decoded)"}.get(task, "")


# --- needles ---------------------------------------------------------------------------------------------------------


def _with_depths(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for task in names(rows, "task"):
        members = [row for row in rows if row["task"] == task and "depth" in (row.get("info") or {})]
        if members:
            yield task, members


def _needles(task: str, rows: Sequence[Row]) -> "Figure":
    """Returns a map of depth against length for each variant, side by side."""
    variants, lengths = names(rows, "variant"), sorted(names(rows, "length"))
    columns = min(len(variants), _MOST_COLUMNS)
    lines = -(-len(variants) // columns)
    figure, panels = new_figure(columns, lines, width=max(2.2 + 0.55 * len(lengths), 3.2), height=4.4)
    for axes in panels.flat[len(variants) :]:
        axes.axis("off")
    for axes, variant in zip(panels.flat, variants, strict=False):
        grid = depth_grid([row for row in rows if row["variant"] == variant], lengths)
        axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", origin="upper")
        for (y, x), value in np.ndenumerate(grid):
            if np.isfinite(value):
                colour = "black" if 0.15 < value < 0.85 else "white"
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        axes.set_yticks(range(_DEPTHS), [f"{100 * (place + 0.5) / _DEPTHS:.0f}" for place in range(_DEPTHS)])
        axes.set_title(_wrapped(variant, 24), fontsize=8)
        axes.set_xlabel("prompt, tokens")
        axes.set_ylabel("depth of the needle, %")
    figure.colorbar(panels[0, 0].images[0], ax=panels, label="score", shrink=0.8)
    figure.suptitle(_title(task))
    return figure


def depth_grid(rows: Sequence[Row], lengths: Sequence[int]) -> np.ndarray:
    """Returns a task's mean scores [depths, lengths], NaN for cells without samples."""
    total, count = np.zeros((2, _DEPTHS, len(lengths)))
    for row in rows:
        place = min(int(row["info"]["depth"] * _DEPTHS), _DEPTHS - 1), lengths.index(row["length"])
        total[place] += row[_drawn(row["task"])]
        count[place] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


# --- scores, perplexity, drift ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A comparison with the reference: what the axis says, the scale of its values, and a cell's estimate, if any."""

    label: str
    scale: float
    of: Callable[[Cell], Mapping[str, Any] | None]


COMPARISONS = (
    Comparison("score over the reference's, points", 100, lambda cell: _difference(cell, _drawn(cell["task"]))),
    Comparison("nll over the reference's, nats", 1, lambda cell: _difference(cell, _likelihood(cell["task"]))),
    Comparison("KL divergence to the reference, nats", 1, lambda cell: cell.get("kl")),
)


def _difference(cell: Cell, field: str) -> Mapping[str, Any] | None:
    return cell[field]["difference"] if field in cell else None


def _compared(cells: Sequence[Cell]) -> list[Cell]:
    """Returns the cells that have a comparison with the reference."""
    return [cell for cell in cells if any(comparison.of(cell) is not None for comparison in COMPARISONS)]


def _comparisons(cells: Sequence[Cell]) -> list[Comparison]:
    """Returns the comparisons that cells have."""
    return [comparison for comparison in COMPARISONS if any(comparison.of(cell) is not None for cell in cells)]


def score_figure(cells: Sequence[Cell]) -> "Figure":
    """Returns each variant's comparisons with the reference by task, one row of panels per length.

    Each panel has a scale of its own: the intervals of many prompts would be points beside those of a few.
    """
    reference = next((cell["variant"] for cell in cells if cell["is_reference"]), "the reference")
    cells = _compared(cells)
    comparisons, variants, lengths = _comparisons(cells), names(cells, "variant"), sorted(names(cells, "length"))
    groups = [select(cells, length=length) for length in lengths]
    heights = [0.8 + 0.16 * (_places(members)[-1] + 2) for members in groups]
    figure, panels = new_figure(len(comparisons), len(lengths), height=heights)
    for row, members, length in zip(panels, groups, lengths, strict=True):
        for axes, comparison in zip(row, comparisons, strict=True):
            _rows_of_points(axes, comparison, members, variants)
        row[0].set_title(f"{length:,} tokens", fontsize=9, loc="left")
        for axes in row[1:]:
            axes.tick_params(labelleft=False)
    for axes, comparison in zip(panels[-1], comparisons, strict=True):
        axes.set_xlabel(comparison.label, fontsize=9)
    _legend_below(figure)
    title = _wrapped(f"Paired comparison with {reference}, 95% intervals", 45 * len(comparisons))
    _make_room(figure, figure.suptitle(title, fontsize=10))
    return figure


def _places(cells: Sequence[Cell]) -> list[int]:
    """Returns the height of each cell's line, from the top; a line is free between two tasks."""
    tasks = names(cells, "task")
    return [place + tasks.index(cell["task"]) for place, cell in enumerate(cells)]


def _rows_of_points(axes: "Axes", comparison: Comparison, cells: Sequence[Cell], variants: Sequence[str]) -> None:
    """Draws the estimates of cells of a length, a line for each, as a block of lines per task."""
    places = _places(cells)
    for number, variant in enumerate(variants):
        mine = [(place, cell) for place, cell in zip(places, cells, strict=True) if cell["variant"] == variant]
        style = {"color": f"C{number % 10}", "label": variant, "marker": "os^Dv"[number // 10 % 5], "linestyle": "none"}
        estimates = [comparison.of(cell) for _, cell in mine]
        _error_bars(axes, [place for place, _ in mine], estimates, comparison.scale, style, is_horizontal=True)
    axes.axvline(0, color="black", linewidth=0.8, zorder=0)
    middles = []
    for task in names(cells, "task"):
        lines = [place for place, cell in zip(places, cells, strict=True) if cell["task"] == task]
        middles.append((lines[0] + lines[-1]) / 2)
        if len(middles) % 2:
            axes.axhspan(lines[0] - 1, lines[-1] + 1, color="black", alpha=0.05, linewidth=0)
    axes.set_yticks(middles, [_title(task) for task in names(cells, "task")], fontsize=8)
    axes.set_ylim(places[-1] + 1, -1)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)


def _perplexity(cells: Sequence[Cell]) -> "Figure":
    """Returns perplexity over positions, one panel per length and one curve per variant."""
    lengths = sorted(names(cells, "length"))
    figure, panels = new_figure(len(lengths))
    for axes, length in zip(panels[0], lengths, strict=True):
        for cell, style in _styled(cells, length):
            perplexity = np.exp(cell["nll_by_position"])
            axes.plot(_centres(len(perplexity)) * length, perplexity, **style)
        axes.set_title(f"{length:,} tokens", fontsize=9)
        axes.set_xlabel("position in the window, tokens")
        axes.set_ylabel("perplexity")
        axes.grid(alpha=0.3)
    _legend_below(figure)
    figure.suptitle("Perplexity by position (prefill)", fontsize=11)
    return figure


def _drift(cells: Sequence[Cell]) -> "Figure":
    """Returns agreement and likelihood along the reference's text, one column per length and one curve per variant."""
    lengths = sorted(names(cells, "length"))
    figure, panels = new_figure(len(lengths), 2)
    for column, length in enumerate(lengths):
        reference = next((np.array(c["nll_by_position"]) for c in select(cells, length=length, is_reference=True)), 0.0)
        for cell, style in _styled(cells, length):
            x = 100 * _centres(len(cell["nll_by_position"]))
            panels[0, column].plot(x, 100 * np.array(cell["agreement_by_position"]), **style)
            panels[1, column].plot(x, np.array(cell["nll_by_position"]) - reference, **style)
        panels[0, column].set_title(f"after {length:,} tokens", fontsize=9)
        panels[0, column].set_ylabel("greedy agreement, %")
        panels[1, column].set_ylabel("nll over the reference's, nats")
    for axes in panels.flat:
        axes.set_xlabel("position in the generation, %")
        axes.grid(alpha=0.3)
    _legend_below(figure)
    figure.suptitle("Drift along the reference's generation", fontsize=11)
    return figure


def _styled(cells: Sequence[Cell], length: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Yields the cells of a length, each with the style of its variant, which is the same in all panels."""
    variants = names(cells, "variant")
    for cell in select(cells, length=length):
        place = variants.index(cell["variant"])
        yield cell, {"color": f"C{place}", "label": cell["variant"], "marker": ".", "linewidth": 1.2}


def _centres(count: int) -> np.ndarray:
    """Returns the middles of ``count`` equal parts of the interval from 0 to 1."""
    return (np.arange(count) + 0.5) / count


# --- ablations -------------------------------------------------------------------------------------------------------


def draw_axis(axis: str, cells: Sequence[Cell], folder: Path) -> Path:
    """Draws an axis' comparisons with the reference, by setting; returns the picture's path."""
    compared = _compared(cells)
    comparisons, settings = _comparisons(compared), names(compared, "variant")
    figure, (panels,) = new_figure(len(comparisons), width=5.4, height=4.2)
    groups = list(dict.fromkeys((cell["task"], cell["length"]) for cell in compared))
    for axes, comparison in zip(panels, comparisons, strict=True):
        for number, (task, length) in enumerate(groups):
            style = {"color": f"C{number % 10}", "label": f"{_title(task)} {length:,}", "marker": "os^Dv"[number % 5]}
            members = select(compared, task=task, length=length)
            places = [settings.index(cell["variant"]) + _shift(number, len(groups)) for cell in members]
            _error_bars(axes, places, [comparison.of(cell) for cell in members], comparison.scale, style)
        axes.set_ylabel(comparison.label)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(
            range(len(settings)), [_wrapped(name, 18) for name in settings], rotation=30, ha="right", fontsize=7
        )
        axes.set_xlim(-0.6, len(settings) - 0.4)
        axes.grid(alpha=0.3)
    _legend(figure, "outside right center")
    figure.suptitle(f"Ablation: {axis}", fontsize=11)
    return save(figure, folder / f"ablation_{axis}.png")


def _shift(place: int, count: int) -> float:
    """Returns the offset from the middle at which one of several neighbours is drawn, so that all are visible."""
    return 0.6 * ((place + 0.5) / count - 0.5)


def _error_bars(
    axes: "Axes",
    places: Sequence[float],
    estimates: Sequence[Mapping[str, Any] | None],
    scale: float,
    style: Mapping[str, Any],
    *,
    is_horizontal: bool = False,
) -> None:
    """Draws estimates at their places, with the intervals that exist, upwards or to the right."""
    known = [(place, one) for place, one in zip(places, estimates, strict=True) if one is not None]
    if not known:
        return
    values = scale * np.array([one["mean"] for _, one in known])
    low, high = (
        scale * np.array([one["mean"] if one[end] is None else one[end] for _, one in known]) for end in ("low", "high")
    )
    error = np.maximum([values - low, high - values], 0)
    at = [place for place, _ in known]
    points = {"x": values, "y": at, "xerr": error} if is_horizontal else {"x": at, "y": values, "yerr": error}
    axes.errorbar(**points, capsize=2, markersize=4, linewidth=1, **style)


def _wrapped(label: str, width: int = 40) -> str:
    return textwrap.fill(label.replace(":", ": ").replace("+", " + "), width)


def _legend_below(figure: "Figure") -> None:
    """Draws the legend of all panels below them, without taking from their height."""
    _make_room(figure, _legend(figure, "outside lower center"))


def _make_room(figure: "Figure", artist: "Artist") -> None:
    """Adds the height of something outside of the panels to that of the figure."""
    figure.set_figheight(figure.get_figheight() + artist.get_window_extent().height / figure.dpi)


def _legend(figure: "Figure", place: Any) -> "Legend":
    """Draws one legend for all panels, with each label once."""
    labelled = [axes.get_legend_handles_labels() for axes in figure.axes]
    found = {
        _wrapped(label): handle for handles, labels in labelled for handle, label in zip(handles, labels, strict=True)
    }
    return figure.legend(list(found.values()), list(found), loc=place, fontsize=7)
