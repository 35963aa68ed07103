"""Which implementation the ops took: recorded where programs are traced, told in one line."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import pytest

from lserve_jax import LLM, SamplingParams, prepare
from lserve_jax.models.layers import project
from lserve_jax.runtime.implementations import by_op, describe
from pallas_kernels import Choice, QuantizedMatrix
from tests.pallas_kernels import hopper

QUANTIZED = Path(__file__).parents[2] / "golden" / "quantized" / "gguf"
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


@pytest.mark.parametrize("model", [MODEL, str(QUANTIZED / "Q4_K_M.gguf")])
def test_products_with_quantised_weights_are_foretold_too(model: str):
    settings = {**SMALL, "weight_dtype": "auto" if model != MODEL else "int8"}
    foretold = prepare(model, **settings).implementations
    assert by_op(foretold) == dict.fromkeys([*sorted(ALL_OPS), "quantized_matmul"], "xla")
    llm = LLM(model, **settings, dtype="float32")
    llm.generate([3, 4, 5], SamplingParams(max_tokens=4, ignore_eos=True))
    assert set(llm.implementations) == set(foretold)


def test_one_product_is_traced_for_each_kind_of_matrix_and_number_of_rows(monkeypatch: pytest.MonkeyPatch):
    """The layers are alike, and each has qkv, o, gate and up, and down; the logits have one more in a decode step."""
    traced = []

    def recorded(x: jax.Array, kernel: QuantizedMatrix) -> jax.Array:
        traced.append((x.shape, kernel.shape))
        return project(x, kernel)

    monkeypatch.setattr("lserve_jax.runtime.implementations.project", recorded)
    setup = prepare(MODEL, **{**SMALL, "max_num_seqs": 3}, prefill_chunk=64, weight_dtype="int8", dtype="float32")
    assert setup.implementations
    c = setup.config.model
    queries, width, inner = c.num_heads * c.head_dim, c.hidden_size, c.intermediate_size
    qkv = (queries + 2 * c.num_kv_heads * c.head_dim, width)
    in_layers = [qkv, (width, queries), (2 * inner, width), (width, inner)]
    wanted = [((rows, shape[1]), shape) for rows in (64, 3) for shape in in_layers]
    assert sorted(traced) == sorted([*wanted, ((3, width), (c.vocab_size, width))])
    traced.clear()
    assert prepare(MODEL, **SMALL).implementations
    assert not traced


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
    assert warning.startswith("slow on this GPU: xla for kv_write, prefill_attention, decode_attention; ")
    assert "mosaic_gpu refused: " in warning
