"""From rows to cells, tables and pictures."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lserve_jax.evaluation import ablations, plots
from lserve_jax.evaluation.statistics import difference
from lserve_jax.evaluation.summary import select, summarise
from lserve_jax.evaluation.table import format_tables
from lserve_jax.evaluation.variants import parse_variant

SPARSE = "lserve:page_size=16+sub_page_size=4+sink=16+local=64+prefill_local=64+token_budget=25%"


def needle(index: int, variant: str, score: float, length: int = 64) -> dict[str, Any]:
    key = {"task": "niah", "length": length, "index": index, "variant": variant}
    work = {"streaming_share": 0.5, "pages_read_ratio": 0.25, "attention_recall": None, "info": {"depth": index / 9}}
    return key | work | {"score": score, "nll": 0.1 + index / 10, "token_accuracy": score}


def rows() -> list[dict[str, Any]]:
    found = []
    for variant in ("dense", SPARSE):
        for length in (64, 128):
            hits = [1.0] * 9 + [0.0 if variant == SPARSE else 1.0]
            found += [needle(index, variant, hit, length) for index, hit in enumerate(hits)]
            more = 0.01 if variant == SPARSE else 0.0
            curve = {"nll_by_position": [3 + more, 2 + more], "streaming_share": 0.5, "pages_read_ratio": 0.5}
            key = {"length": length, "variant": variant}
            found += [
                {"task": "perplexity", "index": i, "nll": 2.5 + i + more, "tail_nll": 2.0 + i, **key, **curve}
                for i in range(3)
            ]
            agrees = {"agreement": 1 - more, "agreement_by_position": [1.0, 1 - 2 * more]}
            found.append({"task": "drift", "index": 0, "nll": 0.5 + more, **key, **curve, **agrees})
    return found


def test_cells_are_means_and_paired_differences():
    cells = summarise(rows(), "dense")
    assert [(cell["task"], cell["length"], cell["variant"]) for cell in cells] == [
        (task, length, variant)
        for task in ("niah", "perplexity", "drift")
        for length in (64, 128)
        for variant in ("dense", SPARSE)
    ]
    dense, sparse = select(cells, task="niah", length=64)
    assert (dense["n"], dense["is_reference"], sparse["is_reference"]) == (10, True, False)
    assert (dense["score"]["mean"], sparse["score"]["mean"]) == (1.0, 0.9)
    expected = difference([1.0] * 9 + [0.0], [1.0] * 10, is_score=True)
    assert sparse["score"]["difference"] == {"mean": expected.mean, "low": expected.low, "high": expected.high, "n": 10}
    assert dense["score"]["difference"] is None
    assert sparse["nll"]["difference"]["mean"] == 0
    assert (sparse["pages_read_ratio"], sparse["attention_recall"], sparse["streaming_share"]) == (0.25, None, 0.5)
    (perplexity,) = select(cells, task="perplexity", length=128, variant=SPARSE)
    assert perplexity["nll"]["mean"] == pytest.approx(3.51)
    assert perplexity["nll"]["difference"]["mean"] == pytest.approx(0.01)
    assert perplexity["nll_by_position"] == [3.01, 2.01]
    json.dumps(cells, allow_nan=False)


def test_only_prompts_that_both_have_seen_are_compared():
    found = [needle(0, "dense", 1.0), needle(1, "dense", 0.0), needle(1, SPARSE, 1.0), needle(2, SPARSE, 1.0)]
    sparse = summarise(found, "dense")[1]
    assert sparse["score"]["difference"]["n"] == 1
    assert sparse["score"]["difference"]["mean"] == 1.0
    alone = summarise(found[2:], "dense")[0]
    assert alone["score"]["difference"] is None


def test_divergences_have_an_interval_and_no_difference():
    found = [
        row | ({"kl": 0.5 + row["index"], "same_token": 0.9} if row["variant"] == SPARSE else {}) for row in rows()
    ]
    needles = [row for row in found if row["task"] == "niah" and row["length"] == 64]
    needles[-1].pop("kl")  # as if measured without the reference's distributions
    dense, sparse = summarise(needles, "dense")
    assert not {"kl", "same_token"} & dense.keys()
    expected = difference([0.5 + index for index in range(9)], [0.0] * 9, is_score=False)
    assert sparse["kl"] == {"mean": expected.mean, "low": expected.low, "high": expected.high, "n": 9}
    assert sparse["same_token"] == {
        "mean": pytest.approx(0.9),
        "low": pytest.approx(0.9),
        "high": pytest.approx(0.9),
        "n": 10,
    }
    head, first, second = format_tables([dense, sparse]).splitlines()
    assert "KL [95%]" in head and "same % [95%]" in head
    estimates = (f"{value:.5f}" for value in (expected.mean, expected.low, expected.high))
    assert "{} [{}, {}]  90.0 [".format(*estimates) in second
    assert "[" not in first


def test_tables_are_aligned_and_say_points_and_percent():
    text = format_tables(summarise(rows(), "dense"))
    tasks, perplexity, drift = text.split("\n\n")
    assert tasks.splitlines()[0].split()[:6] == ["task", "length", "variant", "n", "score", "%"]
    line = next(line for line in tasks.splitlines() if SPARSE in line and " 64 " in line)
    cell = select(summarise(rows(), "dense"), task="niah", length=64, variant=SPARSE)[0]["score"]["difference"]
    low, high = (f"{100 * cell[end]:+.1f}".replace("-", "−") for end in ("low", "high"))
    assert f" 90.0  −10.0 [{low}, {high}] " in line
    assert line.endswith("50.0     25.0         –          –")
    (sparse,) = (line for line in perplexity.splitlines() if SPARSE in line and "128" in line)
    assert f"{math.exp(3.51):.3f}  +1.01 [+1.01, +1.01]" in sparse
    assert "99.0" in drift.splitlines()[-1]
    for table in (tasks, perplexity, drift):
        head, *others = table.splitlines()
        assert all(line[: head.index("variant")].rstrip()[-1].isdigit() for line in others)


def test_a_grid_holds_the_mean_score_by_depth_and_length():
    found = [needle(9, "dense", 1.0), needle(9, "dense", 0.0), needle(0, "dense", 1.0, length=128)]
    grid = plots.depth_grid(found, [64, 128])
    assert grid[9, 0] == 0.5
    assert grid[0, 1] == 1.0
    assert np.isnan(grid).sum() == 18


def test_pictures_are_drawn_of_what_there_is(tmp_path: Path):
    pytest.importorskip("matplotlib")
    cells = summarise(rows(), "dense")
    names = ["niah.png", "scores.png", "perplexity.png", "drift.png"]
    assert [path.name for path in plots.draw(cells, rows(), tmp_path)] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    only = [row for row in rows() if row["task"] == "drift"]
    assert [path.name for path in plots.draw(summarise(only, "dense"), only, tmp_path)] == ["drift.png"]


def test_long_names_take_no_height_from_what_they_name():
    pytest.importorskip("matplotlib")
    labels = ["dense", *(f"{SPARSE}+head_pattern=random/{seed}+dense_layers=7" for seed in range(6))]
    found = [needle(index, label, 1.0) for label in labels for index in range(2)]
    figure = plots.score_figure(summarise(found, "dense"))
    figure.canvas.draw()  # warns, which fails, where nothing is left of a panel
    (legend,) = figure.legends
    assert legend.get_window_extent().y0 >= 0
    for axes in figure.axes:
        lines = np.diff(sorted(axes.transData.transform([(0, place) for place in range(len(labels) - 1)])[:, 1]))
        assert lines.min() > 0.1 * figure.dpi, "room for a point on each line"
        assert legend.get_window_extent().y1 < axes.bbox.y0


def test_of_a_copy_the_right_tokens_are_drawn():
    copied = needle(9, "dense", 0.0) | {"task": "copy", "token_accuracy": 0.75}
    assert plots.depth_grid([copied], [64])[9, 0] == 0.75
    pytest.importorskip("matplotlib")
    better = copied | {"variant": SPARSE, "token_accuracy": 0.85}
    found = [row | {"index": index} for row in (copied, better) for index in range(2)]
    scores, likelihoods = plots.score_figure(summarise(found, "dense")).axes
    assert [label.get_text() for label in scores.get_yticklabels()] == ["copy (tokens)"]
    assert scores.lines[0].get_xdata() == pytest.approx(10)
    assert likelihoods.lines[0].get_xdata() == pytest.approx(0)


def test_comparisons_are_drawn_with_their_intervals_a_line_each():
    pytest.importorskip("matplotlib")
    scored = [row for row in rows() if row["task"] != "drift"]
    more = [row | ({"kl": 0.01 * (1 + row["index"])} if row["variant"] == SPARSE else {}) for row in scored]
    cells = summarise(more, "dense")
    figure = plots.score_figure(cells)
    assert [axes.get_xlabel().partition(" ")[0] for axes in figure.axes[-3:]] == ["score", "nll", "KL"]
    for panels, length in ((figure.axes[:3], 64), (figure.axes[3:], 128)):
        assert panels[0].get_title(loc="left") == f"{length} tokens"
        assert [label.get_text() for label in panels[0].get_yticklabels()] == ["niah", "perplexity (decoded)"]
        needles, text = (select(cells, task=task, length=length, variant=SPARSE)[0] for task in ("niah", "perplexity"))
        # Perplexity has no score; of both likelihoods, that of decoded tokens counts.
        expected = (
            [(needles["score"]["difference"], 100)],
            [(needles["nll"]["difference"], 1), (text["tail_nll"]["difference"], 1)],
            [(needles["kl"], 1), (text["kl"], 1)],
        )
        for axes, estimates in zip(panels, expected, strict=True):
            points: Any = axes.containers[0]
            assert points.lines[0].get_xdata() == pytest.approx([scale * one["mean"] for one, scale in estimates])
            assert len(set(points.lines[0].get_ydata())) == len(estimates)
            (bars,) = points.lines[2]
            for bar, (one, scale) in zip(bars.get_segments(), estimates, strict=True):
                assert bar[:, 0] == pytest.approx([scale * one["low"], scale * one["high"]])


def test_a_reference_alone_has_no_comparison_to_draw(tmp_path: Path):
    pytest.importorskip("matplotlib")
    only = [row for row in rows() if row["variant"] == "dense" and row["task"] != "drift"]
    drawn = plots.draw(summarise(only, "dense"), only, tmp_path)
    assert [path.name for path in drawn] == ["niah.png", "perplexity.png"]


def test_an_axis_has_the_reference_first_and_its_settings_by_what_they_change(tmp_path: Path):
    settings = ablations.settings(parse_variant(ablations.BASE), ["budget", "reduction"], num_layers=2)
    labels = ["dense", *dict.fromkeys(setting.variant.label for setting in settings)]
    cells = summarise([needle(index, label, 1.0) for label in labels for index in range(3)], "dense")
    axes = ablations.by_axis(settings, cells)
    assert [cell["variant"] for cell in axes["reduction"]] == ["dense", "group_reduction=max", "group_reduction=mean"]
    assert [cell["variant"] for cell in axes["budget"]] == ["dense", *ablations.AXES["budget"]]
    pytest.importorskip("matplotlib")
    assert plots.draw_axis("budget", axes["budget"], tmp_path).read_bytes().startswith(b"\x89PNG")


def test_pictures_without_matplotlib_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ValueError, match=r"plots need matplotlib: pip install 'lserve_jax\[eval\]'"):
        plots.new_figure(1)
