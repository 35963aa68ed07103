"""Tables and pictures as files."""

import json
from pathlib import Path

import pytest

from bench.cpu import report
from bench.cpu.medians import medians
from tests.bench.cpu.samples import RESULTS


def test_the_report_and_pictures_are_files_beside_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    missing = {"kind": "missing", "system": "llama.cpp Q4_1", "reason": "not installed"}
    text = "".join(json.dumps(line) + "\n" for line in [*RESULTS, missing])
    (tmp_path / "results.jsonl").write_text(text, encoding="utf-8")
    assert report.main([str(tmp_path)]) == 0
    said = (tmp_path / "targets.txt").read_text(encoding="utf-8")
    assert said in capsys.readouterr().out
    assert "missing: llama.cpp Q4_1: not installed" in said
    assert "first token as transformers f32: dense 1/1, lserve 1/1" in said
    assert len((tmp_path / "medians.jsonl").read_text(encoding="utf-8").splitlines()) == len(medians(RESULTS))
    pytest.importorskip("matplotlib")
    from bench.cpu import plots

    assert plots.main([str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == set(plots.PICTURES)
    assert report.main([str(tmp_path / "empty")]) == 1
