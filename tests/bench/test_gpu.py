"""The run on a GPU loses nothing to a crash, a hang, a missing peer or an interruption: on a CPU, with tiny shapes."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, kernels, peers
from bench.measure import Log, is_outcome, read_lines

TASKS = """
import os, sys, time
from pathlib import Path
from bench.measure import Log
log = Log(Path(sys.argv[1]))
for name in ("first", "bad", "last"):
    if log.begin(["task", name]):
        if name == "bad":
            {bad}
        log.end(["task", name], {{"kind": "done"}})
"""


def run_parts(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    bads: dict[str, str],
    *,
    minutes: float = 2.0,
    task_seconds: float | None = 12.0,
) -> list[Any]:
    """Runs parts of three tasks each, whose second one does something else; the lines that they leave."""
    for name, bad in bads.items():
        code = TASKS.format(bad=bad).replace('"task"', f'"{name}"')
        part = gpu.Part(1.0, lambda run, _, code=code: ["-c", code, str(run.results)], lambda _: [], task_seconds)
        monkeypatch.setitem(gpu.PARTS, name, part)
    gpu.run_parts(gpu.Run(folder, "tiny", 3), list(bads), minutes)
    return read_lines(folder / gpu.RESULTS)


def outcomes(lines: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [(*line["key"], line["kind"]) for line in lines if is_outcome(line)]


def test_a_crash_and_a_hang_cost_one_task_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lines = run_parts(tmp_path, monkeypatch, {"crash": "os.abort()", "hang": "time.sleep(1000)", "fine": "pass"})
    assert outcomes(lines) == [
        (part, task, "error" if (part, task) in (("crash", "bad"), ("hang", "bad")) else "done")
        for part in ("crash", "hang", "fine")
        for task in ("first", "bad", "last")
    ]
    reasons = [line["reason"] for line in lines if line["kind"] == "error"]
    assert reasons == ["the process ended with status -6", "a task took more than 12 s"]
    assert [line["ended"] for line in lines if line["kind"] == "part"] == ["done"] * 3
    assert "not measured" in (tmp_path / gpu.TARGETS).read_text()
    assert (tmp_path / gpu.TARGETS).read_text() in capsys.readouterr().out


def test_a_part_that_runs_over_its_box_is_continued_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flag = tmp_path / "flag"
    slow = f"Path({str(flag)!r}).exists() or time.sleep(1000)"
    begin = time.monotonic()
    lines = run_parts(tmp_path, monkeypatch, {"slow": slow, "fine": "pass"}, minutes=0.5, task_seconds=None)
    assert time.monotonic() - begin < 35
    assert "out of time" in next(line["ended"] for line in lines if line["kind"] == "part")
    assert outcomes(lines)[0] == ("slow", "first", "done")
    assert ("fine", "last", "done") in outcomes(lines)
    flag.touch()
    lines = run_parts(tmp_path, monkeypatch, {"slow": slow, "fine": "pass"}, minutes=2)
    done = outcomes(lines)
    assert sorted(done) == sorted(
        (part, task, "done") for part in ("slow", "fine") for task in ("first", "bad", "last")
    )


def test_a_process_that_cannot_start_its_tasks_ends_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = gpu.Part(1.0, lambda *_: ["-c", "raise SystemExit(3)"], lambda _: [])
    monkeypatch.setitem(gpu.PARTS, "broken", broken)
    gpu.run_parts(gpu.Run(tmp_path, "tiny", 3), ["broken"], 0.2)
    assert read_lines(tmp_path / gpu.RESULTS)[-1]["ended"] == "the process ended with status 3"


def test_a_whole_run_and_its_continuation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    parts = ["environment", "values", "kernels", "peers", "tuning"]
    arguments = ["--out", str(tmp_path), "--workload-set", "tiny", "--repeats", "3", "--minutes", "8"]
    gpu.main([*arguments, "--parts", *parts])
    lines = read_lines(tmp_path / gpu.RESULTS)
    ended = {line["part"]: line["ended"] for line in lines if line["kind"] == "part"}
    assert ended == dict.fromkeys(parts, "done") | {"values": "not run: no GPU: the suite runs these tests interpreted"}
    results = {tuple(line["key"]): line for line in lines if is_outcome(line)}
    planned = [tuple(task.key) for task in (*kernels.tasks("tiny"), *peers.tasks("tiny"))]
    assert set(planned) == {key for key in results if key[0] in ("kernel", "peer")}
    assert all(results[key]["kind"] == "kernel" for key in planned if key[0] == "kernel")
    assert results["peer", "decode_dense", "jax_xla", "tiny_mixed"]["kind"] == "peer"
    cudnn = results["peer", "decode_dense", "jax_cudnn", "tiny_mixed"]
    assert (cudnn["kind"], cudnn["reason"]) == ("missing", "JAX sees no GPU")
    assert results["peer", "decode_dense", "fa3", "tiny_mixed"]["kind"] == "missing"
    assert len(list(tmp_path.iterdir())) <= 4
    assert "prefill, dense" in capsys.readouterr().out

    # Interrupted: the line of one result is torn, another one had only begun.
    text = (tmp_path / gpu.RESULTS).read_text().splitlines(keepends=True)
    kept = [line for line in text if json.loads(line).get("key") != list(planned[1]) or '"begin"' in line[:20]]
    torn = next(line for line in kept if json.loads(line).get("key") == list(planned[2]) and '"begin"' not in line[:20])
    kept.remove(torn)
    (tmp_path / gpu.RESULTS).write_text("".join(kept) + torn[: len(torn) // 2])
    again: list[tuple[str, ...]] = []

    def perform(task: kernels.Task, *_: Any, **__: Any) -> dict[str, Any]:
        again.append(tuple(task.key))
        return {"kind": "skip", **task._asdict(), "reason": "a test"}

    monkeypatch.setattr("bench.kernels.perform", perform)
    out = tmp_path / gpu.RESULTS
    for _ in range(2):
        kernels.main(["--workload-set", "tiny", "--out", str(out)])
    assert again == planned[1:3]
    keys = [tuple(line["key"]) for line in read_lines(out) if is_outcome(line)]
    assert len(keys) == len(set(keys)) and set(planned) <= set(keys)


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
    monkeypatch.setattr("bench.measure.sources", lambda: "others")
    assert log.begin(["a"])


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    gpu.main(["--out", str(tmp_path / "none"), "--dry-run"])
    said = capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    assert "kernels: a box of 2.8 minutes" in said
    first = kernels.tasks("full")[0]
    assert " ".join(first) in said and "bench.e2e" in said


def result(kind: str, op: str, implementation: str, workload: str, ms: float, **fields: Any) -> dict[str, Any]:
    line = {"kind": kind, "op": op, "implementation": implementation, "workload": workload, "median_ms": ms}
    return {**line, "bytes": round(ms * 80e6), "limit_gb_per_s": 100.0, "flops": 1000, **fields}  # 80 GB/s


def test_the_table_has_the_worst_of_each_target():
    lines = [
        result("kernel", "prefill_dense", "mosaic_gpu", "llama3_8b_32k_whole", 10.0),
        result("kernel", "prefill_dense", "mosaic_gpu", "llama3_8b_128k_chunk8k", 11.0),
        result("peer", "prefill_dense", "fa3", "llama3_8b_32k_whole", 9.9),
        result("peer", "prefill_dense", "fa3", "llama3_8b_128k_chunk8k", 9.9),
        result("kernel", "prefill_attention", "mosaic_gpu", "llama3_8b_32k_whole", 5.3, flops=500),
        result("kernel", "decode_dense", "mosaic_gpu", "llama3_8b_32k_b8_int8", 1.0, bytes=84 * 10**6),
        result("kernel", "decode_dense", "mosaic_gpu", "llama3_8b_32k_b8", 1.0, bytes=90 * 10**6),
        result("kernel", "decode_dense", "mosaic_gpu", "llama3_8b_32k_int4", 1.0),  # a single sequence
        result("kernel", "decode_dense", "xla", "llama3_8b_32k_b8_int4", 1.0),
        result("kernel", "page_select", "mosaic_gpu", "llama3_8b_128k", 0.02, kernels_us={"score": 9.0, "choose": 5.0}),
        result("kernel", "kv_write_decode", "mosaic_gpu", "llama3_8b_128k_int8", 0.0035, kernels_us="no CUPTI"),
        result("kernel", "kv_write_prefill", "mosaic_gpu", "llama3_8b_128k_chunk8k_int8", 0.01),
    ]
    found = {target.name.split(":")[0]: target for target in gpu.targets(lines)}
    met = {name: target.is_met for name, target in found.items()}
    assert met == {
        "prefill, dense": False,
        "prefill, half streaming": True,
        "decode, bf16, batch >= 8": True,
        "decode, int8, batch >= 8": False,
        "decode, int4, batch >= 8": None,
        "page selector, 128K": True,
        "page selector, 128K, batch 1": True,
        "kv write, decode, batch 1": False,
        "kv write, prefill of 8K": True,
        "(no target) decode, selected pages": None,
    }
    assert found["prefill, dense"].measured == "0.9 (llama3_8b_128k_chunk8k; worst of 2)"
    tests = [{"kind": "test", "key": ["test", "a"], "outcome": "passed"}, {"kind": "error", "key": ["test", "b"]}]
    assert gpu.table([*lines, *tests]).startswith("values: 1 crashed, 1 passed; 0 benches had wrong values")
