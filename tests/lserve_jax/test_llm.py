"""`LLM` as a caller sees it: chats, models without a tokenizer, settings that cannot be."""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lserve_jax import LLM, RequestOutput, SamplingParams
from lserve_jax.config.errors import InputError
from lserve_jax.engine.setup import prepare
from tests.pallas_kernels import hopper

TINY = Path(__file__).parents[1] / "golden" / "tiny"
# The shapes of test_generate.py, so that a program is compiled for both.
SIZES: dict[str, Any] = {"max_model_len": 128, "prefill_chunk": 64, "max_num_seqs": 1}
PARAMS = SamplingParams(max_tokens=6)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(TINY / "llama3"), **SIZES)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """The same model from a folder without a tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / "llama3" / name, folder)
    return LLM(str(folder), **SIZES)


def test_a_chat_is_its_rendered_prompt_continued_and_several_are_a_batch(llm: LLM):
    chats = [[{"role": "user", "content": text}] for text in ("hello", "and you")]
    expected = llm.generate([llm.render_chat(chat) for chat in chats], PARAMS)
    one, many = llm.chat(chats[0], PARAMS), llm.chat(chats, PARAMS)
    assert isinstance(one, RequestOutput)
    assert isinstance(many, list)
    assert one.text == expected[0].text != ""
    assert [output.token_ids for output in many] == [output.token_ids for output in expected]


def test_a_chat_is_rendered_with_its_options(llm: LLM):
    begun = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "It is"}]
    expected = llm.generate("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nIt is", PARAMS)[0]
    assert llm.render_chat(begun, continue_final_message=True) == list(expected.prompt_token_ids)
    continued = llm.chat(begun, PARAMS, continue_final_message=True)
    assert isinstance(continued, RequestOutput)
    assert (continued.text, continued.token_ids) == (expected.text, expected.token_ids)


def test_a_chat_has_the_template_that_is_named(llm: LLM, tmp_path: Path):
    (tmp_path / "own.jinja").write_text("{{ tools[0].name }}:{{ mood }}:{{ messages[0].content }}")
    options: Any = {"chat_template": tmp_path / "own.jinja", "tools": [{"name": "f"}], "template_kwargs": {"mood": 1}}
    expected = llm.generate("f:1:hello", PARAMS)[0]
    outputs = llm.chat([[{"role": "user", "content": "hello"}]] * 2, PARAMS, **options)
    assert isinstance(outputs, list)
    assert [output.token_ids for output in outputs] == [expected.token_ids] * 2


def test_a_stream_says_what_generate_says(llm: LLM):
    (whole,) = llm.generate("hello there", SamplingParams(max_tokens=50, ignore_eos=True))
    chunks = list(llm.stream("hello there", SamplingParams(max_tokens=50, ignore_eos=True)))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids
    assert len(chunks) > 5


@pytest.fixture(scope="module")
def controlled(llm: LLM) -> tuple[RequestOutput, int]:
    """A drawn answer of at least two pieces of text with a control token between them, and the token's position."""
    (drawn,) = llm.generate("hello", SamplingParams(max_tokens=90, temperature=3.0, seed=5, ignore_eos=True))
    at = drawn.token_ids.index(IM_START)
    assert 1 < at < len(drawn.token_ids) - 3
    return drawn, at


IM_START = 3  # <|im_start|>


@pytest.mark.parametrize("after", [0, 2], ids=["is a control token", "begins with a control token"])
def test_a_stop_string_with_a_control_token_ends_the_text_before_it(
    llm: LLM, controlled: tuple[RequestOutput, int], after: int
):
    drawn, at = controlled
    assert llm.tokenizer is not None
    stop = "<|im_start|>" + llm.tokenizer.decode(drawn.token_ids[at + 1 : at + 1 + after])
    params = SamplingParams(max_tokens=90, temperature=3.0, seed=5, ignore_eos=True, stop=stop)
    (output,) = llm.generate("hello", params)
    assert (output.finish_reason, output.token_ids) == ("stop", drawn.token_ids[: at + 1 + after])
    assert output.text == llm.tokenizer.decode(drawn.token_ids[:at])
    assert "".join(chunk.text for chunk in llm.stream("hello", params)) == output.text


def test_control_tokens_are_shown_if_asked_for(llm: LLM, controlled: tuple[RequestOutput, int]):
    drawn, _ = controlled
    params = SamplingParams(max_tokens=90, temperature=3.0, seed=5, ignore_eos=True, skip_special_tokens=False)
    (output,) = llm.generate("hello", params)
    assert llm.tokenizer is not None
    assert output.text == llm.tokenizer.decode(drawn.token_ids, skip_special_tokens=False) != drawn.text


@pytest.mark.parametrize("messages", [[], {"role": "user", "content": "hello"}, "hello", [{"content": "hello"}]])
def test_messages_that_are_no_conversation_are_refused(llm: LLM, messages: Any):
    with pytest.raises(ValueError, match=r"messages(\[0\]: .role. is missing| must be)"):
        llm.chat(messages, PARAMS)


