"""The bench beside peers on the CPU: who is measured in which order, what is missing, resumed, counted and drawn."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import cpu, cpu_plots, cpu_process, cpu_report, cpu_systems
from bench.cpu_report import Point, Spread
from bench.cpu_systems import System
from bench.cpu_weights import made

TINY = str(Path(__file__).parents[1] / "golden" / "tiny" / "llama3")
FAKE_WORKER = """
import json, os, sys
settings, asked = json.loads(sys.argv[1]), open(os.environ["FAKE_LOG"], "a")
fake = settings.get("fake") or settings["prepare"]["fake"]
if fake.get("dies"):
    sys.exit("no such model")
print(json.dumps({"facts": {"base_bytes": 100, "plan_bytes": 1000, "plan_weight_bytes": 400, "plan_cache_bytes": 600},
                  "rss_bytes": 1000, "peak_bytes": 1100}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    length = len(request["prompt"])
    print(fake["name"], length, request["steps"], file=asked, flush=True)
    if length == fake.get("fails_at"):
        raise ValueError("out of memory")
    if length == fake.get("hangs_at"):
        import time
        time.sleep(60)
    print(json.dumps({"prefill_s": length / fake["rate"], "prefilled": length, "steps": request["steps"],
                      "decode_s": request["steps"] * fake["ms"] / 1e3, "tokens": [1], "compile_s": 2.0,
                      "programs": ["decode"], "num_compilations": 4, "rss_bytes": 1000, "peak_bytes": 1120}))
    sys.stdout.flush()
"""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What fake workers were asked for, a line a request: name, length, steps."""
    (tmp_path / "worker.py").write_text(FAKE_WORKER)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "asked.txt"))
    return tmp_path / "asked.txt"


def fake(asked: Path, name: str, kind: str = "ours", **settings: Any) -> System:
    command = (sys.executable, str(asked.parent / "worker.py"))
    return System(name, kind, command, {"fake": {"name": name, "rate": 1000.0, "ms": 5.0, **settings}})


def a_run(folder: Path, systems: list[System], *arguments: str) -> cpu.Run:
    settings = ["--model", TINY, "--lengths", "8,16", "--batch-lengths", "8", "--steps", "4", "--work", str(folder)]
    return cpu.Run(cpu.parse(["--out", str(folder), *settings, *arguments]), systems)


def lines_of(folder: Path, kind: str = "sample") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


# --- arguments and systems --------------------------------------------------------------------------------------------


def test_arguments_read_lengths_in_thousands_and_settings_with_lists():
    args = cpu.parse(
        ["--out", "x", "--lengths", "128,2k", "--ours", "dense,lserve:dense_layers=0,1+sink=64, streaming"]
    )
    assert args.lengths == [128, 2048]
    assert args.long_lengths == [8192, 32768, 131072]
    assert args.ours == ["dense", "lserve:dense_layers=0,1+sink=64", "streaming"]
    with pytest.raises(SystemExit):
        cpu.parse(["--out", "x", "--parts", "single,fast"])


def test_our_settings_have_names_or_are_written_out():
    named = cpu_systems.our_system("lserve_int8", "some model").settings
    assert named["attention"] == "lserve"
    assert named["kv_dtype"] == "int8"
    assert named["token_budget"] == 1024
    assert cpu_systems.our_system("dense:page_size=32", "some model").settings["page_size"] == 32
    for name in cpu_systems.OURS:
        cpu_systems.our_system(name, "some model")
    with pytest.raises(ValueError, match="preset 'fast'"):
        cpu_systems.our_system("fast", "some model")
    with pytest.raises(ValueError, match="a number of tokens"):
        cpu_systems.our_system("lserve:token_budget=25%", "some model")


