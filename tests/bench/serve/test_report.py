"""Tables, targets and pictures as files."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.serve import report
from bench.serve.report import TARGETS, Numbers, results, verdict
from bench.serve.workloads import BOTH
from tests.bench.serve.fakes import request

LABELS = {"sources": "new", "model": "m", "threads": 2, "jax": "1", "device": "cpu", "commit": "c", "date": "d"}


def line(name: str, system: str, library: str, number: int = 0, **fields: Any) -> dict[str, Any]:
    kind = "baseline" if name in ("generate", "second_question", "restore") else "run"
    labels = {"kind": kind, "name": name, "system": system, "library": library, "round": number}
    labels["run"] = f"{name} {system}"
    return {**labels, "facts": {library: "1.2"}, **LABELS, **fields}


LINES = [
    line("short", "lserve", "ours", tok_per_s=1.0, sources="old"),
    *(line("short", "lserve", "ours", n, tok_per_s=rate, good_tok_per_s=90.0) for n, rate in enumerate((80, 95, 96))),
    line("generate", "lserve", "ours", tok_per_s=100.0),
    line("documents", "lserve", "ours", tok_per_s=30.0, gap_p99_s=0.2, prompt_tokens=1000, cached_tokens=750),
    line("documents", "llama.cpp F16", "llama.cpp", tok_per_s=10.0, gap_p99_s=0.1, prompt_tokens=1000),
    line("documents", "llama.cpp flash", "llama.cpp", tok_per_s=15.0, gap_p99_s=0.4),
    line("documents", "transformers", "transformers", tok_per_s=99.0, gap_p99_s=0.01),
    line("long_arrival", "lserve", "ours", longest_gap_s=0.55, chunk_s=0.3, burst_s=0.2, tok_per_s=9.0),
    line("second_question", "lserve", "ours", ratio=7.5, first_s=8.0, later_s=[1.0, 0.5]),
]


def test_targets_are_of_medians_and_of_the_best_setting_of_the_peer():
    numbers = Numbers(results(LINES))
    values = [target.value(numbers, "lserve") for target in TARGETS]
    assert values == pytest.approx([0.95, 1.1, 7.5, None, 2.0, 2.0])
    assert [verdict(target, value) for target, value in zip(TARGETS, values, strict=True)] == [
        "0.95 PASS",
        "1.10 PASS",
        "7.50 FAIL",
        "not measured",
        "2.00 PASS",
        "2.00 FAIL",
    ]
    assert all(target.value(Numbers([]), "lserve") is None for target in TARGETS)


def test_a_number_that_one_round_lacks_is_not_given():
    found = [*LINES, line("documents", "lserve", "ours", 1, tok_per_s=40.0)]
    assert Numbers(found).get("documents", "lserve", "gap_p99_s") is None
    assert Numbers(found).get("documents", "lserve", "tok_per_s") == 35.0
    assert Numbers(results(LINES)).get("documents", "lserve", "cached_share") == 0.75
    assert Numbers(results(LINES)).get("documents", "llama.cpp F16", "cached_share") is None


def test_the_report_and_pictures_are_files_beside_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    more = [
        {"kind": "missing", "system": "transformers bf16", "reason": "not installed"},
        {"kind": "error", "name": "chat", "system": "dense", "reason": "it broke", "sources": "new"},
        {"kind": "error", "name": "chat", "system": "lserve", "reason": "long ago", "sources": "old"},
    ]
    asked = [
        request(0, [0.5, 0.6, 0.7], run="short lserve", system="lserve"),
        request(0, [0.5, 0.9], run="documents lserve", system="lserve", name="documents", turn=1),
        request(0, [0.5, 5.0], run="long_arrival lserve", system="lserve", name="long_arrival", stage=BOTH),
        request(1, [2.5], run="long_arrival lserve", system="lserve", name="long_arrival", stage=BOTH, script=1),
        request(0, [9.0], run="of older sources", system="gone", name="chat"),
        request(0, [], run="short lserve", system="lserve", error="broken"),
    ]
    for name, lines in (("results", [*LINES, *more]), ("requests", asked)):
        text = "".join(json.dumps(one) + "\n" for one in lines)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    assert report.main([str(tmp_path)]) == 0
    said = (tmp_path / "targets.txt").read_text(encoding="utf-8")
    assert said in capsys.readouterr().out
    assert "missing: transformers bf16: not installed" in said
    assert "failed: chat dense: it broke" in said
    assert "long ago" not in said
    assert "second_question lserve: ratio 7.5, first_s 8.0, later_s [1.0, 0.5]" in said
    assert "ours 1.2" in said
    pytest.importorskip("matplotlib")
    from bench.serve import plots

    assert plots.main([str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == set(plots.PICTURES)


def test_a_folder_without_results_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert report.main([str(tmp_path)]) == 1
    assert "holds no measurements" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    from bench.serve import plots

    assert plots.main([str(tmp_path)]) == 1
