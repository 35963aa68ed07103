"""A saved context gives the logits of a model that has read it, in any process, or is refused and changes nothing."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax import LLM, InputError, RequestOutput, SamplingParams, open_checkpoint
from lserve_jax.engine.contexts import context_format
from lserve_jax.engine.engine import Engine
from lserve_jax.text.tokenizer import Tokenizer
from lserve_jax.weights.smoothing import Smoothing

ROOT = Path(__file__).parents[3]
MODEL = str(ROOT / "tests" / "golden" / "tiny" / "llama3")
CHUNK, PAGE = 96, 16
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=True, top_logprobs=8)
QUESTION = [9, 8, 7, 6, 5]
STORED = ("bfloat16", "int8", "int4")
SHARES = (0.0, 0.5, 0.75, 1.0)
SETTINGS: dict[str, Any] = {
    "max_model_len": 480,
    "max_num_seqs": 2,
    "prefill_chunk": CHUNK,
    "page_size": PAGE,
    "sub_page_size": 4,
    "token_budget": 96,
    "sink": 20,
    "local": 40,
    "prefill_local": 100,
    "prefix_windows": 4,
}


def document(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 128, count).tolist()


DOCUMENT = document(330)  # three chunks and 42 tokens


@pytest.fixture(scope="session")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Gates by which the first head of layer 0 and the second of layer 1 stream last."""
    folder = tmp_path_factory.mktemp("pattern")
    (folder / "full_attention_heads.tsv").write_text("0.9\t0.1\n0.2\t0.8\n")
    return str(folder)


@cache
def _model(pattern: str, share: float, kv_dtype: str, **settings: Any) -> LLM:
    return LLM(
        MODEL, head_pattern=pattern, static_sparsity=share, kv_dtype=kv_dtype, dtype="float32", **SETTINGS | settings
    )


@pytest.fixture
def llm(pattern: str) -> Iterator[LLM]:
    """A model with an empty prefix cache."""
    model = _model(pattern, 0.5, "int8")
    poison(model)
    yield model
    assert model.session.is_idle
    assert used(model) == dict.fromkeys(used(model), 0), "pages that nobody holds"


@pytest.fixture(scope="module", autouse=True)
def models_dropped() -> Iterator[None]:
    yield
    _model.cache_clear()


def poison(llm: LLM) -> None:
    """Empties the prefix cache, and fills every page with NaN and with codes that nobody wrote."""
    cache = llm.engine.scheduler.cache
    assert cache is not None
    cache.clear()
    rng = np.random.default_rng(1)

    def dirty(x: jax.Array) -> jax.Array:
        if x.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(0, 256, x.shape, np.uint8))
        return x if x.dtype == jnp.int32 else jnp.full_like(x, jnp.nan)

    llm.engine.cache = jax.tree.map(dirty, llm.engine.cache)


def used(llm: LLM) -> dict[str, int]:
    """Pages of each pool that are neither free nor held by the prefix cache alone."""
    pools = llm.engine.scheduler.allocator.pools
    return {name: pool.num_pages - pool.num_free - pool.num_evictable for name, pool in pools}


def state(llm: LLM) -> Any:
    """What must not change when a file is refused."""
    cache = llm.engine.scheduler.cache
    assert cache is not None
    pools = {name: (pool.num_free, pool.num_evictable) for name, pool in llm.engine.scheduler.allocator.pools}
    return (
        pools,
        cache.num_entries,
        cache.num_windows,
        [x.tobytes() for x in map(np.asarray, jax.tree.leaves(llm.engine.cache))],
    )


def result(output: RequestOutput) -> tuple[Any, ...]:
    """All that a model says of an answer, bit by bit."""
    return output.token_ids, output.logprobs, output.top_logprobs


def answer(llm: LLM, prompt: list[int]) -> RequestOutput:
    return llm.generate([prompt], PARAMS)[0]


