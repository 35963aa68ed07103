"""The one command for a GPU: a whole run, its continuation, and what it would do."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from bench.e2e.__main__ import parse
from bench.gpu.__main__ import main
from bench.gpu.parts import PARTS, RESULTS, Run
from bench.kernels import __main__ as kernels
from bench.kernels.tasks import Task, tasks
from bench.log import is_outcome, read_lines
from bench.peers.tasks import tasks as peer_tasks


def test_a_whole_run_and_its_continuation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    parts = ["environment", "values", "kernels", "peers", "tuning"]
    arguments = ["--out", str(tmp_path), "--workload-set", "tiny", "--repeats", "3", "--minutes", "8"]
    main([*arguments, "--parts", *parts])
    lines = read_lines(tmp_path / RESULTS)
    ended = {line["part"]: line["ended"] for line in lines if line["kind"] == "part"}
    assert ended == dict.fromkeys(parts, "done") | {"values": "not run: no GPU: the suite runs these tests interpreted"}
    results = {tuple(line["key"]): line for line in lines if is_outcome(line)}
    planned = [("kernel", *task) for task in tasks("tiny")] + [("peer", *task) for task in peer_tasks("tiny")]
    assert set(planned) == {key for key in results if key[0] in ("kernel", "peer")}
    assert all(results[key]["kind"] == "kernel" for key in planned if key[0] == "kernel")
    assert results["peer", "decode_dense", "jax_xla", "tiny_mixed"]["kind"] == "peer"
    cudnn = results["peer", "decode_dense", "jax_cudnn", "tiny_mixed"]
    assert (cudnn["kind"], cudnn["reason"]) == ("missing", "JAX sees no GPU")
    assert results["peer", "decode_dense", "fa3", "tiny_mixed"]["kind"] == "missing"
    assert len(list(tmp_path.iterdir())) <= 4
    assert "prefill, dense" in capsys.readouterr().out

    # Interrupted: the line of one result is torn, another one had only begun.
    text = (tmp_path / RESULTS).read_text().splitlines(keepends=True)
    kept = [line for line in text if json.loads(line).get("key") != list(planned[1]) or '"begin"' in line[:20]]
    torn = next(line for line in kept if json.loads(line).get("key") == list(planned[2]) and '"begin"' not in line[:20])
    kept.remove(torn)
    (tmp_path / RESULTS).write_text("".join(kept) + torn[: len(torn) // 2])
    again: list[tuple[str, ...]] = []

    def perform(task: Task, *_: Any, **__: Any) -> dict[str, Any]:
        again.append(("kernel", *task))
        return {"kind": "skip", **task._asdict(), "reason": "a test"}

    monkeypatch.setattr("bench.kernels.__main__.perform", perform)
    out = tmp_path / RESULTS
    for _ in range(2):
        kernels.main(["--workload-set", "tiny", "--out", str(out)])
    assert again == planned[1:3]
    keys = [tuple(line["key"]) for line in read_lines(out) if is_outcome(line)]
    assert len(keys) == len(set(keys)) and set(planned) <= set(keys)


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["--out", str(tmp_path / "none"), "--dry-run"])
    said = capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    assert "kernels: a box of 2.8 minutes" in said
    first = tasks("full")[0]
    assert " ".join(first) in said and "bench.e2e" in said


@pytest.mark.parametrize("part", PARTS)
def test_a_dry_run_of_one_part_names_its_command(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["--out", str(tmp_path / "none"), "--dry-run", "--parts", part])
    head, command, *tasks_ = capsys.readouterr().out.splitlines()
    assert head.startswith(f"{part}: a box of 9.0 minutes")
    assert command.startswith("    $ python -m bench.")
    assert tasks_
    module = command.split()[3]
    assert importlib.util.find_spec(module) is not None
    assert not (tmp_path / "none").exists()


def test_the_command_of_whole_models_is_one_that_they_take(tmp_path: Path):
    command = PARTS["e2e"].command(Run(tmp_path, "full", 30), 1.75)
    assert list(command[:2]) == ["-m", "bench.e2e"]
    assert parse(command[2:]).minutes == 1.75
