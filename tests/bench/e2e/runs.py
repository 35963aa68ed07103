"""Runs of `bench.e2e` on the smallest model, and what they wrote."""

import json
from pathlib import Path
from typing import Any

from bench.e2e.__main__ import main

TINY_CHECKPOINT = str(Path(__file__).parents[2] / "golden" / "tiny" / "llama3")


SIZES = ["--model", "tiny", "--presets", "dense,lserve", "--batch", "1", "--chunk", "64", "--steps", "4"]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "e2e.jsonl").read_text(encoding="utf-8").splitlines()]


def run(folder: Path, *arguments: str) -> int:
    return main(["--out", str(folder), *SIZES, *arguments])
