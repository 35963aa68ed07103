"""Workers that answer what they are told to, and runs that measure them."""

import json
import sys
from pathlib import Path
from typing import Any

from bench.cpu.__main__ import parse
from bench.cpu.run import Run
from bench.cpu.systems import System

TINY = str(Path(__file__).parents[2] / "golden" / "tiny" / "llama3")


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
        open(os.environ["FAKE_LOG"] + ".hangs", "w").close()
        time.sleep(3600)
    print(json.dumps({"prefill_s": length / fake["rate"], "prefilled": length, "steps": request["steps"],
                      "decode_s": request["steps"] * fake["ms"] / 1e3, "tokens": [1], "compile_s": 2.0,
                      "programs": ["decode"], "num_compilations": 4, "rss_bytes": 1000, "peak_bytes": 1120}))
    sys.stdout.flush()
"""


def fake(asked: Path, name: str, kind: str = "ours", **settings: Any) -> System:
    command = (sys.executable, str(asked.parent / "worker.py"))
    return System(name, kind, command, {"fake": {"name": name, "rate": 1000.0, "ms": 5.0, **settings}})


def a_run(folder: Path, systems: list[System], *arguments: str) -> Run:
    settings = ["--model", TINY, "--lengths", "8,16", "--batch-lengths", "8", "--steps", "4", "--work", str(folder)]
    return Run(parse(["--out", str(folder), *settings, *arguments]), systems)


def lines_of(folder: Path, kind: str = "sample") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]
