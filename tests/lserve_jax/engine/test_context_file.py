"""Files of saved contexts: what is read is what was written, and whatever else a file holds is refused in one line."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import safe_open

from lserve_jax import InferenceConfig, InputError
from lserve_jax.config.sizes import PoolSizes, Sizes
from lserve_jax.engine import context_file
from lserve_jax.engine.context_file import ContextFormat, SavedContext
from tests.lserve_jax.runtime.tiny_steps import classes, tiny_config

HALF = classes((1, 0), (0, 1), num_retrieval=(1, 1))
SHARES = {
    "0": None,
    "0.5": HALF,
    "0.75": classes((0, 1), (0, 1), num_retrieval=(0, 1)),
    "1": classes((0, 1), (0, 1), num_retrieval=(0, 0)),
}
STORED = ("float32", "bfloat16", "int8", "int4")
IDENTITY = {"model": "0123456789abcdef", "kv_dtype": "int8", "sink": "20"}
TOKENS = tuple(range(3, 103))  # one chunk of 64, and 36 tokens


def config_of(share: str = "0.5", kv_dtype: str = "int8") -> InferenceConfig:
    return tiny_config("lserve", SHARES[share], kv_dtype=kv_dtype, token_budget=96)


def format_of(share: str = "0.5", kv_dtype: str = "int8", chunk: int = 64) -> ContextFormat:
    config = config_of(share, kv_dtype)
    sizes = Sizes(max_model_len=256, prefill_chunk=chunk)
    pools = PoolSizes.of(config, sizes)
    return ContextFormat(config=config, sizes=sizes, pools=pools, identity=IDENTITY)


def context_of(one: ContextFormat, tokens: tuple[int, ...] = TOKENS, seed: int = 0) -> SavedContext:
    """A context with random numbers in every leaf."""
    rng = np.random.default_rng(seed)

    def values(x: Any) -> np.ndarray:
        if x.dtype == np.uint8:
            return rng.integers(0, 256, x.shape, np.uint8)
        return np.abs(rng.normal(size=x.shape)).astype(x.dtype) + np.ones((), x.dtype)

    layout = one._layout(len(tokens))
    arrays = {name: values(x) for name, x in layout.items() if name not in ("tokens", "streaming.pages")}
    return one._context({"tokens": np.array(tokens, np.int32), **arrays}, len(tokens))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "document.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    one = format_of()
    one.write(path, context_of(one))
    return path


def refused(one: ContextFormat, path: Path) -> str:
    """The line that refuses a file, which names the file."""
    with pytest.raises(InputError) as caught:
        one.read(path)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert line.startswith(f"{path}: ")
    return line


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """The file with another header, of which everything else still holds."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header = edit(header) or header
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


