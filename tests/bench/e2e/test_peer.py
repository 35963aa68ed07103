"""The peer of whole models."""

import argparse
from pathlib import Path

import pytest

from bench.e2e.peer import peer


def test_the_peer_is_left_out_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    peer(argparse.Namespace(model="tiny", out=tmp_path, retry=False))
    said = capsys.readouterr().out
    assert said.startswith("peer: left out: ")
    assert said.count("\n") == 1