# --- the same logits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "kv_dtype"),
    [
        (0.5, "int8"),
        *(pytest.param(share, kind, marks=pytest.mark.slow) for share in SHARES for kind in STORED),
    ],
)
def test_a_restored_context_gives_the_logits_of_a_model_that_has_read_it(
    share: float, kv_dtype: str, pattern: str, tmp_path: Path
):
    llm, path = _model(pattern, share, kv_dtype), tmp_path / "document"
    poison(llm)
    cold = answer(llm, DOCUMENT + QUESTION)
    assert cold.metrics.cached_tokens == 0
    poison(llm)
    assert llm.save_context(DOCUMENT, path) == tuple(DOCUMENT)
    poison(llm)
    assert llm.load_context(path) == tuple(DOCUMENT)
    found = answer(llm, DOCUMENT + QUESTION)
    assert found.metrics.cached_tokens == 3 * CHUNK
    assert result(found) == result(cold)
    assert used(llm) == dict.fromkeys(used(llm), 0)


@pytest.mark.slow
@pytest.mark.parametrize("length", [3 * CHUNK, 3 * CHUNK + 20])
def test_the_end_of_a_context_is_not_read_as_the_end_of_a_prompt(length: int, pattern: str, tmp_path: Path):
    """Where the last tokens of a prompt read more of their history: those of the question do, in every case."""
    fewer = {"prefill_sparsity": "blocks", "prefill_block": 16, "prefill_from": 0, "prefill_near": 16}
    fewer |= {"prefill_threshold": 0.9, "prefill_first_layer": 0}
    llm, path, text = _model(pattern, 0.5, "int8", **fewer), tmp_path / "document", document(length, seed=3)
    poison(llm)
    cold = answer(llm, text + QUESTION)
    poison(llm)
    assert llm.save_context(text, path) == tuple(text)
    poison(llm)
    assert llm.load_context(path) == tuple(text)
    found = answer(llm, text + QUESTION)
    assert found.metrics.cached_tokens == 3 * CHUNK
    assert result(found) == result(cold)
    with pytest.raises(InputError, match="was saved with prefill_local '100, of "):
        _model(pattern, 0.5, "int8").load_context(path)


