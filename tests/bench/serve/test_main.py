"""The command line of the bench of servers."""

import json
from pathlib import Path

import pytest

from bench.serve.__main__ import main, parse
from bench.serve.server import Server, free_port
from bench.serve.systems import Sizes, System


def test_arguments_are_checked():
    args = parse(["--out", "x", "--workloads", "short,chat", "--ours", "dense", "lserve:dense_layers=0,1"])
    assert args.workloads == ["short", "chat"]
    assert args.ours == ["dense", "lserve:dense_layers=0,1"]
    assert parse(["--out", "x", "--ours"]).ours == []
    for wrong in (["--workloads", "shrt"], ["--baselines", "x"], ["--extra", "{"]):
        with pytest.raises(SystemExit):
            parse(["--out", "x", *wrong])


def test_a_setting_or_peer_that_cannot_be_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for wrong in (["--ours", "lserve:sink=-1"], ["--peers", "vllm"]):
        assert main(["--out", str(tmp_path), "--work", str(tmp_path), *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_server_that_runs_already_is_measured_and_left_running(
    tmp_path: Path, asked: Path, fake: System, capsys: pytest.CaptureFixture[str]
):
    port, out = free_port(), tmp_path / "out"
    url = f"http://127.0.0.1:{port}"
    command = ["--out", str(out), "--workloads", "chat", "--url", url, "--clients", "2", "--turns", "2"]
    command += ["--document", "40", "--answer", "3", "--served-model", "theirs", "--extra", '{"top_k": 1}']
    with Server(fake.command(Sizes(1, 1), port), fake.environment, url, tmp_path / "log.txt") as server:
        server.wait(300)
        assert main(command) == 0
        assert main(command) == 0
        server.wait(300)
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    environment, run, again = lines
    assert environment["kind"] == again["kind"] == "environment"
    assert environment["command"].startswith("python -m bench.serve --out")
    assert (run["kind"], run["system"], run["requests"], run["errors"]) == ("run", url, 4, 0)
    bodies = [json.loads(line) for line in asked.read_text().splitlines()]
    assert len(bodies) == 6
    assert all((one["model"], one["top_k"]) == ("theirs", 1) for one in bodies)
    later = [one["messages"] for one in bodies if len(one["messages"]) == 4]
    assert len(later) == 2
    assert [one["role"] for one in later[0]] == ["system", "user", "assistant", "user"]
    assert later[0][2]["content"] == "0 1 2 "
    assert "all that was asked for is there" in capsys.readouterr().out
    assert (out / "targets.txt").exists()