def test_a_peer_that_cannot_be_measured_is_missing_with_the_reason(tmp_path: Path):
    pythons = {"transformers": str(tmp_path / "nowhere"), "llama.cpp": None}
    systems, missing = cpu_systems.peer_systems(["transformers bf16", "llama.cpp"], TINY, pythons, tmp_path, 1)
    assert not systems
    assert list(missing) == ["transformers bf16", *(name for name in cpu_systems.PEERS if name.startswith("llama.cpp"))]
    assert "No such file" in missing["transformers bf16"]
    assert missing["llama.cpp F16"] == "--llama-cpp-python names no environment that has it"
    with pytest.raises(ValueError, match="no peer is called 'vllm'"):
        cpu_systems.peer_systems(["vllm"], TINY, pythons, tmp_path, 1)


def test_an_environment_without_the_library_is_told_in_one_line(tmp_path: Path):
    _, missing = cpu_systems.peer_systems(["transformers f32"], TINY, {"transformers": sys.executable}, tmp_path, 1)
    assert "No module named 'torch'" in missing["transformers f32"]
    assert "\n" not in missing["transformers f32"]


def test_weights_appear_whole_and_are_made_once(tmp_path: Path):
    def fails(target: Path) -> None:
        target.write_text("half")
        raise ValueError("disk full")

    with pytest.raises(ValueError, match="disk full"):
        made(tmp_path / "x" / "weights", fails)
    assert not list((tmp_path / "x").iterdir())
    assert made(tmp_path / "x" / "weights", lambda target: target.mkdir()).is_dir()
    assert made(tmp_path / "x" / "weights", fails).is_dir()


# --- rounds -----------------------------------------------------------------------------------------------------------


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


def test_a_worker_that_fails_or_hangs_costs_its_own_lines_only(tmp_path: Path, asked: Path):
    systems = [fake(asked, "bad", fails_at=8), fake(asked, "slow", hangs_at=16), fake(asked, "gone", dies=True)]
    run = a_run(tmp_path, [*systems, fake(asked, "good")], "--rounds", "1", "--timeout", "6")
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
    numbers = cpu_report.medians(lines)
    assert numbers[Point("memory", "dense", 16, 1, "warm", "plan_ratio")].median == pytest.approx(1.02)


def test_an_interrupted_worker_is_ended():
    worker = cpu_process.Worker([sys.executable, "-c", "input()"], {}, {})
    with worker, pytest.raises(cpu_process.WorkerError, match="no answer within 0 s"):
        worker.ready(0.1)
    assert worker._process.poll() is not None


# --- tables and pictures ----------------------------------------------------------------------------------------------


def sample(system: str, length: int, rate: float, ms: float, **labels: Any) -> dict[str, Any]:
    kind = {"part": "single", "batch": 1, "cache": "warm", "library": "ours", "sources": "new", "round": 0, **labels}
    facts = {"model": "m", "threads": 2, "jax": "1", "commit": "c", "date": "d", "tokens": [length], "peak_bytes": 2040}
    numbers = {"prefill_tok_per_s": rate, "ms_per_token": ms}
    plan = {"base_bytes": 1000, "plan_bytes": 1000, "plan_weight_bytes": 400, "plan_cache_bytes": 600}
    return {"kind": "sample", "system": system, "length": length, **kind, **facts, **numbers, "facts": plan}


RESULTS = [
    sample("lserve", 1024, 3000, 9, sources="old"),
    *(sample("dense", length, 2000, ms) for length, ms in ((1024, 20), (2048, 22), (8192, 30))),
    *(
        sample("lserve", length, rate, ms)
        for length, rate, ms in ((1024, 2400, 18), (2048, 2500, 20), (8192, 2400, 25))
    ),
    sample("transformers bf16", 2048, 2600, 40, library="transformers"),
    sample("transformers f32", 2048, 600, 50, library="transformers"),
    sample("llama.cpp F16", 2048, 400, 25, library="llama.cpp"),
    sample("llama.cpp F16 flash", 2048, 500, 30, library="llama.cpp"),
    sample("lserve", 8192, 2400, 25, part="long"),
]


def test_medians_are_of_the_newest_sources():
    rounds = [sample("lserve", 8, rate, 1) for rate in (1, 2, 3, 4, 9)]
    number = cpu_report.medians([*RESULTS, *rounds])[Point("single", "lserve", 8, 1, "warm", "prefill_tok_per_s")]
    assert number == Spread(3, 2, 4, 5)
    assert cpu_report.medians(RESULTS)[Point("single", "lserve", 1024, 1, "warm", "ms_per_token")].median == 18


