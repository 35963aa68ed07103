"""How large an engine is: sequences, chunks and steps, and the pages that they need."""

from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Self

from lserve_jax.config.attention import AttentionConfig
from lserve_jax.config.checks import require_whole
from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.pages import most_streaming_pages, retrieval_pages
from lserve_jax.config.settings import Bytes, BytesOrWord


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes that fix the shapes of compiled steps, together with model and attention.

    Attributes:
      max_model_len: tokens per sequence, prompt and generation together.
      max_num_seqs: sequences that decode together; each has a slot, a row of the batch.
      prefill_chunk: prompt tokens per prefill call.
      steps_per_call: decode steps per call, after which the host acts.
      max_stop_tokens: stop tokens per request that the device looks for; the host looks for the others.

    Raises:
      InputError: if a size is not a whole number from 1; every problem in one line.
    """

    max_model_len: int
    max_num_seqs: int = 4
    prefill_chunk: int = 512
    steps_per_call: int = 8
    max_stop_tokens: int = 8

    def __post_init__(self) -> None:
        check_sizes(**vars(self))


def check_sizes(**sizes: Any) -> None:
    """Raises `InputError` unless every size is a whole number from 1; the message names all that are not."""
    problems = []
    for name, value in sizes.items():
        try:
            require_whole(name, value, 1)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("; ".join(problems))


def most_pages(attention: AttentionConfig, sizes: Sizes, length: int, prompt: int, *, keeps_all: bool) -> int:
    """Returns the most pages of one pool that a sequence holds at once until it has ``length`` tokens.

    Args:
      attention: page size and windows.
      sizes: how many tokens one call adds.
      length: tokens of the sequence at its end.
      prompt: tokens of its prompt during prefill, whose window is longer; 0 afterwards.
      keeps_all: whether the pool keeps every page of a sequence, or only those of sink and window.
    """
    page, every = attention.page_size, retrieval_pages(length, attention.page_size)
    if keeps_all:
        return every
    decode = most_streaming_pages(attention.sink, attention.local, sizes.steps_per_call, page)
    prefill = most_streaming_pages(attention.sink, attention.prefill_window, sizes.prefill_chunk, page)
    return max(min(decode, every), min(prefill, retrieval_pages(prompt, page)))


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """How much memory the KV cache takes, and what it keeps beyond the requests that run.

    The "help" of a field says what it does.

    Raises:
      InputError: if a value is out of range.
    """

    kv_memory: BytesOrWord = field(
        default=None,
        metadata={
            "help": "memory of the KV cache, such as 20GiB; free takes all that the device has left, and fit no more "
            "than that and than every slot needs at full length",
            "default": "what every slot needs at full length",
            "words": ("fit", "free"),
        },
    )
    swap_memory: Bytes = field(
        default=0,
        metadata={
            "help": "host memory for requests that have to leave the device, so that more can run than fit at full "
            "length",
        },
    )
    prefix_cache: bool = field(
        default=True, metadata={"help": "keep the pages of prompts for later prompts that begin alike"}
    )
    prefix_windows: int = field(
        default=0,
        metadata={
            "help": "boundaries of prompts for which streaming heads have room in the prefix cache, beyond pages that "
            "are idle",
            "least": 0,
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.kv_memory, str) and self.kv_memory not in ("fit", "free"):
            raise InputError(f"kv_memory={shown(self.kv_memory)} must be a number of bytes, fit or free")
        if self.kv_bytes is not None:
            _require_bytes("kv_memory", self.kv_bytes, 1)
        _require_bytes("swap_memory", self.swap_memory, 0)
        if not isinstance(self.prefix_cache, bool):
            raise InputError(f"prefix_cache={shown(self.prefix_cache)} must be true or false")
        require_whole("prefix_windows", self.prefix_windows, 0)

    @property
    def kv_bytes(self) -> int | None:
        """Returns the bytes of both pools if they were given as such."""
        return None if isinstance(self.kv_memory, str) else self.kv_memory


def _require_bytes(name: str, value: Any, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}={shown(value)} must be a whole number of bytes from {least}")


@dataclass(frozen=True, kw_only=True)
class PoolSizes:
    """Pages per layer of each pool; 0 for a pool that no layer has.

    Attributes:
      retrieval, streaming: pages on the device.
      swap: retrieval pages for which host memory has room, should the device's run out.
    """

    retrieval: int
    streaming: int
    swap: int = 0

    @classmethod
    def of(cls, config: InferenceConfig, sizes: Sizes, *, windows: int = 0) -> Self:
        """Returns the pools that ``sizes.max_num_seqs`` sequences of full length need to decode together.

        One of them may be in its prefill, whose window in the streaming pool is longer. The streaming pool also has
        room for ``windows`` windows of the prefix cache.
        """
        attention, length = config.attention, sizes.max_model_len
        retrieval = sizes.max_num_seqs * most_pages(attention, sizes, length, 0, keeps_all=True)
        decode, prefill = (most_pages(attention, sizes, length, prompt, keeps_all=False) for prompt in (0, length))
        window = min(
            most_streaming_pages(attention.sink, attention.prefill_window, 1, attention.page_size),
            retrieval_pages(length, attention.page_size),
        )
        has_retrieval, has_streaming = any(config.num_retrieval), any(kind.streaming for kind in config.kinds)
        return cls(
            retrieval=retrieval if has_retrieval else 0,
            streaming=(sizes.max_num_seqs - 1) * decode + prefill + windows * window if has_streaming else 0,
        )
