"""How far bfloat16 logits on this device are from float32 on the CPU."""

from typing import Any

import jax
import numpy as np

from bench.provenance import ROOT
from bench.text import rounded
from lserve_jax.engine.setup import prepare
from lserve_jax.runtime.cache import init_cache
from lserve_jax.runtime.steps import decode_step, prefill_step
from lserve_jax.text.tokenizer import open_tokenizer
from pallas_kernels import PageTables

VALUES_PROMPT, VALUES_STEPS = 900, 64
VALUES_ATTENTION = {"dense": {}, "lserve": {"token_budget": 512, "sink": 64, "local": 256, "prefill_local": 256}}
BF16_ERROR, XLA_MARGIN = 0.05, 1.5
"""Largest relative error of bfloat16 logits that passes: the first, or the second times XLA's error if it is known."""


def compared(checkpoint: str, preset: str, overrides: dict[str, Any], implementation: str) -> dict[str, Any]:
    """Returns how far bfloat16 logits on this device are from float32 on the CPU, and where greedy tokens part.

    The device is fed the CPU's tokens, so the first step whose likeliest tokens differ is where free runs would part;
    the gap there is what float32 sees between the two. XLA's own bfloat16 error, where it is another run, is the
    measure of what bfloat16 costs.
    """
    here, cpu = jax.devices()[0], jax.devices("cpu")[0]
    reference, forced = _logits(checkpoint, preset, overrides, "float32", "xla", cpu, None)
    here_logits, _ = _logits(checkpoint, preset, overrides, "bfloat16", implementation, here, forced)
    error = _errors(here_logits, reference)
    others = {}
    if here.platform != "cpu" and implementation != "xla":
        xla, _ = _logits(checkpoint, preset, overrides, "bfloat16", "xla", here, forced)
        others = {"xla": _errors(xla, reference)}
    limit = XLA_MARGIN * others["xla"]["relative_error"] if others else BF16_ERROR
    prompt = len(reference) - VALUES_STEPS
    parts = np.flatnonzero(here_logits[prompt:].argmax(1) != reference[prompt:].argmax(1))
    first = int(parts[0]) if parts.size else None
    at = None if first is None else prompt + first
    gap = 0.0 if at is None else float(reference[at].max() - reference[at, here_logits[at].argmax()])
    return {
        **error,
        **others,
        "prompt_tokens": prompt + 1,
        "steps": VALUES_STEPS,
        "first_difference": first,
        "gap_at_difference": rounded(gap),
        "is_near_tie": gap <= 2 * (others["xla"] if others else error)["largest_error"],
        "is_within_bf16_error": error["relative_error"] <= limit,
    }


def _errors(actual: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    difference = actual - expected
    relative = np.linalg.norm(difference) / np.linalg.norm(expected)
    return {"relative_error": rounded(float(relative)), "largest_error": rounded(float(np.abs(difference).max()))}


def _logits(
    checkpoint: str,
    preset: str,
    overrides: dict[str, Any],
    dtype: str,
    implementation: str,
    device: Any,
    forced: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits [T, V] of a prompt and the tokens after it, and these tokens: by default the likeliest."""
    setup = prepare(checkpoint, attention=preset, dtype=dtype, implementation=implementation, **overrides)
    config, prompt = setup.config, _prompt(setup)
    context, page = len(prompt) + VALUES_STEPS, config.attention.page_size
    pages = -(-context // page)
    with jax.default_device(device):  # and committed there, so that the steps run there
        params = jax.device_put(setup.checkpoint.load_params(dtype, config.heads), device)
        cache = jax.device_put(init_cache(config, max_num_seqs=1, retrieval_pages=pages, streaming_pages=pages), device)
    rng = np.random.default_rng(0)
    tables = PageTables(*(rng.permutation(pages).astype(np.int32)[None] for _ in range(2)))
    start, count = np.zeros(1, np.int32), np.array([len(prompt)], np.int32)
    logits, cache = prefill_step(params, cache, prompt[None], start, count, tables, config=config, has_all_logits=True)
    rows = [np.asarray(logits)[0]]
    chosen = []
    for step in range(VALUES_STEPS):
        token = rows[-1][-1].argmax() if forced is None else forced[step]
        chosen.append(token)
        values = (np.array([x], np.int32) for x in (token, len(prompt) + step + 1, step))
        logits, cache = decode_step(params, cache, *values, tables, config=config)
        rows.append(np.asarray(logits))
    # The last prompt token's logits choose the first token: they are the first of the steps.
    return np.concatenate(rows)[:-1], np.array(chosen, np.int32)


def _prompt(setup: Any) -> np.ndarray:
    """Returns the first tokens of the document that ships with the package, or random ones if it has too few."""
    tokenizer, vocabulary = open_tokenizer(setup.checkpoint.tokenizer_source), setup.config.model.vocab_size
    text = (ROOT / "lserve_jax" / "data" / "demo.md").read_text(encoding="utf-8")
    ids = np.array(tokenizer.encode(text) if tokenizer else [], np.int32)[:VALUES_PROMPT]
    if len(ids) < VALUES_PROMPT:
        ids = np.random.default_rng(0).integers(0, vocabulary, VALUES_PROMPT).astype(np.int32)
    return ids