def test_targets_are_ratios_of_medians_in_the_same_run():
    table = {
        line.split("  ")[0]: line.split()[-4:]
        for line in cpu_report.targets_table(cpu_report.medians(RESULTS)).split("\n")
    }
    assert table["prefill 2K over transformers bf16"][-4:] == ["0.96", "short", "by", "4%"]
    assert table["decode 2K over llama.cpp F16"][-2:] == ["1.25", "PASS"], "against the faster of its settings"
    assert table["decode ms, 8K over 1K"][-4:] == ["1.39", "over", "by", "7%"]
    assert table["decode 8K over our dense"][-4:] == ["1.20", "short", "by", "25%"]
    assert table["prefill 8K over our dense"][-4:] == ["1.20", "short", "by", "8%"]
    assert table["prefill 8K over transformers bf16"][-2:] == ["not", "measured"]
    assert table["peak memory over the plan, largest"][-2:] == ["1.04", "PASS"]


def test_the_report_and_pictures_are_files_beside_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    missing = {"kind": "missing", "system": "llama.cpp Q4_1", "reason": "not installed"}
    text = "".join(json.dumps(line) + "\n" for line in [*RESULTS, missing])
    (tmp_path / "results.jsonl").write_text(text, encoding="utf-8")
    assert cpu_report.main([str(tmp_path)]) == 0
    said = (tmp_path / "targets.txt").read_text(encoding="utf-8")
    assert said in capsys.readouterr().out
    assert "missing: llama.cpp Q4_1: not installed" in said
    assert "first token as transformers f32: dense 1/1, lserve 1/1" in said
    assert len((tmp_path / "medians.jsonl").read_text(encoding="utf-8").splitlines()) == len(
        cpu_report.medians(RESULTS)
    )
    pytest.importorskip("matplotlib")
    assert cpu_plots.main([str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == set(cpu_plots.PICTURES)
    assert cpu_report.main([str(tmp_path / "empty")]) == 1


def test_speed_over_dense_counts_times_and_rates_the_same_way():
    found = {"dense": {8: Spread(10, 9, 11, 3), 16: Spread(20, 19, 21, 3)}, "lserve": {8: Spread(5, 4, 6, 3)}}
    assert cpu_plots.over_dense(found, is_rate=False)["lserve"][8].median == 2.0
    assert cpu_plots.over_dense(found, is_rate=True)["lserve"][8].median == 0.5
    assert cpu_plots.over_dense({"lserve": found["lserve"]}, is_rate=True) == {}


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tiny_model_is_measured_in_processes_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["--out", str(tmp_path / "out"), "--model", TINY, "--work", str(tmp_path / "work"), "--threads", "1"]
    command += ["--parts", "single", "--ours", "dense", "--peers", "transformers bf16"]
    assert cpu.main([*command, "--lengths", "80", "--rounds", "2", "--steps", "8"]) == 0
    lines = lines_of(tmp_path / "out")
    assert [line["round"] for line in lines] == [0, 1]
    for line in lines:
        assert line["prefill_tok_per_s"] > 0
        assert line["ms_per_token"] > 0
        assert line["programs"] == ["decode", "prefill_512", "sample"]
        assert len(line["tokens"]) == 8
        assert 0 < line["facts"]["base_bytes"] < line["peak_bytes"]
        assert [n for n, _ in line["prefill_curve"]] == [80]
    assert lines[0]["tokens"] == lines[1]["tokens"]
    assert [line["system"] for line in lines_of(tmp_path / "out", "missing")] == ["transformers bf16"]
    assert "all that was asked for is there" in capsys.readouterr().out
    assert (tmp_path / "out" / "targets.txt").exists()


def test_a_setting_that_cannot_be_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cpu.main(["--out", str(tmp_path), "--model", TINY, "--ours", "lserve:sink=-1", "--peers", ""]) == 2
    assert capsys.readouterr().err.count("\n") == 1
