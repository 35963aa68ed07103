"""`LLM` and the commands under ``jax_enable_x64``: the same tokens, and the same bits of all that is measured."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lserve_jax import LLM, SamplingParams
from tests import x64

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "golden" / "tiny" / "llama3"
SIZES: dict[str, Any] = {"max_model_len": 128, "prefill_chunk": 64, "max_num_seqs": 2}
WINDOW: dict[str, Any] = {"page_size": 16, "sub_page_size": 4, "sink": 16, "local": 32, "prefill_local": 48}
PRESETS: dict[str, dict[str, Any]] = {
    "lserve": {**WINDOW, "token_budget": 64, "kv_dtype": "int4", "recall_interval": 4},
    "dense": {"page_size": 16, "sub_page_size": 4},
    "streaming": {**WINDOW, "kv_dtype": "int8"},
    "quest": {"page_size": 16, "sub_page_size": 4, "token_budget": 48},
    "qserve": {"page_size": 16, "sub_page_size": 4},
}
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=True)
DRAWN = SamplingParams(
    max_tokens=8, ignore_eos=True, logprobs=True, temperature=0.9, top_k=30, top_p=0.9, min_p=0.01, seed=5
)


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One retrieval head and one streaming head in each of two layers."""
    folder = tmp_path_factory.mktemp("pattern")
    (folder / "full_attention_heads.tsv").write_text("1\t0\n0\t1\n")
    return folder


def said(preset: str, pattern: Path) -> list[Any]:
    """All that a model says of three prompts, two at a time."""
    heads = {"head_pattern": pattern, "static_sparsity": 0.5} if "sink" in PRESETS[preset] else {}
    llm = LLM(str(TINY), attention=preset, **SIZES, **PRESETS[preset], **heads)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 128, length).tolist() for length in (110, 20, 90)]
    found: list[Any] = [
        (output.token_ids, output.logprobs, repr(output.metrics.attention_recall))
        for params in (GREEDY, DRAWN)
        for output in llm.generate(prompts, params)
    ]
    scores = llm.score(prompts[1:], [[4, 5, 6], [7, 8]])
    return [*found, *((one.logprobs, one.greedy_token_ids) for one in scores), llm.logits(prompts[0]).tobytes()]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_generates_and_scores_the_same(preset: str, pattern: Path):
    without, within = x64.both(lambda: said(preset, pattern))
    assert within == without
    drawn, greedy = without[3:6], without[:3]
    assert drawn != greedy
    assert ("nan" in without[0][2] or without[0][2] == "None") == (preset != "lserve")


def test_the_command_prints_the_same():
    command = [sys.executable, "-m", "lserve_jax.generate", "--model", str(TINY), "--prompt", "hi", "--prompt", "you"]
    command += ["--max-tokens", "6", "--max-model-len", "128", "--temperature", "0.7", "--seed", "3"]
    texts = [
        subprocess.run(command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, check=True).stdout
        for flags in ({}, {"JAX_ENABLE_X64": "1"})
    ]
    assert texts[0] == texts[1] != ""