_PROGRAM = """
import json, sys
from lserve_jax import LLM, SamplingParams
path, prompt, settings = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
llm = LLM(**settings)
tokens = llm.load_context(path)
params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=True, top_logprobs=8)
output = llm.generate([[*tokens, *prompt]], params)[0]
print(json.dumps([output.metrics.cached_tokens, output.token_ids, output.logprobs, output.top_logprobs]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", STORED)
def test_a_new_process_gives_the_same_logits(kv_dtype: str, pattern: str, tmp_path: Path):
    settings = {"model": MODEL, "head_pattern": pattern, "static_sparsity": 0.5, "kv_dtype": kv_dtype, **SETTINGS}
    llm, path = LLM(**settings), tmp_path / "document.safetensors"
    cold = answer(llm, DOCUMENT + QUESTION)
    llm.save_context(DOCUMENT, path)
    arguments = [sys.executable, "-c", _PROGRAM, str(path), json.dumps(QUESTION), json.dumps(settings)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    cached, *found = json.loads(done.stdout.splitlines()[-1])
    assert cached == 3 * CHUNK
    assert found == json.loads(json.dumps(result(cold)))


def test_what_is_cached_already_is_saved_without_reading_it_again(llm: LLM, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    llm.save_context(DOCUMENT, first)
    calls = llm.engine.step
    try:
        llm.engine.step = lambda accept: pytest.fail("it ran")
        llm.save_context(DOCUMENT, second)
    finally:
        llm.engine.step = calls
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("count", [CHUNK, 3 * CHUNK, 3 * CHUNK + 1])
def test_whole_chunks_and_one_token_more(count: int, llm: LLM, tmp_path: Path):
    prompt = DOCUMENT[:count]
    cold = answer(llm, prompt + QUESTION)
    poison(llm)
    llm.save_context(prompt, tmp_path / "document")
    poison(llm)
    llm.load_context(tmp_path / "document")
    found = answer(llm, prompt + QUESTION)
    assert found.metrics.cached_tokens == count // CHUNK * CHUNK
    assert result(found) == result(cold)


def test_a_context_is_found_by_requests_with_its_salt_alone(llm: LLM, tmp_path: Path):
    llm.save_context(DOCUMENT, tmp_path / "document")
    poison(llm)
    llm.load_context(tmp_path / "document", salt=b"mine")

    def cached(salt: bytes) -> int:
        generation = llm.request(DOCUMENT + QUESTION, PARAMS, salt=salt)
        for _ in llm.session.run([generation]):
            pass
        return llm.output(generation).metrics.cached_tokens

    assert [cached(salt) for salt in (b"mine", b"", b"yours")] == [3 * CHUNK, 0, 0]


def test_loading_twice_takes_no_more_pages_and_chunks_that_are_there_are_shared(llm: LLM, tmp_path: Path):
    path, other = tmp_path / "document", DOCUMENT[: 2 * CHUNK] + document(2 * CHUNK, seed=1)
    llm.save_context(DOCUMENT, path)
    llm.save_context(other, tmp_path / "other")
    poison(llm)
    llm.load_context(path)
    free = dict(llm.engine.scheduler.allocator.pools)["retrieval"].num_free
    before = state(llm)
    llm.load_context(path)
    assert state(llm) == before
    llm.load_context(tmp_path / "other")
    assert free - dict(llm.engine.scheduler.allocator.pools)["retrieval"].num_free == 2 * CHUNK // PAGE
    for prompt, cached in ((DOCUMENT, 3), (other, 4)):
        found = answer(llm, prompt + QUESTION)
        assert found.metrics.cached_tokens == cached * CHUNK
        poison_free = result(found)
        cache = llm.engine.scheduler.cache
        assert cache is not None
        assert poison_free[1] is not None and np.isfinite(poison_free[1]).all()


def test_chunks_whose_window_is_gone_get_it_back(llm: LLM, tmp_path: Path):
    """All three chunks are cached, but no streaming head can go on there."""
    cold = answer(llm, DOCUMENT + QUESTION)
    llm.save_context(DOCUMENT, tmp_path / "document")
    cache = llm.engine.scheduler.cache
    assert cache is not None and cache.streaming is not None
    cache.evict(cache.streaming, cache.streaming.num_pages)
    assert (cache.num_windows, cache.num_entries) == (0, 3)
    llm.load_context(tmp_path / "document")
    assert cache.num_entries == 3
    found = answer(llm, DOCUMENT + QUESTION)
    assert found.metrics.cached_tokens == 3 * CHUNK
    assert result(found) == result(cold)


def test_other_prompts_push_a_context_out_and_it_comes_back(llm: LLM, tmp_path: Path):
    cold = answer(llm, DOCUMENT + QUESTION)
    llm.save_context(DOCUMENT, tmp_path / "document")
    poison(llm)
    llm.load_context(tmp_path / "document")
    for seed in range(1, 6):
        answer(llm, document(440, seed))
    assert answer(llm, DOCUMENT + QUESTION).metrics.cached_tokens == 0, "the pools are too large for this test"
    for seed in range(1, 6):
        answer(llm, document(440, seed))
    llm.load_context(tmp_path / "document")
    found = answer(llm, DOCUMENT + QUESTION)
    assert found.metrics.cached_tokens == 3 * CHUNK
    assert result(found) == result(cold)


def test_its_own_chunks_are_not_pushed_out_by_those_that_are_missing(llm: LLM, tmp_path: Path):
    """Two chunks are there, and nobody has used them for longest; the pool has no free page."""
    cold = answer(llm, DOCUMENT + QUESTION)
    llm.save_context(DOCUMENT, tmp_path / "document")
    poison(llm)
    for prompt in (DOCUMENT[: 2 * CHUNK], document(4 * CHUNK, 1), document(4 * CHUNK, 2)):
        llm.generate([prompt], SamplingParams(max_tokens=1))  # no page but those of its chunks
    pool = dict(llm.engine.scheduler.allocator.pools)["retrieval"]
    cache = llm.engine.scheduler.cache
    assert cache is not None
    assert pool.num_free < CHUNK // PAGE
    assert len(cache.chain(cache.digests(DOCUMENT, b""))) == 2, "this test must begin with two chunks"
    llm.load_context(tmp_path / "document")
    found = answer(llm, DOCUMENT + QUESTION)
    assert found.metrics.cached_tokens == 3 * CHUNK
    assert result(found) == result(cold)


def test_a_context_comes_in_while_a_stream_runs_and_neither_notices(llm: LLM, tmp_path: Path):
    cold, alone = answer(llm, DOCUMENT + QUESTION), answer(llm, document(200, 5))
    llm.save_context(DOCUMENT, tmp_path / "document")
    poison(llm)
    stream = llm.stream_output(document(200, 5), PARAMS)
    next(stream)
    llm.load_context(tmp_path / "document")
    found = answer(llm, DOCUMENT + QUESTION)
    *_, (_, finished) = stream
    assert found.metrics.cached_tokens == 3 * CHUNK
    assert result(found) == result(cold)
    assert finished is not None and result(finished) == result(alone)


# --- refused, and nothing changed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kv_dtype": "int4"}, "kv_dtype 'int8', but here it is 'int4'"),
        ({"share": 0.75}, "heads '"),
        ({"sink": 16}, "sink '20', but here it is '16'"),
        ({"prefill_local": 90}, "prefill_local '100', but here it is '90'"),
        ({"local": 110}, "prefill_window '100', but here it is '110'"),
        ({"prefill_chunk": 48}, "prefill_chunk '96', but here it is '48'"),
        ({"sub_page_size": 8}, "sub_page_size '4', but here it is '8'"),
        ({"weight_dtype": "int8"}, "was saved with weights 'float32 ("),
        ({"weight_dtype": "int4"}, "but here it is 'int4 in groups of 32, int8, int4 in groups of 16 ("),
    ],
)
def test_other_settings_are_refused_and_nothing_changes(
    settings: dict[str, Any], named: str, llm: LLM, pattern: str, tmp_path: Path
):
    path = tmp_path / "document"
    llm.save_context(DOCUMENT, path)
    share, kv_dtype = settings.pop("share", 0.5), settings.pop("kv_dtype", "int8")
    other = LLM(
        MODEL, head_pattern=pattern, static_sparsity=share, kv_dtype=kv_dtype, dtype="float32", **SETTINGS | settings
    )
    before = state(other)
    with pytest.raises(InputError) as caught:
        other.load_context(path)
    assert named in str(caught.value) and str(path) in str(caught.value)
    assert state(other) == before


def test_weights_of_another_form_are_refused_and_of_the_same_form_under_another_name_are_not(llm: LLM, tmp_path: Path):
    def identity(weight_dtype: str | None) -> str:
        forms = llm.setup.checkpoint.forms("float32", weight_dtype)
        plan = replace(llm.setup.plan, weight_words="")  # whatever the words are
        return context_format(replace(llm.setup, forms=forms, plan=plan), None).identity["weights"]

    assert identity(None) == identity("float32") == identity("auto")
    assert len({identity(name) for name in ("float32", "bfloat16", "int8", "int4")}) == 4


def test_other_smoothing_factors_are_other_weights(llm: LLM):
    def identity(smoothing: Smoothing | None) -> Mapping[str, str]:
        forms = llm.setup.checkpoint.forms("float32", "int8", smoothing)
        return context_format(replace(llm.setup, forms=forms), None).identity

    one, same, other = (Smoothing({"layers_0.mlp.down_proj": np.full(96, value, np.int8)}) for value in (1, 1, 2))
    assert (one, hash(one)) == (same, hash(same)) and one != other
    assert identity(one) == identity(same)
    assert identity(one)["smoothing"] != identity(other)["smoothing"]
    assert identity(None)["smoothing"] == "none"


def test_another_model_and_another_tokenizer_are_refused(llm: LLM, tmp_path: Path):
    """The same shapes: one bit of one weight, and one token of the vocabulary."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    vocabulary = tmp_path / "tokenizer"
    shutil.copytree(MODEL, vocabulary)
    tokenizer = json.loads((vocabulary / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["changed"] = words.pop(next(word for word in words if len(word) > 3))
    (vocabulary / "tokenizer.json").write_text(json.dumps(tokenizer))
    llm.save_context(DOCUMENT, tmp_path / "document")
    for name, model, source in (("model", str(folder), MODEL), ("tokenizer", MODEL, str(vocabulary))):
        other = context_format(replace(llm.setup, checkpoint=open_checkpoint(model)), Tokenizer.from_folder(source))
        with pytest.raises(InputError, match=rf"was saved with {name} '[0-9a-f]{{16}}', but here it is"):
            other.read(tmp_path / "document")


def test_a_damaged_file_changes_nothing(llm: LLM, tmp_path: Path):
    path = tmp_path / "document"
    llm.save_context(DOCUMENT, path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    poison(llm)
    before = state(llm)
    with pytest.raises(InputError, match=r"is damaged: its SHA-256 differs"):
        llm.load_context(path)
    assert state(llm) == before


def test_pages_that_running_requests_use_are_not_taken(llm: LLM, tmp_path: Path):
    llm.save_context(DOCUMENT, tmp_path / "document")
    poison(llm)
    long = SamplingParams(max_tokens=80, ignore_eos=True)  # neither ends before the other has begun
    streams = [llm.stream_output(document(400, seed), long) for seed in (3, 4)]
    for stream in streams:
        while not next(stream)[0].token_ids:
            pass
    before = state(llm)
    with pytest.raises(InputError, match=r"needs 18 retrieval pages, \d+ more than are free"):
        llm.load_context(tmp_path / "document")
    assert state(llm) == before
    for stream in streams:
        stream.close()
    llm.load_context(tmp_path / "document")
    assert answer(llm, DOCUMENT + QUESTION).metrics.cached_tokens == 3 * CHUNK


def test_a_write_that_fails_gives_all_pages_back(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cold = answer(llm, DOCUMENT + QUESTION)
    llm.save_context(DOCUMENT, tmp_path / "document")
    poison(llm)
    pools = llm.engine.scheduler.allocator.pools
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "write_pages", lambda *args: (_ for _ in ()).throw(RuntimeError("the device is gone")))
        with pytest.raises(RuntimeError, match="the device is gone"):
            llm.load_context(tmp_path / "document")
    assert {name: pool.num_free for name, pool in pools} == {name: pool.num_pages for name, pool in pools}
    llm.load_context(tmp_path / "document")
    assert result(answer(llm, DOCUMENT + QUESTION)) == result(cold)


def test_without_a_prefix_cache_there_are_no_contexts(pattern: str, llm: LLM, tmp_path: Path):
    llm.save_context(DOCUMENT, tmp_path / "document")
    other = _model(pattern, 0.5, "int8", prefix_cache=False)
    for act in (
        lambda: other.save_context(DOCUMENT, tmp_path / "x"),
        lambda: other.load_context(tmp_path / "document"),
    ):
        with pytest.raises(InputError, match="saved contexts need the prefix cache"):
            act()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("count", "named"), [(CHUNK - 1, "fewer than prefill_chunk=96"), (481, "but max_model_len is 480")]
)
def test_a_prompt_that_is_too_short_or_too_long_is_not_read(count: int, named: str, llm: LLM, tmp_path: Path):
    before = state(llm)
    with pytest.raises(InputError, match=named):
        llm.save_context(document(count), tmp_path / "document")
    assert state(llm) == before
    assert not (tmp_path / "document").exists()
