"""The run on a GPU loses nothing to a crash, a hang, a missing peer or an interruption: on a CPU, with tiny shapes."""

import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import parts, run
from bench.log import is_outcome, read_lines

TASKS = """
import os, sys, time
from pathlib import Path
from bench.log import Log
log = Log(Path(sys.argv[1]))
for name in ("first", "bad", "last"):
    if log.begin(["task", name]):
        if name == "bad":
            {bad}
        log.end(["task", name], {{"kind": "done"}})
"""


class Clock:
    """The clock of the supervisor: it stands still until a task says that it hangs; then many seconds have passed."""

    def __init__(self, flag: Path, seconds: float) -> None:
        self._flag, self._seconds = flag, seconds
        self._begin = time.time()  # tasks write the real time into their lines
        self.sleep = time.sleep

    def time(self) -> float:
        return self._begin + self._seconds * self._flag.exists()

    monotonic = time


def hang(flag: Path) -> str:
    return f"Path({str(flag)!r}).touch() or time.sleep(100_000)"


def run_parts(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    bads: dict[str, str],
    *,
    minutes: float = 1000.0,
    task_seconds: float | None = 1000.0,
) -> list[Any]:
    """Runs parts of three tasks each, whose second one does something else; the lines that they leave."""
    for name, bad in bads.items():
        code = TASKS.format(bad=bad).replace('"task"', f'"{name}"')
        part = parts.Part(1.0, lambda run, _, code=code: ["-c", code, str(run.results)], lambda _: [], task_seconds)
        monkeypatch.setitem(parts.PARTS, name, part)
    run.run_parts(parts.Run(folder, "tiny", 3), list(bads), minutes)
    return read_lines(folder / parts.RESULTS)


def outcomes(lines: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [(*line["key"], line["kind"]) for line in lines if is_outcome(line)]


def test_a_crash_and_a_hang_cost_one_task_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    flag = tmp_path / "hangs"
    monkeypatch.setattr("bench.gpu.supervise.time", Clock(flag, 1500))
    lines = run_parts(tmp_path, monkeypatch, {"crash": "os.abort()", "hang": hang(flag), "fine": "pass"})
    assert outcomes(lines) == [
        (part, task, "error" if (part, task) in (("crash", "bad"), ("hang", "bad")) else "done")
        for part in ("crash", "hang", "fine")
        for task in ("first", "bad", "last")
    ]
    reasons = [line["reason"] for line in lines if line["kind"] == "error"]
    assert reasons == ["the process ended with status -6", "a task took more than 1000 s"]
    assert [line["ended"] for line in lines if line["kind"] == "part"] == ["done"] * 3
    assert "not measured" in (tmp_path / parts.TARGETS).read_text()
    assert (tmp_path / parts.TARGETS).read_text() in capsys.readouterr().out


def test_a_part_that_runs_over_its_box_is_continued_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flag, hangs = tmp_path / "flag", tmp_path / "hangs"
    monkeypatch.setattr("bench.gpu.supervise.time", Clock(hangs, 1e6))
    slow = f"Path({str(flag)!r}).exists() or {hang(hangs)}"
    lines = run_parts(tmp_path, monkeypatch, {"slow": slow, "fine": "pass"}, task_seconds=None)
    assert "out of time" in next(line["ended"] for line in lines if line["kind"] == "part")
    assert outcomes(lines)[0] == ("slow", "first", "done")
    assert ("fine", "last", "done") in outcomes(lines)
    flag.touch()
    lines = run_parts(tmp_path, monkeypatch, {"slow": slow, "fine": "pass"})
    done = outcomes(lines)
    assert sorted(done) == sorted(
        (part, task, "done") for part in ("slow", "fine") for task in ("first", "bad", "last")
    )


def test_a_process_that_cannot_start_its_tasks_ends_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = parts.Part(1.0, lambda *_: ["-c", "raise SystemExit(3)"], lambda _: [])
    monkeypatch.setitem(parts.PARTS, "broken", broken)
    run.run_parts(parts.Run(tmp_path, "tiny", 3), ["broken"], 0.2)
    assert read_lines(tmp_path / parts.RESULTS)[-1]["ended"] == "the process ended with status 3"
