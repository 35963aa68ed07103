"""The contexts of a run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.e2e.__main__ import parse
from bench.e2e.run import Run
from tests.bench.e2e.runs import SIZES


def test_contexts_are_named_in_k_and_m_and_the_longest_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    args = parse(["--out", str(tmp_path), *SIZES])
    subject = SimpleNamespace(plan=lambda available_bytes: SimpleNamespace(largest_context=300_000))
    fake: Any = SimpleNamespace(args=args, available=0, subject=lambda point: subject)
    assert [Run.context(fake, name, "dense", 1) for name in ("8k", "1m", "300", "longest")] == [
        8192,
        2**20,
        300,
        4 * 65536,
    ]
