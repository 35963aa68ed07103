"""Weights that are made for peers."""

from pathlib import Path

import pytest

from bench.cpu.weights import made


def test_weights_appear_whole_and_are_made_once(tmp_path: Path):
    def fails(target: Path) -> None:
        target.write_text("half")
        raise ValueError("disk full")

    with pytest.raises(ValueError, match="disk full"):
        made(tmp_path / "x" / "weights", fails)
    assert not list((tmp_path / "x").iterdir())
    assert made(tmp_path / "x" / "weights", lambda target: target.mkdir()).is_dir()
    assert made(tmp_path / "x" / "weights", fails).is_dir()