def test_without_a_tokenizer_token_ids_go_in_and_out(llm: LLM, bare: LLM):
    assert bare.tokenizer is None
    (output,) = bare.generate([[9, 8, 7]], PARAMS)
    assert (output.text, output.token_ids) == ("", llm.generate([[9, 8, 7]], PARAMS)[0].token_ids)
    assert next(bare.stream([9, 8, 7], PARAMS)).token_ids == output.token_ids[:1]
    for call in (
        lambda: bare.generate("text", PARAMS),
        lambda: bare.chat([{"role": "user", "content": "text"}], PARAMS),
        lambda: bare.generate([[9]], SamplingParams(stop="x")),
    ):
        with pytest.raises(ValueError, match=r"has no tokenizer, which a .* needs: pass token ids, or a tokenizer"):
            call()


def test_a_tokenizer_may_come_from_elsewhere(llm: LLM, bare: LLM):
    other = LLM(bare.setup.checkpoint.name, tokenizer=str(TINY / "llama3"), **SIZES)
    assert other.generate("hello", PARAMS)[0].text == llm.generate("hello", PARAMS)[0].text


def test_warnings_come_once_the_model_is_loaded(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "lserve_jax"):
        LLM(str(TINY / "llama3"), max_model_len=1024, prefill_chunk=64, max_num_seqs=1)
    no_pattern, too_long = (record.getMessage() for record in caplog.records)
    assert re.match(r"no head pattern for .*llama3: all KV heads are retrieval heads", no_pattern)
    assert too_long.startswith("max_model_len=1024 is beyond the 512 tokens that this model was made for")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be a whole number from 1"),
        ({"max_model_len": 12.5}, "max_model_len=12.5 must be a whole number from 1"),
        (
            {"prefill_chunk": 0, "steps_per_call": -1},
            "steps_per_call=-1 must be a whole number from 1; prefill_chunk",
        ),
        ({"implementation": "cuda"}, "implementation='cuda' must be one of auto, mosaic_gpu, triton, xla"),
        ({"attention": "sparse"}, "attention='sparse' must be one of lserve, dense"),
        ({"window": 5}, "unknown attention option window; known are"),
        ({"preset": "dense"}, "unknown attention option preset"),
        ({"dtype": "float16"}, "dtype='float16' must be auto or one of bfloat16, float32"),
        ({"page_size": 40}, "page_size=40 must be a multiple of sub_page_size=16"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_loaded(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lserve_jax.weights.load.Checkpoint.load_params", None)
    with pytest.raises(ValueError, match=re.escape(message)):
        LLM(str(TINY / "llama3"), **settings)


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        pytest.param(
            "mosaic_gpu",
            "Mosaic GPU kernels need a Hopper GPU (H100, H200); this device is",
            marks=pytest.mark.skipif(hopper.has_hopper(), reason="a Hopper GPU is here"),
        ),
        ("triton", "has no 'triton' implementation"),
    ],
)
def test_implementations_that_cannot_run_here_are_refused_before_anything_is_loaded(
    implementation: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lserve_jax.weights.load.Checkpoint.load_params", None)
    with pytest.raises(InputError, match=re.escape(message)):
        LLM(str(TINY / "llama3"), implementation=implementation)


def test_what_a_kernel_is_not_made_for_is_refused_before_anything_is_loaded():
    with hopper.on_h200(), pytest.raises(InputError, match="head_dim"):
        prepare(str(TINY / "llama3"), implementation="mosaic_gpu", dtype="bfloat16")
    assert prepare(str(TINY / "llama3"), implementation="xla").config.implementation == "xla"


def test_what_the_page_selector_is_not_made_for_is_refused_where_pages_would_be_selected():
    settings: dict[str, Any] = {"page_size": 128, "sub_page_size": 1, "implementation": "mosaic_gpu"}
    with hopper.on_h200():
        with pytest.raises(InputError, match="128 sub-pages of a page: at most 64"):
            prepare("llama-3.1-8b", max_model_len=4097, **settings)
        assert prepare("llama-3.1-8b", max_model_len=4096, **settings).plan.sizes.max_num_seqs


def test_memory_that_does_not_suffice_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lserve_jax.weights.load.Checkpoint.load_params", None)
    monkeypatch.setattr("lserve_jax.engine.memory.free_memory", lambda: 2**22)
    with pytest.raises(ValueError, match=r"the largest context that fits is \d+ tokens"):
        LLM(str(TINY / "llama3"), max_model_len=100_000)


@pytest.mark.parametrize("name", [".", "../llama3", "./"])
def test_a_folder_named_by_dots_has_no_shipped_pattern(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(TINY / "llama3")
    assert prepare(name).config.num_retrieval == (2, 2)
    monkeypatch.chdir(TINY / "llama3" / "..")
    with pytest.raises(ValueError, match=r"config\.json: missing, so this is no model folder"):
        prepare("..")