# --- what is read is what was written -------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", STORED)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("count", [64, 65, 100, 200])
def test_a_context_is_read_as_it_was_written(share: str, kv_dtype: str, count: int, path: Path):
    one = format_of(share, kv_dtype)
    context = context_of(one, tuple(range(count % 97, count % 97 + 20)) * (count // 20) + (5,) * (count % 20))
    assert one.write(path, context) == path.stat().st_size
    found = one.read(path)
    assert found.tokens == context.tokens
    assert jax.tree.structure(found.pages) == jax.tree.structure(context.pages)
    for mine, theirs in zip(jax.tree.leaves(found.pages), jax.tree.leaves(context.pages), strict=True):
        assert (mine.dtype, mine.shape, mine.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())


def test_other_programs_can_read_the_file(saved: Path):
    one, context = format_of(), context_of(format_of())
    with safe_open(saved, framework="numpy") as file:
        assert set(file.keys()) == set(one._layout(len(TOKENS)))
        assert tuple(file.get_tensor("tokens").tolist()) == TOKENS
        assert file.get_tensor("streaming.pages").tolist() == one.window(len(TOKENS))
        pool = context.pages.retrieval[1]
        assert pool is not None
        np.testing.assert_array_equal(file.get_tensor("retrieval.1.k.codes"), pool.k.codes)  # type: ignore[union-attr]
        assert file.metadata()["format"] == context_file.FORMAT


def test_the_pages_of_a_context_are_those_of_its_whole_chunks_and_their_window():
    """Sink 20 and window 100 in pages of 16: at 192, positions 0 … 19 and 93 … 191."""
    one = format_of()
    assert (one.boundary(200), one.num_retrieval(200)) == (192, 12)
    assert one.window(200) == [0, 1, 5, 6, 7, 8, 9, 10, 11]
    assert one.window(64) == [0, 1, 2, 3]
    assert format_of("0").window(200) == []
    assert format_of("1").num_retrieval(200) == 0


@pytest.mark.parametrize("number", [0, 63])
def test_a_prompt_without_a_whole_chunk_is_refused(number: int, path: Path):
    with pytest.raises(InputError, match=f"the prompt has {number} tokens, fewer than prefill_chunk=64"):
        format_of().require_savable(number)


def test_chunks_that_are_no_whole_pages_are_refused(path: Path):
    with pytest.raises(InputError, match="make prefill_chunk=100 a multiple of 16"):
        format_of(chunk=100).require_savable(200)


# --- writing is all or nothing --------------------------------------------------------------------------------------


def test_what_is_not_finite_is_not_written(path: Path):
    one = format_of()
    context = context_of(one)
    pool = context.pages.retrieval[0]
    assert pool is not None and pool.k_min is not None
    pool.k_min[0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"retrieval\.0\.k_min has numbers that are not finite: 1 NaN of"):
        one.write(path, context)
    assert names(path.parent) == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(saved: Path, monkeypatch: pytest.MonkeyPatch):
    before, one = saved.read_bytes(), format_of()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(context_file.os, "fsync", full)
    with pytest.raises(InputError, match=rf"{saved}: cannot be written \(No space left on device\)"):
        one.write(saved, context_of(one, seed=1))
    assert saved.read_bytes() == before
    assert names(saved.parent) == [saved.name]


def test_the_name_comes_only_after_the_file_is_on_disk(path: Path, monkeypatch: pytest.MonkeyPatch):
    one, seen, sync = format_of(), [], os.fsync

    def watched(handle: int) -> None:
        seen.append((path.exists(), os.fstat(handle).st_size))
        sync(handle)

    monkeypatch.setattr(context_file.os, "fsync", watched)
    size = one.write(path, context_of(one))
    assert seen[0] == (False, size)
    assert seen[1][0], "the folder is synced when it has the name"


@pytest.mark.parametrize("name", ["missing/x", "folder", "x" * 300])
def test_a_place_that_cannot_be_written_or_read_is_said_in_one_line(name: str, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    one = format_of()
    with pytest.raises(InputError, match="cannot be written"):
        one.write(tmp_path / name, context_of(one))
    assert "cannot be read" in refused(one, tmp_path / name)
    assert names(tmp_path) == ["folder"]


# --- nothing in a file is trusted -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[ContextFormat, Path]:
    """The smallest context that there is: one layer's pools, one chunk of one page."""
    one = format_of("0.75", "int8", chunk=16)
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    one.write(path, context_of(one, TOKENS[:17]))
    return one, path


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flipped_byte_is_noticed(stride: int, small: tuple[ContextFormat, Path]):
    """Of header, metadata, tokens and pages; of large pages, every 29th is enough."""
    one, path = small
    data = path.read_bytes()
    end_of_tokens = 8 + int.from_bytes(data[:8], "little") + 4 * 17
    target = path.with_name("flipped.safetensors")
    rng = np.random.default_rng(0)
    for at in [*range(0, end_of_tokens, stride), *range(end_of_tokens, len(data), 29 * stride), len(data) - 1]:
        changed = bytearray(data)
        changed[at] ^= int(rng.integers(1, 256))
        target.write_bytes(changed)
        refused(one, target)


def test_every_cut_is_noticed_and_so_is_what_was_added(small: tuple[ContextFormat, Path]):
    one, path = small
    data = path.read_bytes()
    target = path.with_name("cut.safetensors")
    for size in [*range(64), *range(64, len(data), 97), len(data) - 1]:
        target.write_bytes(data[:size])
        refused(one, target)
    target.write_bytes(data + b"\0")
    assert "has " in refused(one, target) and "cut or damaged" in refused(one, target)


@pytest.mark.parametrize("name", [*IDENTITY])
def test_another_model_or_setting_is_named(name: str, saved: Path):
    line = refused(replace(format_of(), identity=IDENTITY | {name: "another"}), saved)
    assert f"was saved with {name} '{IDENTITY[name]}', but here it is 'another'" in line


def test_a_setting_that_the_file_does_not_know_is_named(saved: Path):
    assert "was saved with rope None, but here it is 'new'" in refused(
        replace(format_of(), identity=IDENTITY | {"rope": "new"}), saved
    )


@pytest.mark.parametrize(
    ("share", "kv_dtype", "named"),
    [
        ("0.5", "int4", "retrieval.0.k.codes"),
        ("0.5", "float32", "retrieval.0.k"),
        ("0.75", "int8", "retrieval.1.k_min"),
        ("0", "int8", "streaming.pages"),
    ],
)
def test_a_file_of_another_layout_is_refused_even_if_it_claims_this_one(
    share: str, kv_dtype: str, named: str, saved: Path
):
    assert f"tensor {named} " in refused(format_of(share, kv_dtype), saved)


def test_a_context_that_is_larger_than_the_cache_says_by_how_much(path: Path):
    one = format_of()
    one.write(path, context_of(one, TOKENS[:50] * 4))
    small = replace(one, pools=replace(one.pools, retrieval=10))
    assert "needs 12 retrieval pages, 2 more than the 10 of the pool" in refused(small, path)
    small = replace(one, pools=replace(one.pools, streaming=5))
    assert "needs 9 streaming pages, 4 more than the 5 of the pool" in refused(small, path)
    small = replace(one, sizes=replace(one.sizes, max_model_len=150))
    assert "has 200 tokens, 50 more than max_model_len=150" in refused(small, path)


def _tensor(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        header[name] |= changes

    return edit


def _metadata(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        header["__metadata__"] |= changes

    return edit


def _without(*names: str) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        for name in names:
            header.pop(name, None)
            header["__metadata__"].pop(name, None)

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    {
        "another version": (_metadata(format="lserve_jax context 3"), "format is 'lserve_jax context 3'"),
        "no format": (_without("format"), "format is None"),
        "no metadata": (lambda header: header.pop("__metadata__") and header, "metadata"),
        "metadata of numbers": (_metadata(sink=20), "metadata"),
        "metadata as a list": (lambda header: {**header, "__metadata__": ["x"]}, "metadata"),
        "more metadata": (_metadata(more="x"), "the header is not written as contexts are"),
        "no tokens": (_without("tokens"), "tensor tokens"),
        "no number of tokens": (_tensor("tokens", shape=[]), "tensor tokens"),
        "tokens without end": (_tensor("tokens", shape=[2**40]), "tensor tokens"),
        "tokens true": (_tensor("tokens", shape=[True]), "tensor tokens"),
        "tokens below 0": (_tensor("tokens", shape=[-5]), "tensor tokens"),
        "tokens by halves": (_tensor("tokens", shape=[100.0]), "tensor tokens"),
        "more tokens than it has": (_tensor("tokens", shape=[200]), "tensor"),
        "fewer": (_tensor("tokens", shape=[3]), "the prompt has 3 tokens"),
        "tokens of another type": (_tensor("tokens", dtype="F32"), "tensor tokens is {'dtype': 'F32'"),
        "pages that overlap": (_tensor("retrieval.0.k.codes", data_offsets=[0, 8]), "tensor retrieval.0.k.codes is"),
        "pages of another shape": (_tensor("retrieval.0.k.codes", shape=[1, 1, 1, 1]), "tensor retrieval.0.k.codes"),
        "a page size as a truth": (_tensor("retrieval.0.k.codes", shape=[4, True, 16, 16]), "the header is not"),
        "no statistics": (_without("retrieval.0.k_min"), "tensor retrieval.0.k_min is None"),
        "no digest": (_without("sha256.retrieval.0.k_min"), "the metadata lack the digest of tensor retrieval.0.k_min"),
        "a tensor more": (lambda header: {**header, "__import__": header["tokens"]}, "tensor '__import__' is none"),
        "a list": (lambda header: [header], "must hold a JSON object"),
        "a name that is code": (lambda header: {**header, "os.system('x')": {}}, 'tensor "os.system'),
    }.values(),
)
def test_a_hostile_header_is_refused(edit: Callable[[dict[str, Any]], Any], named: str, saved: Path):
    assert named in refused(format_of(), edited(saved, edit))


@pytest.mark.parametrize(
    "data",
    {
        "empty": b"",
        "a pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "a header without end": (2**63).to_bytes(8, "little") + b"{}",
        "a header larger than any": (2**22).to_bytes(8, "little") + b" " * 2**22,
        "nested": (90_000).to_bytes(8, "little") + b"[" * 90_000,
        "a number without end": (9008).to_bytes(8, "little") + b'{"a":' + b"9" * 9000 + b"} ",
        "no UTF-8": (8).to_bytes(8, "little") + b"\xff" * 8,
        "a key twice": (16).to_bytes(8, "little") + b'{"a": 1, "a": 2}',
        "half a header": (64).to_bytes(8, "little") + b'{"__metadata__"',
    }.values(),
)
def test_a_file_that_is_no_context_is_refused(data: bytes, path: Path):
    path.write_bytes(data)
    refused(format_of(), path)


def test_a_header_is_read_no_further_than_one_may_be_long(path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file of zeros with a hole of a terabyte, which its header claims."""
    with path.open("wb") as file:
        file.write((2**40 - 8).to_bytes(8, "little"))
        file.truncate(2**40)
    assert f"its header would have {2**40 - 8} bytes" in refused(format_of(), path)


def rewritten(one: ContextFormat, path: Path, name: str, change: Callable[[np.ndarray], None]) -> Path:
    """A file whose digests all hold, with other numbers: what somebody makes who knows the format."""
    context = context_of(one)
    arrays = {name: np.array(x) for name, x in one._arrays(context).items()}
    change(arrays[name])
    layout = one._layout(len(TOKENS))
    digests = {name: context_file.hashlib.sha256(x.tobytes()).hexdigest() for name, x in arrays.items()}
    path.write_bytes(one._header(layout, digests) + b"".join(arrays[name].tobytes() for name in layout))
    return path


def _put(value: float, at: tuple[int, ...] | int = -1) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array.reshape(-1)[at] = value

    return change


@pytest.mark.parametrize(
    ("kv_dtype", "name", "value", "named"),
    [
        ("int8", "retrieval.1.v.scale", np.nan, "not finite: 1 NaN"),
        ("int8", "streaming.0.v.low", np.inf, "not finite: 1 infinite"),
        ("int4", "retrieval.0.v.scale", -1.0, "negative scales"),
        ("int8", "retrieval.0.k_max", -np.inf, "not finite: 1 infinite"),
        ("bfloat16", "streaming.1.k", np.nan, "not finite: 1 NaN"),
        ("float32", "retrieval.0.v", np.inf, "not finite: 1 infinite"),
        ("int8", "tokens", -1, "tensor tokens has tokens outside the model's vocabulary of 128"),
        ("int8", "tokens", 128, "tensor tokens has tokens outside the model's vocabulary of 128"),
        ("int8", "streaming.pages", 9, "tensor streaming.pages does not name the pages of sink and window"),
        ("int8", "streaming.pages", -1, "tensor streaming.pages does not name the pages of sink and window"),
    ],
)
def test_numbers_that_no_model_writes_are_refused(kv_dtype: str, name: str, value: float, named: str, path: Path):
    one = format_of("0.5", kv_dtype)
    one.read(rewritten(one, path, name, lambda array: None))
    line = refused(one, rewritten(one, path, name, _put(value)))
    assert named in line and re.search(rf"tensor {re.escape(name)}\b", line)


def test_memory_is_taken_only_for_what_the_pools_hold(saved: Path, monkeypatch: pytest.MonkeyPatch):
    """A header that claims 2**31 - 1 tokens is refused before any array exists."""
    monkeypatch.setattr(context_file.np, "empty", lambda *args, **kwargs: pytest.fail("an array was made"))
    assert "more than max_model_len=256" in refused(format_of(), edited(saved, _tensor("tokens", shape=[2**31 - 1])))
