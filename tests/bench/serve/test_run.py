"""A run: what is measured in which order, written as it goes, and not measured again."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.cpu.systems import our_system
from bench.serve.__main__ import parse
from bench.serve.run import Run, changed
from bench.serve.systems import System
from bench.serve.workloads import SHAPES
from lserve_jax.engine.setup import DEFAULT_MODEL

SMALL = ["--clients", "2", "--turns", "2", "--document", "60", "--answer", "3"]


def a_run(folder: Path, systems: list[System], *arguments: str) -> Run:
    settings = ["--out", str(folder / "out"), "--work", str(folder), "--baselines", "", "--workloads", "short"]
    return Run(parse([*settings, *SMALL, *arguments]), systems)


def lines_of(folder: Path, file: str = "results.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / file).read_text(encoding="utf-8").splitlines()]


def test_a_workload_is_asked_for_and_every_request_written(tmp_path: Path, asked: Path, fake: System):
    assert a_run(tmp_path, [fake], "--workloads", "short,documents").all()
    bodies = [json.loads(line) for line in asked.read_text().splitlines()]
    assert [one["max_tokens"] for one in bodies] == [8, 8, 3, 3, 3, 3] * 2, "two of warm-up, then two by two"
    for one in bodies:
        assert one["stream"]
        assert one["ignore_eos"]
        assert (one["model"], one["temperature"]) == ("bench", 0.0)
    short, documents = lines_of(tmp_path)
    assert (short["kind"], short["name"], short["requests"], short["errors"]) == ("run", "short", 4, 0)
    assert short["completion_tokens"] == 12
    assert short["cached_tokens"] is None
    assert short["facts"] == {"fake": "1"}
    assert {"key", "sources", "commit", "date", "load", "threads", "start_s", "peak_bytes", "limits"} <= short.keys()
    assert not [part for part in short["command"] if "/" in part], "no folders of this machine"
    assert short["command"][short["command"].index("--parallel") + 1] == "2"
    assert documents["shape"]["document"] == 60
    requests = lines_of(tmp_path, "requests.jsonl")
    assert sorted((one["name"], one["script"], one["turn"]) for one in requests) == [
        (name, script, turn) for name in ("documents", "short") for script in range(2) for turn in range(2)
    ]
    assert {one["run"] for one in requests} == {short["run"], documents["run"]}
    assert all(len(one["times_s"]) == 3 for one in requests)


def test_a_second_run_measures_what_is_missing_and_nothing_else(tmp_path: Path, asked: Path, fake: System):
    assert not a_run(tmp_path, [fake], "--minutes", "0").all()
    assert not (tmp_path / "out").exists()
    assert a_run(tmp_path, [fake]).all()
    asked.unlink()
    assert a_run(tmp_path, [fake]).all()
    assert not asked.exists()
    assert a_run(tmp_path, [fake], "--rounds", "2").all()
    assert [line["round"] for line in lines_of(tmp_path)] == [0, 1]
    for other in (["--answer", "2"], ["--rate", "1000"], ["--ttft-limit", "3"]):
        assert a_run(tmp_path, [fake], *other).all(), "another result"
    assert len(lines_of(tmp_path)) == 5
    assert lines_of(tmp_path)[3]["rate"] == 1000


def test_rounds_begin_with_another_system_each_time_and_have_other_prompts(tmp_path: Path, asked: Path, fake: System):
    other = System("other", "llama.cpp", fake.program, fake.environment)
    assert a_run(tmp_path, [fake, other], "--rounds", "2").all()
    assert [line["system"] for line in lines_of(tmp_path)] == ["fake", "other", "other", "fake"]
    texts = [json.loads(line)["messages"][0]["content"] for line in asked.read_text().splitlines()]
    asked_for = [set(texts[6 * n + 2 : 6 * n + 6]) for n in range(4)]
    assert asked_for[0] == asked_for[1]
    assert asked_for[2] == asked_for[3]
    assert not asked_for[0] & asked_for[2]


def test_a_server_that_refuses_or_does_not_start_is_an_error_and_is_tried_again_on_request(
    tmp_path: Path, asked: Path, fake: System, monkeypatch: pytest.MonkeyPatch
):
    del asked
    refusing = System("refusing", "llama.cpp", fake.program, {**fake.environment, "FAKE_REFUSES": "1"})
    absent = System("absent", "llama.cpp", ("/no/such/program",), {})
    assert a_run(tmp_path, [refusing, absent]).all()
    first, second = lines_of(tmp_path)
    assert first["kind"] == second["kind"] == "error"
    assert first["reason"].startswith("no request was answered: status 429")
    assert second["reason"] == "/no/such/program: No such file or directory"
    assert a_run(tmp_path, [refusing, absent]).all()
    assert len(lines_of(tmp_path)) == 2
    assert a_run(tmp_path, [System("refusing", "llama.cpp", fake.program, fake.environment)], "--retry").all()
    assert [line["kind"] for line in lines_of(tmp_path)] == ["error", "error", "run"]


def test_an_arriving_prompt_has_its_own_numbers(tmp_path: Path, asked: Path, fake: System):
    del asked
    assert a_run(tmp_path, [fake], "--workloads", "long_arrival", "--answer", "40").all()
    (line,) = lines_of(tmp_path)
    assert line["requests"] == 4
    assert line["rate"] == 0
    assert {one["stage"] for one in lines_of(tmp_path, "requests.jsonl")} == {
        "long prompt alone",
        "stream alone",
        "both",
    }


def test_the_command_line_changes_what_a_workload_has(tmp_path: Path):
    args = a_run(tmp_path, []).args
    assert changed(SHAPES["short"], args).document == 0
    assert changed(SHAPES["chat"], args).document == 60
    long = changed(SHAPES["long_arrival"], args)
    assert (long.clients, long.document, long.answer) == (2, SHAPES["long_arrival"].document, 3)
    assert changed(SHAPES["short"], parse(["--out", "x"])) == SHAPES["short"]


def test_baselines_are_of_ours_alone(tmp_path: Path, fake: System, monkeypatch: pytest.MonkeyPatch):
    called: list[tuple[str, int]] = []

    def baseline(opened: Any, seed: int, shapes: Any, folder: Path) -> dict[str, Any]:
        called.append((opened.system.name, seed))
        assert shapes["short"].clients == 2
        assert folder == tmp_path
        return {"tok_per_s": 5.0}

    monkeypatch.setattr("bench.serve.run.BASELINES", {"generate": baseline})
    ours = System("lserve", "ours", base=our_system("lserve", DEFAULT_MODEL))
    run = a_run(tmp_path, [ours, fake], "--workloads", "", "--baselines", "generate", "--rounds", "2")
    assert run.all()
    assert called == [("lserve", 0), ("lserve", 1)]
    assert [line["kind"] for line in lines_of(tmp_path)] == ["baseline"] * 2
