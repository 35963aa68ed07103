"""Pictures of what `bench.serve` wrote: `python -m bench.serve.plots DIR` reads its lines, writes PNGs next to them.

  throughput.png  tokens per second by workload: all, and those of requests within the limits
  ttft.png        each request's seconds to its first text, by turn
  gaps.png        share of the gaps between texts that are longer than so many seconds
  arrival.png     the texts of a stream while a prompt of 20 chunks arrives

The newest sources' results of all rounds.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.command_line import command_parser
from bench.figures import COLOURS, SIZE, save, titled_figure
from bench.log import read_lines
from bench.serve.report import Numbers, results
from bench.serve.summary import gaps
from bench.serve.workloads import BOTH, WORKLOADS

type Line = dict[str, Any]

_LEAST_GAP = 1e-4
"""Seconds; texts that came together are drawn as if they had been so far apart."""
_MORE_COLOURS = ("#2ca02c", "#1f77b4", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f", "#9467bd")


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws all pictures with data; returns 1 if there is no data."""
    parser = command_parser("bench.serve.plots", __doc__)
    parser.add_argument("folder", type=Path, help="where bench.serve wrote its lines")
    folder = parser.parse_args(arguments).folder
    found = results(read_lines(folder / "results.jsonl"))
    runs = {line["run"] for line in found if line["kind"] == "run"}
    requests = [line for line in read_lines(folder / "requests.jsonl") if line["run"] in runs]
    figures = {name: draw(found, requests) for name, draw in PICTURES.items()} if runs else {}
    return save(figures, folder)


def throughput(found: Sequence[Line], requests: Sequence[Line]) -> Figure | None:
    """Returns tokens per second as bars, or None without data."""
    del requests
    numbers, colours = Numbers(found), colours_of(found)
    names = [name for name in WORKLOADS if any(numbers.has(name, system) for system in numbers.systems)]
    figure = _figure("Throughput of servers", found)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        systems = [system for system in numbers.systems if numbers.has(name, system)]
        for row, system in enumerate(systems):
            whole, good = (numbers.get(name, system, field) or 0.0 for field in ("tok_per_s", "good_tok_per_s"))
            axes.barh(row, whole, color=colours[system], alpha=0.35)
            axes.barh(row, good, color=colours[system])
            axes.annotate(
                f"{whole:.0f}", (whole, row), fontsize=8, va="center", xytext=(2, 0), textcoords="offset points"
            )
        axes.set_yticks(range(len(systems)), systems if name == names[0] else [""] * len(systems), fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("tokens/s; full colour: within the limits", fontsize=8)
        axes.grid(alpha=0.3, axis="x")
    return figure


def ttft(found: Sequence[Line], requests: Sequence[Line]) -> Figure | None:
    """Returns each request's time to its first text by turn, or None without data."""
    answered = [line for line in requests if line["times_s"] and line["name"] != "long_arrival"]
    names = [name for name in WORKLOADS if any(line["name"] == name for line in answered)]
    if not names:
        return None
    colours = colours_of(found)
    figure = _figure("Time to the first text", found)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for number, (system, colour) in enumerate(colours.items()):
            some = [line for line in answered if (line["name"], line["system"]) == (name, system)]
            shift = (number - (len(colours) - 1) / 2) * 0.8 / len(colours)
            turns, seconds = [line["turn"] + 1 + shift for line in some], [line["times_s"][0] for line in some]
            axes.scatter(turns, seconds, s=14, color=colour, alpha=0.7)
        axes.set_title(name, fontsize=10)
        axes.set_yscale("log")
        axes.set_xticks(sorted({line["turn"] + 1 for line in answered if line["name"] == name}))
        axes.set_xlabel("turn")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("s")
    _add_legend(figure, colours)
    return figure


def gap_shares(found: Sequence[Line], requests: Sequence[Line]) -> Figure | None:
    """Returns the share of gaps longer than so many seconds, or None without data."""
    names = [name for name in WORKLOADS if any(line["name"] == name and gaps(line) for line in requests)]
    if not names:
        return None
    colours, longest = colours_of(found), max(max(gaps(line), default=0.0) for line in requests)
    figure = _figure("Gaps between the texts of an answer", found)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for system, colour in colours.items():
            some = [line for line in requests if (line["name"], line["system"]) == (name, system)]
            between = np.sort([gap for line in some for gap in gaps(line)])
            if len(between):
                share = 1 - np.arange(len(between)) / len(between)
                axes.step(
                    np.maximum(between, _LEAST_GAP), share, color=colour, label=system if name == names[0] else None
                )
        axes.set_title(name, fontsize=10)
        axes.set_xlim(_LEAST_GAP, 2 * max(longest, _LEAST_GAP))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("s")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of longer gaps")
    _add_legend(figure, colours)
    return figure


def arriving(found: Sequence[Line], requests: Sequence[Line]) -> Figure | None:
    """Returns the texts of a stream against the time since a long prompt was sent, or None without data."""
    both = [line for line in requests if line["name"] == "long_arrival" and line["stage"] == BOTH and line["times_s"]]
    if not both:
        return None
    colours = colours_of(found)
    figure = _figure("A stream while a prompt of 20 chunks arrives", found)
    axes = figure.subplots()
    for run in dict.fromkeys(line["run"] for line in both):
        pair = {line["script"]: line for line in both if line["run"] == run}
        if set(pair) != {0, 1}:
            continue
        stream, long = pair[0], pair[1]
        at = [stream["sent_s"] + seconds - long["sent_s"] for seconds in stream["times_s"]]
        colour = colours[stream["system"]]
        axes.step(at, range(1, len(at) + 1), where="post", color=colour, label=stream["system"])
        axes.axvline(long["times_s"][0], color=colour, linestyle=":", linewidth=1)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_xlabel("s since the long prompt was sent; dotted: its first text")
    axes.set_ylabel("texts of the stream")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


PICTURES = {"throughput.png": throughput, "ttft.png": ttft, "gaps.png": gap_shares, "arrival.png": arriving}


def colours_of(found: Sequence[Line]) -> Mapping[str, str]:
    """Returns the colour of each system, ours as in the other pictures."""
    more = iter(_MORE_COLOURS * 4)
    return {system: COLOURS.get(system) or next(more) for system in dict.fromkeys(line["system"] for line in found)}


def _add_legend(figure: Figure, colours: Mapping[str, str]) -> None:
    handles = [Line2D([], [], color=colour, marker="o", label=system) for system, colour in colours.items()]
    figure.legend(handles=handles, fontsize=8, ncols=4, loc="outside lower center")


def _figure(title: str, found: Sequence[Line]) -> Figure:
    figure = titled_figure(title, list(found))
    figure.set_size_inches(SIZE)
    return figure


if __name__ == "__main__":
    sys.exit(main())
