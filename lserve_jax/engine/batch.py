"""The arrays that tell a compiled program about the sequences of its batch, made on the host for every call."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.pages import retrieval_pages
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.config.sizes import Sizes
from lserve_jax.engine.allocator import stack_rows, stack_tables
from lserve_jax.engine.plans import Chunk, Decode
from lserve_jax.engine.request import Sequence as EngineSequence
from lserve_jax.runtime.adjustments import Adjustments, History
from lserve_jax.runtime.sampling import SamplingState
from lserve_jax.runtime.steps import DecodeState
from pallas_kernels import PageTables

type Rows = Sequence[EngineSequence | None]
"""The sequence of each slot; None for an empty one."""


@dataclass(frozen=True)
class BatchArrays:
    """Makes the arrays of a model and its sizes. All are NumPy: the call copies them to the device."""

    config: InferenceConfig
    sizes: Sizes

    def by_slot(self, sequences: Iterable[EngineSequence]) -> Rows:
        """Returns the sequence of each slot."""
        rows: list[EngineSequence | None] = [None] * self.sizes.max_num_seqs
        for sequence in sequences:
            assert sequence.slot is not None
            rows[sequence.slot] = sequence
        return rows

    def tables(self, sequences: Iterable[EngineSequence]) -> PageTables:
        """Returns the page tables [max_num_seqs, max_pages] int32."""
        pages = retrieval_pages(self.sizes.max_model_len, self.config.attention.page_size)
        return PageTables(*stack_tables(sequences, self.sizes.max_num_seqs, pages))

    def chunk_tables(self, chunks: Sequence[Chunk], rows: int) -> PageTables:
        """Returns the page tables [rows, max_pages] int32 of prompt chunks, and their slots; 0 for rows without one."""
        pages = retrieval_pages(self.sizes.max_model_len, self.config.attention.page_size)
        empty = [None] * (rows - len(chunks))
        slots = np.zeros(rows, np.int32)
        for row, chunk in enumerate(chunks):
            assert chunk.sequence.slot is not None
            slots[row] = chunk.sequence.slot
        return PageTables(*stack_rows([*(chunk.sequence for chunk in chunks), *empty], pages), slots)

    def chunk_tokens(self, chunks: Sequence[Chunk], rows: int, size: int, shift: int = 0) -> np.ndarray:
        """Returns the tokens [rows, size] int32 of prompt chunks, or those ``shift`` places after them; else 0."""
        tokens = np.zeros((rows, size), np.int32)
        for row, chunk in enumerate(chunks):
            held = chunk.sequence.request.prompt[chunk.start + shift : chunk.end + shift]
            tokens[row, : len(held)] = held
        return tokens

    def decode_state(self, plan: Decode) -> DecodeState:
        """Returns the state of each slot before the steps of a plan.

        The device gets the first stop tokens of a request. The host, which sees every token, knows the rest.
        """
        slots, most = self.sizes.max_num_seqs, self.sizes.max_stop_tokens
        tokens, lengths, steps, remaining = np.zeros((4, slots), np.int32)
        stops = np.full((slots, most), -1, np.int32)
        for sequence, limit in zip(plan.sequences, plan.limits, strict=True):
            slot, stop_token_ids = sequence.slot, params_of(sequence).stop_token_ids[:most]
            tokens[slot], lengths[slot] = sequence.tokens[-1], len(sequence.tokens)
            steps[slot], remaining[slot] = sequence.decode_steps, limit
            stops[slot, : len(stop_token_ids)] = stop_token_ids
        columns: list[Any] = [tokens, lengths, steps, remaining, stops]
        return DecodeState(*columns)

    def sampling(self, rows: Rows) -> SamplingState:
        """Returns the sampling settings of each row."""
        return SamplingState.from_params([None if one is None else params_of(one) for one in rows])

    def adjustments(self, rows: Rows) -> Adjustments:
        """Returns the changes of the logits of each row."""
        histories = [
            None if one is None else History(params_of(one), one.request.prompt, one.generated) for one in rows
        ]
        return Adjustments.of(histories, self.config.model.vocab_size)

    def forced(self, rows: Rows, steps: int) -> np.ndarray:
        """Returns the forced tokens [steps, B] int32 of each sequence's next steps; -1 where sampling decides."""
        forced = np.full((steps, len(rows)), -1, np.int32)
        for column, sequence in enumerate(rows):
            if sequence is not None:
                due = sequence.request.forced[sequence.num_generated :][:steps]
                forced[: len(due), column] = due
        return forced


def params_of(sequence: EngineSequence) -> SamplingParams:
    """Returns a sequence's sampling parameters, of which the scheduler knows only the limits."""
    assert isinstance(sequence.request.sampling, SamplingParams)
    return sequence.request.sampling
