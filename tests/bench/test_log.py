"""The log of the benches."""

from pathlib import Path

import pytest

from bench.log import Log


def test_a_torn_line_costs_itself_alone(tmp_path: Path):
    log = Log(tmp_path / "log.jsonl")
    log.write({"kind": "part", "part": "a"})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "ker')
    log.write({"kind": "part", "part": "b"})
    assert [line["part"] for line in log.lines()] == ["a", "b"]


def test_results_of_other_sources_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = Log(tmp_path / "log.jsonl")
    assert log.begin(["a"])
    log.end(["a"], {"kind": "done"})
    assert not log.begin(["a"])
    monkeypatch.setattr("bench.log.sources", lambda: "others")
    assert log.begin(["a"])
