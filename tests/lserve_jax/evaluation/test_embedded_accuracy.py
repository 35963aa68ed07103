"""A small part of docs/accuracy.md's table on the embedded model: what sparse attention answers is what dense does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SPARSE = "lserve:token_budget=25%+kv_dtype=int8"


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_gguf")
def test_a_quarter_of_the_context_half_the_heads_streaming_and_8_bits_answer_as_dense_attention(tmp_path: Path):
    tasks, variants = "niah_single_2,vt_direct,copy", f"dense,{SPARSE}"
    sizes = ["--lengths", "1024", "--samples", "3", "--batch", "3"]
    out = tmp_path / "out"
    # In a process of its own: two models are compiled in it, for which it takes 1.6 GiB beside what tests have here.
    command = [sys.executable, "-m", "lserve_jax.evaluate", "--tasks", tasks, "--variants", variants, *sizes]
    done = subprocess.run(
        [*command, "--out", str(out), "--quiet", "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    cells: dict[tuple[str, str], Any] = {}
    for cell in json.loads((out / "summary.json").read_text(encoding="utf-8"))["cells"]:
        cells[cell["task"], cell["variant"]] = cell
    for task in ("niah_single_2", "vt_direct"):
        assert cells[task, "dense"]["score"]["mean"] == cells[task, SPARSE]["score"]["mean"] == 1
        assert cells[task, SPARSE]["nll"]["difference"]["mean"] < 0.05
    assert cells["copy", SPARSE]["token_accuracy"]["difference"]["mean"] > -0.03
    assert cells["copy", SPARSE]["nll"]["difference"]["mean"] < 0.1
    for task in tasks.split(","):
        assert cells[task, SPARSE]["pages_read_ratio"] < 0.44  # the windows alone are 576 of 1024 tokens
        assert cells[task, SPARSE]["streaming_share"] == 0.5
