"""One step of the engine: a plan of the scheduler, a call of a compiled program, and a record of its result."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lserve_jax.config.errors import InputError
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.pages import retrieval_pages
from lserve_jax.config.sizes import PoolSizes, Sizes
from lserve_jax.engine.allocator import stack_tables
from lserve_jax.engine.request import Request, Sequence
from lserve_jax.engine.scheduler import Decode, Prefill, Scheduler
from lserve_jax.models.llama import Params
from lserve_jax.runtime.cache import KVCache, empty_cache
from lserve_jax.runtime.programs import Call, Programs
from lserve_jax.runtime.recall import recall_step
from lserve_jax.runtime.sampling import SamplingParams, SamplingState
from lserve_jax.runtime.steps import DecodeState, decode_loop, prefill_step, sample_first, score_chunk
from pallas_kernels import PageTables

SHORT_CHUNK = 64
"""Chunk size of a separate program for prompts that fit into it, so that a short prompt does not cost a long chunk."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The result of a call for one sequence.

    Attributes:
      sequence: the sequence, already advanced.
      tokens: new tokens that it generated, in order.
      logprobs: their log-probabilities under the model's unmodified distribution.
      choices: the sampled tokens, which differ from ``tokens`` only where those were forced.
      seconds: wall time of the call without compilation.
      is_prefill: whether it was a prefill call.
      pages_held: pages per pool, retrieval and streaming, that the sequence used during the call.
      recall: [L] of the call's first decode step (see `recall_step`), if it is measured.
    """

    sequence: Sequence
    tokens: list[int]
    logprobs: list[float]
    choices: list[int]
    seconds: float
    is_prefill: bool
    pages_held: tuple[int, int]
    recall: np.ndarray | None = None


type Accept = Callable[[Sequence, list[int]], tuple[int, str | None]]
"""(sequence, its new tokens) → (how many of them to keep, at least 1; why the sequence is finished, or None)."""


class Engine:
    """Continuous batching over the compiled steps, available after `load`. Not thread-safe."""

    def __init__(
        self,
        params: Params,
        config: InferenceConfig,
        sizes: Sizes,
        pools: PoolSizes,
        *,
        has_recall: bool = False,
        on_compile: Callable[[str], None] | None = None,
    ) -> None:
        """Creates an engine that can compile; `load` makes it ready to run.

        Args:
          params: the weights as `jax.ShapeDtypeStruct`.
          config: model, attention and number types.
          sizes: sequences, context and calls.
          pools: pages of the cache.
          has_recall: whether to measure the recall of page selection at the first decode step of every call.
          on_compile: called with the names of programs when their compilation begins.
        """
        self.params = params
        self.config = config
        self.sizes = sizes
        self.programs = Programs(on_compile)
        self.scheduler = Scheduler(sizes, config.attention, pools)
        self._pools = pools
        self._has_recall = has_recall
        self.cache: KVCache = jax.eval_shape(self.new_cache)
        self._has_cache = False
        self._max_pages = retrieval_pages(sizes.max_model_len, config.attention.page_size)

    def expect(self, request: Request) -> None:
        """Starts to compile the programs of a request; before `load`, this overlaps with the reading of the weights."""
        sequence = Sequence.from_request(
            request, max_model_len=self.sizes.max_model_len, page_size=self.config.attention.page_size
        )
        sequence.slot = 0
        count = min(sequence.prompt_length, self.sizes.prefill_chunk)
        self._start_first(Prefill(sequence, 0, count))

    def load(self, params: Params) -> None:
        """Replaces the abstract weights by ``params`` and allocates the cache."""
        self.params = params
        self._restore_cache()

    def add(self, request: Request) -> Sequence:
        """Returns the waiting sequence of a request; raises `InputError` if it can never run."""
        if len(request.sampling.stop_token_ids) > self.sizes.max_stop_tokens:
            raise InputError(f"a request may have {self.sizes.max_stop_tokens} stop tokens at most")
        return self.scheduler.add(request)

    def step(self, accept: Accept) -> list[Progress]:
        """Returns the result of the next call for every sequence in it; an empty list if nothing is left to do."""
        self._restore_cache()
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        with self._ending_all_on_failure():
            return [self._prefill(plan, accept)] if isinstance(plan, Prefill) else self._decode(plan, accept)

    def prompt_logits(self, prompt: tuple[int, ...]) -> np.ndarray:
        """Returns the logits [T, V] float32 of every token of a prompt, through the same path as generation."""
        return np.concatenate([np.asarray(logits)[0, : plan.count] for plan, logits in self._prompt_chunks(prompt)])

    def prompt_logprobs(self, prompt: tuple[int, ...]) -> np.ndarray:
        """Returns the log-probabilities [T - 1] float32 of a prompt's tokens from the second on, by the same path."""
        parts = []
        for plan, logits in self._prompt_chunks(prompt):
            following = np.zeros(logits.shape[:2], np.int32)
            new = prompt[plan.start + 1 : plan.start + 1 + plan.count]
            following[0, : len(new)] = new
            call = Call(f"score_{logits.shape[1]}", score_chunk, (logits, following), {})
            parts.append(np.asarray(self.programs.run(call))[0, : len(new)])
        return np.concatenate(parts)

    def _prompt_chunks(self, prompt: tuple[int, ...]) -> Iterator[tuple[Prefill, jax.Array]]:
        """Yields a prompt's chunks with the logits [1, chunk, V] of all their tokens."""
        assert self.scheduler.is_idle, "logits are computed between generations"
        self._restore_cache()
        sequence = self.scheduler.add(Request(id=-1, prompt=prompt, sampling=SamplingParams(max_tokens=1)))
        with self._ending_all_on_failure():
            while isinstance(plan := self.scheduler.schedule(), Prefill):
                logits, _ = self._run_prefill(plan, has_all_logits=True)
                yield plan, logits
                token, reason = (0, "length") if plan.is_last else (None, None)
                self.scheduler.record_prefill(plan, token, reason)
        assert sequence.finish_reason == "length"

    def new_cache(self) -> KVCache:
        """Returns an empty cache."""
        return empty_cache(self.config, self.sizes, self._pools)

    def _restore_cache(self) -> None:
        """Allocates the cache if there is none. If memory lacks now, the next call retries."""
        if not self._has_cache:
            self.cache = jax.jit(self.new_cache)()
            self._has_cache = True

    @contextmanager
    def _ending_all_on_failure(self) -> Iterator[None]:
        """Ends all sequences if a device call or its record fails or is interrupted, so that the engine stays usable.

        Sequences may then have advanced on the device but not on the host, and the donated cache may be lost.
        """
        try:
            yield
        except BaseException:
            self.scheduler.abort_all()
            if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(self.cache)):
                self.cache = jax.eval_shape(self.new_cache)  # frees the rest of it
                self._has_cache = False
            raise

    def _prefill(self, plan: Prefill, accept: Accept) -> Progress:
        if plan.start == 0:
            self._compile_for(plan)
        logits, seconds = self._run_prefill(plan)
        sequence, held = plan.sequence, _pages_held(plan.sequence)
        if not plan.is_last:
            self.scheduler.record_prefill(plan)
            return Progress(
                sequence=sequence, tokens=[], logprobs=[], choices=[], seconds=seconds, is_prefill=True, pages_held=held
            )
        result, more = self._timed(self._sample_call(logits, sequence))
        tokens, logprobs, choices = (np.asarray(x).tolist() for x in result)
        _, reason = accept(sequence, tokens)
        self.scheduler.record_prefill(plan, tokens[0], reason)
        return Progress(
            sequence=sequence,
            tokens=tokens,
            logprobs=logprobs,
            choices=choices,
            seconds=seconds + more,
            is_prefill=True,
            pages_held=held,
        )

    def _compile_for(self, plan: Prefill) -> None:
        """Compiles all programs of a request at its first chunk: together they take little longer than the longest.

        If the prompt fits into one chunk, the first token does not wait for the decode program.
        """
        if plan.is_last:
            self._start_first(plan)
        else:
            self.programs.compile(self._first_calls(plan))

    def _start_first(self, plan: Prefill) -> None:
        """Starts to compile all programs of a request; decoding waits for the first token of a one-chunk prompt."""
        calls = self._first_calls(plan)
        self.programs.start(calls, later=[call.name for call in calls[2:]] if plan.is_last else ())

    def _first_calls(self, plan: Prefill) -> list[Call]:
        """Returns calls of all programs that a request needs, in the order in which it needs them."""
        logits = jax.ShapeDtypeStruct((1, self.config.model.vocab_size), np.float32)
        calls = [self._prefill_call(plan), self._sample_call(logits, plan.sequence)]
        is_decoding = plan.sequence.max_length > plan.sequence.prompt_length + 1
        return [*calls, self._decode_call(Decode((), ()))] if is_decoding else calls

    def _run_prefill(self, plan: Prefill, *, has_all_logits: bool = False) -> tuple[jax.Array, float]:
        """Returns the chunk's logits and seconds, and writes the chunk to the cache."""
        (logits, self.cache), seconds = self._timed(self._prefill_call(plan, has_all_logits=has_all_logits))
        return logits, seconds

    def _prefill_call(self, plan: Prefill, *, has_all_logits: bool = False) -> Call:
        sequence, chunk = plan.sequence, self.sizes.prefill_chunk
        is_short = sequence.prompt_length <= SHORT_CHUNK <= chunk
        size = SHORT_CHUNK if is_short else chunk
        assert not (is_short and plan.start)
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : plan.count] = sequence.tokens[plan.start : plan.start + plan.count]
        slot = sequence.slot
        assert slot is not None
        tables = PageTables(*(table[slot : slot + 1] for table in self._tables([sequence])))
        start, count = np.array([plan.start], np.int32), np.array([plan.count], np.int32)
        return Call(
            ("prefill_short" if is_short else f"prefill_{size}") + ("_all_logits" if has_all_logits else ""),
            prefill_step,
            (self.params, self.cache, tokens, start, count, tables),
            {"config": self.config, "has_history": not is_short, "has_all_logits": has_all_logits},
        )

    def _sample_call(self, logits: jax.Array | jax.ShapeDtypeStruct, sequence: Sequence) -> Call:
        sampling = SamplingState.from_params([_sampling(sequence)])
        positions = np.array([sequence.prompt_length], np.int32)
        return Call("sample", sample_first, (logits, positions, sampling, _forced([sequence], 1)[0]), {})

    def _decode(self, plan: Decode, accept: Accept) -> list[Progress]:
        recall = self._recall(plan) if self._has_recall else None
        (generated, _, self.cache), seconds = self._timed(self._decode_call(plan))
        tokens, logprobs, choices = (np.asarray(x) for x in generated)
        results = []
        for sequence in plan.sequences:
            column = tokens[:, sequence.slot]
            new = column[column >= 0].tolist()
            kept, reason = accept(sequence, new)
            scores, chosen = (x[:kept, sequence.slot].tolist() for x in (logprobs, choices))
            held, recalled = _pages_held(sequence), None if recall is None else recall[:, sequence.slot]
            self.scheduler.record_decode(sequence, new[:kept], reason)
            results.append(
                Progress(
                    sequence=sequence,
                    tokens=new[:kept],
                    logprobs=scores,
                    choices=chosen,
                    seconds=seconds,
                    is_prefill=False,
                    pages_held=held,
                    recall=recalled,
                )
            )
        return results

    def _recall(self, plan: Decode) -> np.ndarray:
        """Returns the recall [L, max_num_seqs] of the next step."""
        state, tables = self._decode_state(plan), self._tables(plan.sequences)
        lengths = np.where(np.asarray(state.remaining) > 0, state.lengths, 0)
        args = (self.params, self.cache, state.tokens, lengths, state.decode_steps, tables)
        recall, self.cache = self.programs.run(Call("recall", recall_step, args, {"config": self.config}))
        return np.asarray(recall)

    def _decode_call(self, plan: Decode) -> Call:
        sequences = self._by_slot(plan.sequences)
        sampling = SamplingState.from_params([None if one is None else _sampling(one) for one in sequences])
        max_steps = self.sizes.steps_per_call
        steps = np.int32(plan.num_steps), _forced(sequences, max_steps)
        return Call(
            "decode",
            decode_loop,
            (self.params, self.cache, self._decode_state(plan), self._tables(plan.sequences), sampling, *steps),
            {"config": self.config, "max_steps": max_steps},
        )

    def _decode_state(self, plan: Decode) -> DecodeState:
        slots = self.sizes.max_num_seqs
        tokens, lengths, steps, remaining = np.zeros((4, slots), np.int32)
        stops = np.full((slots, self.sizes.max_stop_tokens), -1, np.int32)
        for sequence, limit in zip(plan.sequences, plan.limits, strict=True):
            slot, sampling = sequence.slot, sequence.request.sampling
            tokens[slot], lengths[slot] = sequence.tokens[-1], len(sequence.tokens)
            steps[slot], remaining[slot] = sequence.decode_steps, limit
            stops[slot, : len(sampling.stop_token_ids)] = list(sampling.stop_token_ids)
        columns: list[Any] = [tokens, lengths, steps, remaining, stops]  # NumPy: the call copies them to the device
        return DecodeState(*columns)

    def _tables(self, sequences: Iterable[Sequence]) -> PageTables:
        tables = stack_tables(sequences, self.sizes.max_num_seqs, self._max_pages)
        return PageTables(*tables)

    def _by_slot(self, sequences: Iterable[Sequence]) -> list[Sequence | None]:
        rows: list[Sequence | None] = [None] * self.sizes.max_num_seqs
        for sequence in sequences:
            assert sequence.slot is not None
            rows[sequence.slot] = sequence
        return rows

    def _timed(self, call: Call) -> tuple[Any, float]:
        """Returns the finished result of a call, and its seconds without compilation."""
        self.programs.compile([call])
        begin = time.perf_counter()
        return self.programs.run(call), time.perf_counter() - begin


def _pages_held(sequence: Sequence) -> tuple[int, int]:
    """Returns how many pages of the retrieval and of the streaming pool a sequence uses."""
    tables = sequence.retrieval_table, sequence.streaming_table
    retrieval, streaming = (int((table >= 0).sum()) for table in tables)
    return retrieval, streaming


def _sampling(sequence: Sequence) -> SamplingParams:
    """Returns a sequence's sampling parameters, of which the scheduler knows only the limits."""
    assert isinstance(sequence.request.sampling, SamplingParams)
    return sequence.request.sampling


def _forced(sequences: Collection[Sequence | None], steps: int) -> np.ndarray:
    """Returns the forced tokens [steps, B] int32 of each sequence's next steps; -1 where sampling decides."""
    rows = np.full((steps, len(sequences)), -1, np.int32)
    for column, sequence in enumerate(sequences):
        if sequence is not None:
            due = sequence.request.forced[sequence.num_generated :][:steps]
            rows[: len(due), column] = due
    return rows
