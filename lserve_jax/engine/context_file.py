"""A prefilled prompt in a file: its tokens and the pages of its whole chunks, in safetensors' format.

Model, settings and number of tokens fix the whole layout, so a file that does not fit is found before any page is read.
Nothing in a file is trusted: not its header, not its numbers, and no name in it ever becomes code.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from lserve_jax.config.checks import LARGEST_INT
from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.json_file import parse_json
from lserve_jax.config.pages import visible_pages
from lserve_jax.config.sizes import PoolSizes, Sizes
from lserve_jax.engine.host_pages import HostPages
from lserve_jax.runtime.cache import init_cache
from lserve_jax.runtime.pages import pools_of
from lserve_jax.weights.finite import describe, is_finite

FORMAT = "lserve_jax context 2"
"""Name and version of the format; a change of what pages hold needs a new version."""

_TOKENS, _WINDOW = "tokens", "streaming.pages"
_DIGEST = "sha256."
_DTYPES = {"bfloat16": "BF16", "float32": "F32", "float16": "F16", "uint8": "U8", "int32": "I32"}
_MOST_BYTES_PER_TENSOR = 512
"""Bytes of the header for each tensor: its entry, and its digest among the metadata."""

type Arrays = dict[str, np.ndarray]


class SavedContext(NamedTuple):
    """The tokens of a prompt, and copies of the pages of its whole chunks.

    ``pages.retrieval`` are those of all whole chunks, ``pages.streaming`` those of `ContextFormat.window`.
    """

    tokens: tuple[int, ...]
    pages: HostPages


@dataclass(frozen=True, kw_only=True)
class ContextFormat:
    """The files that one engine can write and read.

    Attributes:
      config: model, attention and number types.
      sizes: sequences, context and calls.
      pools: pages of the cache.
      identity: every value, by name, on which the bits of pages depend: they must be the same at save and load.
    """

    config: InferenceConfig
    sizes: Sizes
    pools: PoolSizes
    identity: Mapping[str, str]

    def boundary(self, num_tokens: int) -> int:
        """Returns how many tokens the whole chunks of a prompt have: those whose pages are saved."""
        return num_tokens // self.sizes.prefill_chunk * self.sizes.prefill_chunk

    def num_retrieval(self, num_tokens: int) -> int:
        """Returns how many retrieval pages a context has; 0 if no layer has such a pool."""
        return self.boundary(num_tokens) // self.config.attention.page_size if self.pools.retrieval else 0

    def window(self, num_tokens: int) -> list[int]:
        """Returns the logical pages before the boundary that its first query sees; none without streaming heads."""
        if not self.pools.streaming:
            return []
        attention, boundary = self.config.attention, self.boundary(num_tokens)
        num_pages = boundary // attention.page_size
        is_visible = visible_pages(
            *(boundary, 1),
            sink=attention.sink,
            window=attention.prefill_window,
            page_size=attention.page_size,
            num_pages=num_pages,
        )
        return np.flatnonzero(is_visible).tolist()

    def require_savable(self, num_tokens: int) -> None:
        """Raises `InputError` if a prompt has no whole chunk, or chunks have no whole pages."""
        chunk, page = self.sizes.prefill_chunk, self.config.attention.page_size
        if chunk % page:
            raise InputError(f"a context needs chunks of whole pages: make prefill_chunk={chunk} a multiple of {page}")
        if num_tokens < chunk:
            raise InputError(
                f"a context has at least one whole chunk: the prompt has {num_tokens} tokens, fewer than "
                f"prefill_chunk={chunk}"
            )

    def write(self, path: Path, context: SavedContext) -> int:
        """Returns the bytes of the file that it writes: whole, or not at all.

        Raises:
          InputError: if the context cannot be saved, or the file cannot be written.
        """
        self.require_savable(len(context.tokens))
        arrays = self._arrays(context)
        _require_finite(arrays, "this context cannot be saved")
        layout = self._layout(len(context.tokens))
        assert {name: (x.dtype, x.shape) for name, x in arrays.items()} == {
            name: (x.dtype, x.shape) for name, x in layout.items()
        }
        digests = {name: hashlib.sha256(_bytes_of(array)).hexdigest() for name, array in arrays.items()}
        header = self._header(layout, digests)
        with _written_whole(path) as file:
            file.write(header)
            for name in layout:
                file.write(_bytes_of(arrays[name]))
        return len(header) + sum(x.nbytes for x in arrays.values())

    def read(self, path: Path) -> SavedContext:
        """Returns the context of a file, everything checked.

        Raises:
          InputError: if it cannot be read, was saved by another model or with other settings, is damaged or larger than
            the pools; in one line that names the file and what is wrong.
        """
        try:
            with path.open("rb") as file:
                return self._read(file, str(path), os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None

    def _read(self, file: BinaryIO, source: str, size: int) -> SavedContext:
        raw = _read_header(file, source, size, _MOST_BYTES_PER_TENSOR * (len(self._layout(0)) + 32))
        entries = parse_json(raw, source)
        metadata = _metadata(entries, source)
        self._check_identity(metadata, source)
        num_tokens = _num_tokens(entries, source)
        self._check_room(num_tokens, source)
        layout = self._layout(num_tokens)
        _check_entries(entries, layout, metadata, source)
        digests = {name: metadata[f"{_DIGEST}{name}"] for name in layout}
        if self._header(layout, digests)[8:] != raw:
            raise InputError(f"{source}: the header is not written as contexts are: it was changed")
        expected = 8 + len(raw) + sum(x.size * x.dtype.itemsize for x in layout.values())
        if size != expected:
            raise InputError(f"{source}: has {size} bytes, not {expected}: it is cut or damaged; save the context anew")
        arrays = {name: _read_array(file, name, x, digests[name], source) for name, x in layout.items()}
        self._check_values(arrays, num_tokens, source)
        return self._context(arrays, num_tokens)

    def _check_identity(self, metadata: Mapping[str, str], source: str) -> None:
        if metadata.get("format") != FORMAT:
            raise InputError(f"{source}: format is {shown(metadata.get('format'))}, but this program reads {FORMAT!r}")
        for name, value in self.identity.items():
            if metadata.get(name) != value:
                raise InputError(
                    f"{source}: was saved with {name} {shown(metadata.get(name))}, but here it is {value!r}: "
                    "open the model as it was then, or save the context anew"
                )

    def _check_room(self, num_tokens: int, source: str) -> None:
        try:
            self.require_savable(num_tokens)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        limit = self.sizes.max_model_len
        if num_tokens > limit:
            raise InputError(
                f"{source}: has {num_tokens} tokens, {num_tokens - limit} more than max_model_len={limit}: raise it"
            )
        needs = (
            ("retrieval", self.num_retrieval(num_tokens), self.pools.retrieval),
            ("streaming", len(self.window(num_tokens)), self.pools.streaming),
        )
        for name, needed, pages in needs:
            if needed > pages:
                raise InputError(
                    f"{source}: needs {needed} {name} pages, {needed - pages} more than the {pages} of the pool: "
                    "give the cache more memory"
                )

    def _check_values(self, arrays: Arrays, num_tokens: int, source: str) -> None:
        tokens, vocabulary = arrays[_TOKENS], self.config.model.vocab_size
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise InputError(f"{source}: tensor {_TOKENS} has tokens outside the model's vocabulary of {vocabulary}")
        if arrays[_WINDOW].tolist() != self.window(num_tokens):
            raise InputError(f"{source}: tensor {_WINDOW} does not name the pages of sink and window")
        _require_finite(arrays, source)

    @cached_property
    def _of_one_page(self) -> HostPages:
        """The shapes of one page in every pool."""
        cache = jax.eval_shape(lambda: init_cache(self.config, max_num_seqs=1, retrieval_pages=8, streaming_pages=8))
        one = (
            jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), pools_of(cache, pool))
            for pool in ("retrieval", "streaming")
        )
        return HostPages(*one)

    def _layout(self, num_tokens: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shape of every tensor, in the order of the file: tensors of wide elements before narrow ones."""
        window = self.window(num_tokens)
        counts = {"retrieval": self.num_retrieval(num_tokens), "streaming": len(window)}
        found = {
            _TOKENS: jax.ShapeDtypeStruct((num_tokens,), np.int32),
            _WINDOW: jax.ShapeDtypeStruct((len(window),), np.int32),
        }
        for name, x in _named(self._of_one_page).items():
            found[name] = jax.ShapeDtypeStruct((counts[name.partition(".")[0]], *x.shape[1:]), x.dtype)
        return dict(sorted(found.items(), key=lambda item: -item[1].dtype.itemsize))

    def _header(self, layout: Mapping[str, Any], digests: Mapping[str, str]) -> bytes:
        """Returns the start of the file: the length of the header in 8 bytes, and the header in JSON."""
        metadata = {"format": FORMAT, **self.identity, **{f"{_DIGEST}{name}": digests[name] for name in layout}}
        text = json.dumps({"__metadata__": metadata, **_entries(layout)}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _arrays(self, context: SavedContext) -> Arrays:
        tokens = np.array(context.tokens, np.int32)
        window = np.array(self.window(len(context.tokens)), np.int32)
        return {_TOKENS: tokens, _WINDOW: window, **_named(context.pages)}

    def _context(self, arrays: Arrays, num_tokens: int) -> SavedContext:
        leaves = [arrays[name] for name in _named(self._of_one_page)]
        pages = jax.tree.unflatten(jax.tree.structure(self._of_one_page), leaves)
        tokens = arrays[_TOKENS].tolist()
        assert len(tokens) == num_tokens
        return SavedContext(tuple(tokens), pages)


def _named(pages: HostPages) -> dict[str, Any]:
    """Returns the leaves by name, such as "retrieval.3.k.codes": the pool, the layer, the field."""
    leaves, _ = tree_flatten_with_path(pages)
    return {keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


def _entries(layout: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns what the header says of each tensor."""
    found, end = {}, 0
    for name, x in layout.items():
        start, end = end, end + x.size * x.dtype.itemsize
        found[name] = {"dtype": _DTYPES[x.dtype.name], "shape": list(x.shape), "data_offsets": [start, end]}
    return found


def _read_header(file: BinaryIO, source: str, size: int, most: int) -> bytes:
    """Returns the JSON of the header; reads no more than ``most`` bytes, whatever the file says."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8 or length > most:
        raise InputError(f"{source}: is no saved context of this model: its header would have {length} bytes")
    return file.read(length)


def _metadata(entries: Mapping[str, Any], source: str) -> dict[str, str]:
    found = entries.get("__metadata__")
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InputError(f"{source}: is no saved context: its header has no metadata")
    return found


def _num_tokens(entries: Mapping[str, Any], source: str) -> int:
    entry = entries.get(_TOKENS)
    shape = entry.get("shape") if isinstance(entry, dict) else None
    match shape:
        case [int(count)] if type(count) is int and 0 < count <= LARGEST_INT:
            return count
    raise InputError(f"{source}: tensor {_TOKENS} must have one dimension, got {shown(entry)}")


def _check_entries(
    entries: Mapping[str, Any], layout: Mapping[str, Any], metadata: Mapping[str, str], source: str
) -> None:
    expected = _entries(layout)
    for name, entry in expected.items():
        if entries.get(name) != entry:
            raise InputError(f"{source}: tensor {name} is {shown(entries.get(name))}, but must be {entry}")
        if f"{_DIGEST}{name}" not in metadata:
            raise InputError(f"{source}: the metadata lack the digest of tensor {name}")
    unknown = sorted(entries.keys() - expected.keys() - {"__metadata__"})
    if unknown:
        raise InputError(f"{source}: tensor {shown(unknown[0])} is none that this model has")


def _read_array(file: BinaryIO, name: str, x: jax.ShapeDtypeStruct, digest: str, source: str) -> np.ndarray:
    array = np.empty(x.shape, x.dtype)
    target, done = _bytes_of(array), 0
    while done < len(target) and (count := file.readinto(target[done:])):  # type: ignore[attr-defined]
        done += count
    if hashlib.sha256(target).hexdigest() != digest:
        raise InputError(f"{source}: tensor {name} is damaged: its SHA-256 differs; save the context anew")
    return array


def _require_finite(arrays: Arrays, source: str) -> None:
    """Codes may have any bits; scales, which are no less than 0, and all other numbers must be finite."""
    for name, array in arrays.items():
        if array.dtype.kind in "iu":
            continue
        if array.size and not is_finite(array):
            raise InputError(f"{source}: tensor {name} has numbers that are not finite: {describe(array)}")
        if name.endswith(".scale") and not (array >= 0).all():
            raise InputError(f"{source}: tensor {name} has negative scales")


@contextmanager
def _written_whole(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file that takes its name when it is complete and on disk; before that, nothing has that name."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes the new name as durable as the file; not every system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
