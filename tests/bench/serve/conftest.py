"""What the tests of the bench of servers share."""

import os
import sys
from pathlib import Path

import pytest

from bench.serve.systems import System
from tests.bench.serve.fakes import FAKE_PROGRAM


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What fake servers were asked for, a body per line."""
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "asked.txt"))
    return tmp_path / "asked.txt"


@pytest.fixture
def fake(asked: Path) -> System:
    """A server in a process of its own, started as llama.cpp's."""
    program = asked.parent / "program.py"
    program.write_text(FAKE_PROGRAM)
    return System("fake", "llama.cpp", (sys.executable, str(program)), dict(os.environ), facts={"fake": "1"})
