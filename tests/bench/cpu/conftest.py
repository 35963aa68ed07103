"""What the tests of the bench on a CPU share."""

from pathlib import Path

import pytest

from tests.bench.cpu.fakes import FAKE_WORKER


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What fake workers were asked for, a line a request: name, length, steps."""
    (tmp_path / "worker.py").write_text(FAKE_WORKER)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "asked.txt"))
    return tmp_path / "asked.txt"
