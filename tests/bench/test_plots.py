"""Pictures of what the benches wrote."""

import json
from pathlib import Path

import pytest

from tests.bench.e2e.synthetic import synthetic
from tests.bench.kernels.lines import KERNELS

pytest.importorskip("matplotlib")

from bench import plots


def test_all_pictures_are_drawn_of_synthetic_results(tmp_path: Path):
    (tmp_path / "e2e.jsonl").write_text("".join(json.dumps(line) + "\n" for line in synthetic()), encoding="utf-8")
    (tmp_path / "kernels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in KERNELS), encoding="utf-8")
    assert plots.main([str(tmp_path)]) == 0
    for name in ("latency.png", "speedup.png", "roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_no_picture_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert plots.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("not drawn") == 3
    (tmp_path / "kernels.jsonl").write_text(json.dumps(KERNELS[0]) + "\n{half a li", encoding="utf-8")
    assert plots.main([str(tmp_path)]) == 0
    assert [file.name for file in tmp_path.glob("*.png")] == ["roofline.png"]
