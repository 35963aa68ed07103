"""Which implementation the ops took: recorded where programs are traced, told in one line."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import pytest

from lserve_jax import LLM, SamplingParams, prepare
from lserve_jax.runtime.implementations import by_op, describe
from pallas_kernels import Choice
from tests.pallas_kernels import hopper

MODEL = str(Path(__file__).parents[2] / "golden" / "tiny" / "llama3")
SMALL: dict[str, Any] = {
    "max_model_len": 128,
    "page_size": 8,
    "sub_page_size": 4,
    "token_budget": 56,
    "max_num_seqs": 1,
}
ALL_OPS = {"kv_write", "prefill_attention", "page_select", "decode_attention"}


def test_choices_of_all_layers_become_one_line():
    choices = [
        Choice("kv_write", "mosaic_gpu", ()),
        Choice("decode_attention", "mosaic_gpu", ()),
        Choice("decode_attention", "xla", (("mosaic_gpu", "pages of 8 tokens"),)),
    ]
    assert by_op(choices) == {"kv_write": "mosaic_gpu", "decode_attention": "mosaic_gpu+xla"}
    assert describe(choices) == (
        "mosaic_gpu for kv_write, mosaic_gpu+xla for decode_attention; mosaic_gpu refused: pages of 8 tokens"
    )
    assert describe(choices[:2]) == "mosaic_gpu"


def test_what_compiled_programs_took_is_what_a_setup_foretells_for_each_model_of_a_process():
    foretold = prepare(MODEL, **SMALL).implementations
    assert by_op(foretold) == dict.fromkeys(ALL_OPS, "xla")
    assert "need a Hopper GPU" in describe(foretold)
    for _ in range(2):  # the second one's programs reuse the traces of the first
        llm = LLM(MODEL, **SMALL)
        assert llm.implementations == ()
        llm.generate([3, 4, 5], SamplingParams(max_tokens=4, ignore_eos=True))
        assert set(llm.implementations) == set(foretold)


def test_a_trace_that_was_made_elsewhere_is_no_gap_in_the_report(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lserve_jax.runtime.programs.observe_choices", lambda: nullcontext([]))  # as if JAX had it
    llm = LLM(MODEL, **{**SMALL, "max_model_len": 120})
    llm.generate([3, 4, 5], SamplingParams(max_tokens=4, ignore_eos=True))
    assert by_op(llm.implementations) == dict.fromkeys(ALL_OPS, "xla")


def test_a_named_implementation_is_not_chosen_and_nobody_refused():
    assert {choice.refusals for choice in prepare(MODEL, implementation="xla", **SMALL).implementations} == {()}


def test_a_gpu_that_gets_xla_is_warned_of(monkeypatch: pytest.MonkeyPatch):
    assert prepare(MODEL, head_pattern=None, attention="dense", **{**SMALL, "token_budget": None}).warnings == ()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with hopper.on_h200():  # heads of 16 channels are too small for its kernels
        warnings = prepare(MODEL, attention="dense", max_model_len=128).warnings
    (warning,) = warnings
    assert warning.startswith("attention is slow on this GPU: xla for kv_write, prefill_attention, decode_attention; ")
    assert "mosaic_gpu refused: " in warning
