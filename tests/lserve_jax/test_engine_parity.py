"""The public engine with dense float32 attention gives what `transformers` gives: logits and greedy tokens.

The same golden files as test_parity.py, but through pages, chunked prefill and decode steps. Tolerances are absolute.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lserve_jax import LLM, SamplingParams, open_checkpoint
from lserve_jax.text.tokenizer import open_tokenizer

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
TOLERANCE = 2e-3  # measured: 1.1e-4 on smollm2 (logits up to 39), 5e-6 on tiny qwen3

pytestmark = pytest.mark.parity


def golden(path: str) -> dict[str, np.ndarray]:
    """The arrays of one golden file."""
    with np.load(GOLDEN / path) as arrays:
        return dict(arrays)


def dense_llm(model: str, max_model_len: int) -> LLM:
    sizes: dict[str, Any] = {"max_model_len": max_model_len, "max_num_seqs": 1, "prefill_chunk": 256}
    return LLM(model, attention="dense", dtype="float32", kv_dtype="float32", **sizes)


def greedy(llm: LLM, tokens: np.ndarray, steps: int) -> list[int]:
    """The greedy continuation of one prompt, not stopped by an end-of-sequence token."""
    (output,) = llm.generate([tokens.tolist()], SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True))
    return list(output.token_ids)


@pytest.fixture(scope="module")
def smollm2() -> LLM:
    return dense_llm("smollm2-135m-instruct", max_model_len=1152)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_yarn", "qwen3"])
def test_tiny_checkpoint_gives_the_logits_and_greedy_tokens_of_transformers(name: str) -> None:
    theirs = golden(f"tiny/{name}/golden.npz")
    llm = dense_llm(str(GOLDEN / "tiny" / name), max_model_len=128)
    (tokens,) = theirs["tokens"]
    np.testing.assert_allclose(np.asarray(llm.logits(tokens.tolist())), theirs["logits"], rtol=0, atol=TOLERANCE)
    assert greedy(llm, tokens, len(theirs["greedy"])) == theirs["greedy"].tolist()


@pytest.mark.slow
def test_smollm2_gives_the_logits_of_transformers(smollm2: LLM) -> None:
    theirs = golden("smollm2/golden.npz")
    ours = np.asarray(smollm2.logits(theirs["tokens"].tolist()))
    assert ours.shape == (len(theirs["tokens"]), theirs["full_logits"].shape[1])
    parts = np.array_split(ours, 16)  # all of it in float64 would take 430 MB
    logsumexp = np.concatenate([np.logaddexp.reduce(part.astype(np.float64), axis=-1) for part in parts])
    at_their_argmax = np.take_along_axis(ours, theirs["argmax"][:, None], axis=-1)[:, 0]
    differences = {
        "logits at 64 vocabulary ids": ours[:, theirs["vocabulary_ids"]] - theirs["logits"],
        "whole rows": ours[theirs["full_positions"]] - theirs["full_logits"],
        "logsumexp": logsumexp - theirs["logsumexp"],
        "maximum": ours.max(axis=-1) - theirs["max"],
        "logit of the most likely token": at_their_argmax - theirs["max"],
    }
    errors = {name: float(np.abs(difference).max()) for name, difference in differences.items()}
    assert all(error <= TOLERANCE for error in errors.values()), errors  # a NaN fails too


@pytest.mark.slow
def test_smollm2_gives_the_greedy_tokens_of_transformers(smollm2: LLM) -> None:
    theirs = golden("smollm2/golden.npz")
    assert greedy(smollm2, theirs["chat_tokens"], len(theirs["greedy"])) == theirs["greedy"].tolist()


@pytest.mark.slow
def test_smollm2_stops_at_the_control_token_that_ends_its_turn(smollm2: LLM) -> None:
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    for stop in ("<|im_end|>", "<|im_end|>\n"):
        (output,) = smollm2.generate([prompt], SamplingParams(max_tokens=24, ignore_eos=True, stop=stop))
        assert (output.finish_reason, output.text) == ("stop", "The capital of France is Paris.")
        assert len(output.token_ids) == 8 + (stop != "<|im_end|>")


def test_smollm2_chat_is_split_into_the_tokens_of_transformers() -> None:
    messages = json.loads((GOLDEN / "smollm2" / "prompts.json").read_text())["messages"]
    theirs = golden("smollm2/golden.npz")
    tokenizer = open_tokenizer(open_checkpoint("smollm2-135m-instruct").tokenizer_source)
    assert tokenizer is not None
    assert list(tokenizer.apply_chat_template(messages)) == theirs["chat_tokens"].tolist()
    text = (GOLDEN / "text.txt").read_text()
    assert list(tokenizer.encode(text))[: len(theirs["tokens"])] == theirs["tokens"].tolist()
