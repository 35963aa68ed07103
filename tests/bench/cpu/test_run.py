"""Who is measured on a CPU in which order, what is missing, resumed and counted."""

import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.cpu.medians import Point, medians
from tests.bench.cpu.fakes import a_run, fake, lines_of


def test_rounds_are_interleaved_and_begin_with_another_system_each_time(tmp_path: Path, asked: Path):
    run = a_run(tmp_path, [fake(asked, "a"), fake(asked, "b", "llama.cpp")], "--rounds", "2")
    assert run.part("single")
    order = [(line["round"], line["length"], line["system"]) for line in lines_of(tmp_path)]
    assert order == [
        *((0, 8, "a"), (0, 8, "b"), (0, 16, "a"), (0, 16, "b")),
        *((1, 8, "b"), (1, 8, "a"), (1, 16, "b"), (1, 16, "a")),
    ]
    requests = asked.read_text().splitlines()
    assert sorted(requests) == sorted(["a 8 4", "a 16 4", "b 8 4", "b 16 4"] * 2 + ["a 8 4", "b 8 4"])  # and warm-ups
    line = lines_of(tmp_path)[0]
    assert line["prefill_tok_per_s"] == 1000.0
    assert line["ms_per_token"] == pytest.approx(5.0)
    assert {"sources", "key", "commit", "date", "load", "threads", "model", "library"} <= line.keys()


def test_a_second_run_measures_what_is_missing_and_nothing_else(tmp_path: Path, asked: Path):
    systems = [fake(asked, "a"), fake(asked, "b", "llama.cpp")]
    stopped = a_run(tmp_path, systems, "--rounds", "1", "--minutes", "0")
    assert not stopped.part("single")
    assert not (tmp_path / "results.jsonl").exists()
    assert a_run(tmp_path, systems, "--rounds", "1", "--lengths", "8").part("single")
    asked.unlink()
    assert a_run(tmp_path, systems, "--rounds", "1").part("single")
    assert "a 16 4" in asked.read_text()
    assert len(lines_of(tmp_path)) == 4
    asked.unlink()
    assert a_run(tmp_path, systems, "--rounds", "1").part("single")
    assert not asked.exists()
    assert a_run(tmp_path, systems, "--rounds", "1", "--steps", "2").part("single"), "other steps are another result"
    assert len(lines_of(tmp_path)) == 8


class Impatient(queue.Queue[Any]):
    """A queue whose time is over as soon as a worker says that it hangs, however busy the machine is."""

    flag: Path

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        del block, timeout
        while True:
            try:
                return super().get(timeout=0.05)
            except queue.Empty:
                if self.flag.exists():
                    self.flag.unlink()
                    raise


def test_a_worker_that_fails_or_hangs_costs_its_own_lines_only(
    tmp_path: Path, asked: Path, monkeypatch: pytest.MonkeyPatch
):
    Impatient.flag = asked.with_name(f"{asked.name}.hangs")
    monkeypatch.setattr("bench.cpu.process.queue", SimpleNamespace(Queue=Impatient, Empty=queue.Empty))
    systems = [fake(asked, "bad", fails_at=8), fake(asked, "slow", hangs_at=16), fake(asked, "gone", dies=True)]
    run = a_run(tmp_path, [*systems, fake(asked, "good")], "--rounds", "1")
    assert run.part("single")
    errors = {(line["part"], line["system"], line["length"]): line["reason"] for line in lines_of(tmp_path, "error")}
    assert "out of memory" in errors["single", "bad", 8]
    assert "no answer within" in errors["single", "slow", 16]
    assert "no such model" in errors["single", "gone", 8]
    measured = {(line["system"], line["length"]) for line in lines_of(tmp_path) if line["part"] == "single"}
    assert {("good", 8), ("good", 16), ("slow", 8)} <= measured
    before = len(lines_of(tmp_path, "error"))
    assert a_run(tmp_path, systems, "--rounds", "1").part("single")
    assert len(lines_of(tmp_path, "error")) == before, "what failed is not tried again"
    assert a_run(tmp_path, systems[2:], "--rounds", "1", "--retry").part("single")
    assert len(lines_of(tmp_path, "error")) > before


def test_fresh_processes_tell_first_tokens_and_memory(tmp_path: Path, asked: Path):
    systems = [fake(asked, "dense", ms=0.1), fake(asked, "peer", "transformers", ms=0.1)]
    run = a_run(tmp_path, systems, "--rounds", "1")
    for part in ("start", "programs", "memory", "long"):
        assert run.part(part)
    lines = lines_of(tmp_path)
    starts = [(line["system"], line["cache"]) for line in lines if line["part"] == "start"]
    assert starts == [("dense", "cold"), ("dense", "warm"), ("peer", "warm")]
    assert all(0 < line["first_token_s"] < line["answer_s"] < 60 for line in lines if line["part"] == "start")
    assert [line["grown"] for line in lines if line["part"] == "programs"] == [0]
    assert {line["system"] for line in lines if line["part"] == "long"} == {"dense"}
    numbers = medians(lines)
    assert numbers[Point("memory", "dense", 16, 1, "warm", "plan_ratio")].median == pytest.approx(1.02)
