"""What the scheduler asks the engine to do next."""

from dataclasses import dataclass

from lserve_jax.engine.request import Sequence


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start … start + count - 1`` of one sequence's prompt."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        """Returns the position after the last token."""
        return self.start + self.count

    @property
    def is_last(self) -> bool:
        """Returns whether this chunk ends the prompt, so that its last logits yield the first generated token."""
        return self.end == self.sequence.prompt_length


@dataclass(frozen=True)
class Prefill:
    """One call: a chunk of a prompt, or several whole prompts that are short."""

    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Decode:
    """One call: up to ``num_steps`` decode steps of every decoding sequence, at most ``limits[i]`` of sequence i."""

    sequences: tuple[Sequence, ...]
    limits: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        """Returns the largest of the limits."""
        return max(self.limits, default=0)


@dataclass(frozen=True, kw_only=True)
class Swap:
    """Pages of one sequence to move, and the row of its slot, before any other call.

    Attributes:
      sequence: the sequence.
      is_out: whether they go to host memory, else back.
      slot: the slot that the sequence leaves or gets.
      retrieval: physical pages in the order of the sequence's logical pages.
      streaming: the same for the streaming pool.
      num_shared: on the way back, how many of the first retrieval pages are not moved, because they are still cached.
    """

    sequence: Sequence
    is_out: bool
    slot: int
    retrieval: tuple[int, ...]
    streaming: tuple[int, ...]
    num_shared: int = 0


type Plan = Prefill | Decode | Swap
