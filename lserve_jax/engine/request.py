"""The request of a caller, and its progress in the engine."""

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from lserve_jax.config.checks import LARGEST_INT
from lserve_jax.config.errors import InputError


class Limits(Protocol):
    """The part of the sampling parameters that the engine's host side needs."""

    @property
    def max_tokens(self) -> int:
        """Returns the most tokens to generate."""
        ...

    @property
    def stop_token_ids(self) -> Collection[int]:
        """Returns the tokens that end the sequence."""
        ...

    @property
    def is_stepwise(self) -> bool:
        """Returns whether the host must act after every token."""
        ...


def require_room(prompt_tokens: int, max_model_len: int) -> None:
    """Raises `InputError` if a prompt alone is longer than the context."""
    if prompt_tokens > max_model_len:
        raise InputError(
            f"prompt has {prompt_tokens} tokens, but max_model_len is {max_model_len}: "
            "shorten the prompt or raise max_model_len"
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue.

    Attributes:
      id: unique among the unfinished requests of a scheduler.
      prompt: token ids, at least one.
      sampling: opaque here except for its limits.
      forced: tokens that replace the sampled ones, for scoring; ``max_tokens`` of them, or none.
      arrival: seconds on the caller's clock, for its statistics; the order of `Scheduler.add` decides scheduling.
      priority: requests with a lower number are admitted first; those with the same in the order of their arrival.
      salt: only requests with the same salt share cached prefixes.
      is_cacheable: whether its prompt may be taken from the prefix cache and entered there, and read in one call with
        others; not if the caller wants more of the prompt than its last logits.
      has_logits: whether the caller wants the logits from which each token is chosen.
      is_context: whether longer prompts will begin with it, so that none of its tokens are a prompt's last ones.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: Limits
    forced: tuple[int, ...] = ()
    arrival: float = 0.0
    priority: int = 0
    salt: bytes = b""
    is_cacheable: bool = True
    has_logits: bool = False
    is_context: bool = False

    def __post_init__(self) -> None:
        assert len(self.forced) in (0, self.sampling.max_tokens)
        if not self.prompt:
            raise InputError(f"request {self.id}: the prompt is empty; it must have at least one token")
        if self.sampling.max_tokens < 1:
            raise InputError(f"request {self.id}: max_tokens must be at least 1, got {self.sampling.max_tokens}")


class Status(Enum):
    """The state of a sequence. It changes to a later one in this list, and from SWAPPED back to what it was."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    SWAPPED = "swapped"
    FINISHED = "finished"


@dataclass(kw_only=True)
class Prefix:
    """What a sequence shares with the prefix cache.

    Attributes:
      digests: of each whole chunk of its prompt; None until it is first looked up.
      entry: the last of the entries that it shares, all of them from the start of its prompt.
      num_chunks: how many chunks these are.
      num_hit: tokens of its prompt that it found when it was admitted.
      windows: the numbers of chunks after which the streaming heads' window is kept.
    """

    digests: tuple[bytes, ...] | None = None
    entry: Any = None
    num_chunks: int = 0
    num_hit: int = 0
    windows: frozenset[int] = frozenset()


@dataclass(kw_only=True)
class Swapped:
    """What a sequence has in host memory.

    Attributes:
      retrieval, streaming: the logical pages.
      pages: their contents, and the row of the slot; the engine's.
    """

    retrieval: NDArray[np.intp]
    streaming: NDArray[np.intp]
    pages: Any = None


@dataclass(kw_only=True, eq=False)
class Sequence:
    """A request in progress. Only the scheduler and its allocator change it.

    The next step writes the newest token's key and value. A decoding sequence therefore has one token more than the
    cache, and the last token of a sequence never enters the cache.

    Attributes:
      request: the request.
      max_length: tokens, prompt included, at which generation ends with "length".
      retrieval_table, streaming_table: the physical page of each logical page (``position // page_size``), -1 if it has
        none; as long as this sequence can ever need.
      tokens: the prompt and the tokens generated after it.
      num_cached: how many tokens from the start have their keys and values in the cache.
      decode_steps: decode steps since the prefill: the phase of the page selector.
      slot: the row of the device's batch during prefill and decoding.
      finish_reason: why it finished: "stop", "length", "error", "abort".
      number: its place in the order of arrival.
      prefix: what it shares with the prefix cache.
      swapped: what it left on the device's memory for the host's; None if nothing.
    """

    request: Request
    max_length: int
    retrieval_table: NDArray[np.int32]
    streaming_table: NDArray[np.int32]
    tokens: list[int] = field(init=False)
    status: Status = Status.WAITING
    num_cached: int = 0
    decode_steps: int = 0
    slot: int | None = None
    finish_reason: str | None = None
    number: int = 0
    prefix: Prefix = field(default_factory=Prefix)
    swapped: "Swapped | None" = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @classmethod
    def from_request(cls, request: Request, *, max_model_len: int, page_size: int) -> Self:
        """Returns a waiting sequence, whose generation ends at the end of the context.

        ``max_model_len`` bounds prompt and generation together. A prompt that fills it exactly still gets the one token
        that its prefill yields, because that token needs no room in the cache.
        """
        prompt = len(request.prompt)
        max_length = max(prompt + 1, min(prompt + request.sampling.max_tokens, max_model_len))
        num_pages = -(-(max_length - 1) // page_size)
        tables = np.full((2, num_pages), -1, np.int32)
        return cls(request=request, max_length=max_length, retrieval_table=tables[0], streaming_table=tables[1])

    @property
    def prompt_length(self) -> int:
        """Returns how many tokens the prompt has."""
        return len(self.request.prompt)

    @property
    def prompt_end(self) -> int:
        """Returns where the prompt ends; beyond all positions if longer ones will begin with it."""
        return LARGEST_INT if self.request.is_context else self.prompt_length

    @property
    def num_generated(self) -> int:
        """Returns how many tokens follow the prompt."""
        return len(self.tokens) - self.prompt_length

    @property
    def generated(self) -> list[int]:
        """Returns the tokens after the prompt."""
        return self.tokens[self.prompt_length :]

    @property
    def rank(self) -> tuple[int, int]:
        """Returns its place in the order of service: by priority, then by arrival."""
        return self.request.priority, self.number

    @property
    def remaining(self) -> int:
        """Returns how many more tokens this sequence may generate."""
        return self.max_length - len(self.tokens)


RANK = attrgetter("rank")
"""The key that sorts sequences in the order of service."""
