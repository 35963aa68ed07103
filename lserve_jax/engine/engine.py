"""One step of the engine: a plan of the scheduler, a call of a compiled program, and a record of its result."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.config.sizes import PoolSizes, Sizes
from lserve_jax.engine.batch import BatchArrays, Rows, params_of
from lserve_jax.engine.host_pages import HostPages, PageMover
from lserve_jax.engine.plans import Chunk, Decode, Prefill, Swap
from lserve_jax.engine.progress import Progress, PromptScores, Taken, not_finite, top_rows
from lserve_jax.engine.request import Request
from lserve_jax.engine.request import Sequence as EngineSequence
from lserve_jax.engine.scheduler import Scheduler, Turns
from lserve_jax.models.llama import Params
from lserve_jax.runtime.adjustments import Adjustments
from lserve_jax.runtime.cache import KVCache, empty_cache
from lserve_jax.runtime.density import Density, density_step
from lserve_jax.runtime.freed_memory import give_back_freed_memory
from lserve_jax.runtime.programs import Call, Programs
from lserve_jax.runtime.recall import recall_step
from lserve_jax.runtime.steps import Generated, decode_loop, prefill_step, sample_first, score_step

TAIL_CHUNKS = (64, 256)
"""Chunk sizes of further programs for the last chunk of a prompt. The smallest that holds it runs, so that what a
prompt adds to one that was read before does not cost a whole chunk."""

type Accept = Callable[[EngineSequence, Taken], tuple[int, str | None]]
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
        turns: Turns | None = None,
        has_prefix_cache: bool = True,
        has_recall: bool = False,
        on_compile: Callable[[str], None] | None = None,
    ) -> None:
        """Creates an engine that can compile; `load` makes it ready to run.

        Args:
          params: the weights as `jax.ShapeDtypeStruct`.
          config: model, attention and number types.
          sizes: sequences, context and calls.
          pools: pages of the cache.
          turns: how calls take turns.
          has_prefix_cache: whether pages of earlier prompts are kept for prompts that begin alike.
          has_recall: whether to measure the recall of page selection at the first decode step of every call.
          on_compile: called with the names of programs when their compilation begins.
        """
        self.params = params
        self.config = config
        self.sizes = sizes
        self.programs = Programs(on_compile)
        self._mover = PageMover(self.programs)
        turns = turns or Turns()
        self._turns = turns if turns.short_chunk <= sizes.prefill_chunk else replace(turns, short_chunk=0)
        tails = (size for size in TAIL_CHUNKS if size < sizes.prefill_chunk)
        self._chunk_sizes = (*tails, sizes.prefill_chunk)
        self.scheduler = Scheduler(sizes, config.attention, pools, turns=self._turns, has_prefix_cache=has_prefix_cache)
        self._pools = pools
        self._has_recall = has_recall
        self.cache: KVCache = jax.eval_shape(self.new_cache)
        self._has_cache = False
        self._arrays = BatchArrays(config, sizes)
        self._unadjusted: dict[int, Adjustments] = {}

    def expect(self, request: Request) -> None:
        """Starts to compile the programs of a request; before `load`, this overlaps with the reading of the weights."""
        self._start_first(self._first_chunk(request))

    def _first_chunk(self, request: Request) -> Chunk:
        """Returns the first chunk of a request, for its shapes alone."""
        sequence = EngineSequence.from_request(
            request, max_model_len=self.sizes.max_model_len, page_size=self.config.attention.page_size
        )
        sequence.slot = 0
        return Chunk(sequence, 0, min(sequence.prompt_length, self.sizes.prefill_chunk))

    def load(self, params: Params) -> None:
        """Replaces the abstract weights by ``params`` and allocates the cache."""
        self.params = params
        self._restore_cache()
        batches = {1, self._turns.short_rows, self.sizes.max_num_seqs}
        nobody = {size: self._arrays.adjustments([None] * size) for size in batches}
        self._unadjusted = jax.device_put(nobody)
        give_back_freed_memory()

    def warm_up(self, *, moves_pages: bool = False, on_done: Callable[[int, int], None] | None = None) -> None:
        """Compiles every program that a request may need; runs none.

        What returns whole logits (`prompt_logits`, requests with ``has_logits``) is for no request of a server, and is
        compiled when it is first called.

        Args:
          moves_pages: whether `read_pages` and `write_pages` will be called too.
          on_done: called with the number of programs that are compiled, and that of all.
        """
        calls = list({call.name: call for call in self._all_calls(moves_pages)}.values())
        self.programs.start(calls)
        for done, call in enumerate(calls, start=1):
            self.programs.compile([call])
            if on_done is not None:
                on_done(done, len(calls))

    def _all_calls(self, moves_pages: bool) -> Iterator[Call]:
        """Yields calls of all programs, those that a short prompt needs first; some twice."""
        longest = self.sizes.max_model_len
        # Each size ends a prompt of one chunk or of several.
        lengths = {1, *self._chunk_sizes, *(self.sizes.prefill_chunk + size for size in self._chunk_sizes)}
        for has_scores in (False, True):
            for length in sorted({min(length, longest) for length in lengths}):
                params = SamplingParams(max_tokens=2, prompt_logprobs=has_scores)
                yield from self._first_calls(self._first_chunk(Request(id=-1, prompt=(0,) * length, sampling=params)))
            yield self._decode_call(Decode((), ()))
        if self._pools.swap or moves_pages:
            yield from self._mover.calls(self.cache)
        if self._has_recall:
            yield self._recall_call(Decode((), ()))

    def add(self, request: Request) -> EngineSequence:
        """Returns the waiting sequence of a request; raises `InputError` if it can never run."""
        assert isinstance(request.sampling, SamplingParams)
        assert not (request.is_cacheable and request.sampling.prompt_logprobs), "what is cached has no scores"
        return self.scheduler.add(request)

    def step(self, accept: Accept) -> list[Progress]:
        """Returns the result of the next call for every sequence in it; an empty list if nothing is left to do."""
        self._restore_cache()
        with self._ending_all_on_failure():
            while isinstance(plan := self.scheduler.schedule(), Swap):
                self._swap(plan)
            if plan is None:
                return []
            return self._prefill(plan, accept) if isinstance(plan, Prefill) else self._decode(plan, accept)

    def _swap(self, plan: Swap) -> None:
        """Moves the pages of a sequence, and its last page selection, between device and host memory."""
        left = plan.sequence.swapped
        assert left is not None
        if plan.is_out:
            pages = self._mover.read(self.cache, plan.retrieval, plan.streaming)
            left.pages = pages, self._mover.read_slot(self.cache, plan.slot)
        else:
            pages, rows = left.pages
            missing = pages._replace(retrieval=jax.tree.map(lambda x: x[plan.num_shared :], pages.retrieval))
            self.cache = self._mover.write(self.cache, missing, plan.retrieval, plan.streaming)
            self.cache = self._mover.write_slot(self.cache, rows, plan.slot)
            plan.sequence.swapped = None

    def read_pages(self, retrieval: Sequence[int], streaming: Sequence[int]) -> HostPages:
        """Returns copies of pages of both pools."""
        return self._mover.read(self.cache, retrieval, streaming)

    def write_pages(self, pages: HostPages, retrieval: Sequence[int], streaming: Sequence[int]) -> None:
        """Writes pages of both pools; if that fails, all requests end, as when a step fails."""
        self._restore_cache()
        with self._ending_all_on_failure():
            self.cache = self._mover.write(self.cache, pages, retrieval, streaming)

    def prompt_logits(self, prompt: tuple[int, ...]) -> np.ndarray:
        """Returns the logits [T, V] float32 of every token of a prompt, through the same path as generation."""
        chunks = self._prompt_chunks(prompt, lambda chunk: self._run_prefill([chunk], has_all_logits=True)[0])
        return np.concatenate([np.asarray(logits)[0, : chunk.count] for chunk, logits in chunks])

    def prompt_logprobs(self, prompt: tuple[int, ...]) -> np.ndarray:
        """Returns the log-probabilities [T - 1] float32 of a prompt's tokens from the second on, by the same path."""
        chunks = self._prompt_chunks(prompt, lambda chunk: self._run_chunks([chunk])[1], prompt_logprobs=True)
        scores = (found for _, found in chunks if found is not None)
        logprobs = np.array([logprob for found in scores for logprob in found.logprobs], np.float32)
        if not np.isfinite(logprobs).all():
            raise not_finite(len(prompt))
        return logprobs

    def prompt_density(self, prompt: tuple[int, ...]) -> float | None:
        """Returns the share of a prompt's history that retrieval heads read; None if no layer may leave anything out.

        Only layers count that may.
        """
        if not any(kind.prefill.blocks for kind in self.config.kinds):
            return None
        found = [density for _, density in self._prompt_chunks(prompt, self._run_density)]
        read, every = (sum(int(np.asarray(part).sum()) for part in parts) for parts in zip(*found, strict=True))
        return read / every if every else 1.0

    def _run_density(self, chunk: Chunk) -> Density:
        plain = self._prefill_call([chunk], rows=1)
        call = Call(f"{plain.name}_density", density_step, plain.args, {"config": self.config})
        density, self.cache = self.programs.run(call)
        return density

    def _prompt_chunks[T](
        self, prompt: tuple[int, ...], run: Callable[[Chunk], T], *, prompt_logprobs: bool = False
    ) -> Iterator[tuple[Chunk, T]]:
        """Yields the chunks of a prompt that is not continued, each with the result of ``run``."""
        assert self.scheduler.is_idle, "logits are computed between generations"
        self._restore_cache()
        params = SamplingParams(max_tokens=1, prompt_logprobs=prompt_logprobs)
        sequence = self.scheduler.add(Request(id=-1, prompt=prompt, sampling=params, is_cacheable=False))
        with self._ending_all_on_failure():
            while isinstance(plan := self.scheduler.schedule(), Prefill):
                (chunk,) = plan.chunks
                yield chunk, run(chunk)
                token, reason = (0, "length") if chunk.is_last else (None, None)
                self.scheduler.record_prefill(chunk, token, reason)
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
                self.scheduler.forget_pages()
            raise

    def _prefill(self, plan: Prefill, accept: Accept) -> list[Progress]:
        self._compile_for(plan.chunks)
        held = [_pages_held(chunk.sequence) for chunk in plan.chunks]
        logits, scores, seconds = self._run_chunks(plan.chunks)
        arrays: list[np.ndarray] = []
        if plan.chunks[0].is_last:
            sequences = [chunk.sequence for chunk in plan.chunks]
            generated, more = self._timed(self._sample_call(logits, sequences))
            if _has_logits(sequences):
                generated = generated._replace(logits=logits)
            arrays, seconds = [x[None] for x in _on_host(generated)], seconds + more
        results = []
        for row, chunk in enumerate(plan.chunks):
            taken = self._take_first(chunk, arrays, row, accept)
            results.append(
                Progress(
                    sequence=chunk.sequence,
                    taken=taken,
                    seconds=seconds,
                    is_prefill=True,
                    pages_held=held[row],
                    scores=scores,
                )
            )
        return results

    def _take_first(self, chunk: Chunk, arrays: list[np.ndarray], row: int, accept: Accept) -> Taken:
        """Returns the first token of a prompt, or none if the chunk is not the last one, and records the chunk."""
        if not chunk.is_last:
            self.scheduler.record_prefill(chunk)
            return Taken.joined([])
        taken = _taken(arrays, row, chunk.sequence)
        _, reason = accept(chunk.sequence, taken)
        self.scheduler.record_prefill(chunk, taken.tokens[0], reason)
        return taken

    def _run_chunks(self, chunks: Sequence[Chunk]) -> tuple[jax.Array, PromptScores | None, float]:
        """Returns the last logits [rows, V] of chunks, the scores if a request asks for them, and the seconds."""
        params = params_of(chunks[0].sequence)
        if not params.prompt_logprobs:
            logits, seconds = self._run_prefill(chunks)
            return logits, None, seconds
        (chunk,) = chunks
        (logits, scores, self.cache), seconds = self._timed(self._scored_call(chunk))
        count = min(chunk.count, chunk.sequence.prompt_length - 1 - chunk.start)
        logprobs, top_tokens, top_logprobs = (np.asarray(x)[0, :count] for x in scores)
        top = top_rows(top_tokens, top_logprobs, params.top_logprobs)
        return logits, PromptScores(logprobs=logprobs.tolist(), top_logprobs=top), seconds

    def _compile_for(self, chunks: Sequence[Chunk]) -> None:
        """Compiles all programs of a request at its first chunk: together they take little longer than the longest.

        If what is left of the prompt fits into one chunk, the first token does not wait for the decode program.
        """
        for chunk in chunks:
            if chunk.start == chunk.sequence.prefix.num_hit:
                if chunk.is_last:
                    self._start_first(chunk)
                else:
                    self.programs.compile(self._first_calls(chunk))

    def _start_first(self, chunk: Chunk) -> None:
        """Starts to compile all programs of a request; decoding waits for the first token of a one-chunk prompt."""
        calls = self._first_calls(chunk)
        later = [call.name for call in calls if call.step is decode_loop] if chunk.is_last else ()
        self.programs.start(calls, later=later)

    def _first_calls(self, chunk: Chunk) -> list[Call]:
        """Returns calls of all programs that a request needs from a chunk on, in the order in which it needs them."""
        sequence, size = chunk.sequence, self.sizes.prefill_chunk
        end = sequence.prompt_length
        rest = (end - 1 - chunk.start) % size + 1
        last = Chunk(sequence, end - rest, rest)
        make = self._scored_call if params_of(sequence).prompt_logprobs else lambda one: self._prefill_call([one])
        calls = {call.name: call for call in map(make, [chunk, last])}
        rows = calls[next(iter(calls))].args[2].shape[0]
        logits = jax.ShapeDtypeStruct((rows, self.config.model.vocab_size), np.float32)
        found = [*calls.values(), self._sample_call(logits, [sequence])]
        is_decoding = sequence.max_length > sequence.prompt_length + 1
        return [*found, self._decode_call(Decode((), ()), has_logits=_has_logits([sequence]))] if is_decoding else found

    def _run_prefill(self, chunks: Sequence[Chunk], *, has_all_logits: bool = False) -> tuple[jax.Array, float]:
        """Returns the logits and seconds of prompt chunks, and writes the chunks to the cache."""
        (logits, self.cache), seconds = self._timed(self._prefill_call(chunks, has_all_logits=has_all_logits))
        return logits, seconds

    def _scored_call(self, chunk: Chunk) -> Call:
        plain = self._prefill_call([chunk], rows=1)
        following = self._arrays.chunk_tokens([chunk], 1, plain.args[2].shape[1], shift=1)
        has_top = np.bool_(params_of(chunk.sequence).top_logprobs > 0)
        static = {name: plain.static[name] for name in ("config", "has_history")}
        return Call(f"{plain.name}_scored", score_step, (*plain.args, following, has_top), static)

    def _prefill_call(self, chunks: Sequence[Chunk], *, rows: int | None = None, has_all_logits: bool = False) -> Call:
        """Returns the call for chunks of prompts. Which program it is depends on the size of the chunk alone."""
        is_short = chunks[0].sequence.prompt_length <= self._turns.short_chunk
        size = self._turns.short_chunk if is_short else self._size_of(chunks[0])
        assert not (is_short and chunks[0].start)
        if rows is None:
            rows = 1 if has_all_logits or not is_short else self._turns.short_rows
        starts, counts, ends = np.zeros((3, rows), np.int32)
        starts[: len(chunks)] = [chunk.start for chunk in chunks]
        counts[: len(chunks)] = [chunk.count for chunk in chunks]
        ends[: len(chunks)] = [chunk.sequence.prompt_end for chunk in chunks]
        tokens, tables = self._arrays.chunk_tokens(chunks, rows, size), self._arrays.chunk_tables(chunks, rows)
        name = "prefill_short" if is_short else f"prefill_{size}"
        return Call(
            name + ("_all_logits" if has_all_logits else ""),
            prefill_step,
            (self.params, self.cache, tokens, starts, counts, tables, ends),
            {"config": self.config, "has_history": not is_short, "has_all_logits": has_all_logits},
        )

    def _size_of(self, chunk: Chunk) -> int:
        """Returns the size of the program for a chunk: the smallest one that holds it.

        It follows from the prompt alone, so that a prompt of which a part is cached takes the same programs.
        """
        if chunk.start and not self._turns.has_tails:
            return self.sizes.prefill_chunk
        return next(size for size in self._chunk_sizes if size >= chunk.count)

    def _sample_call(self, logits: jax.Array | jax.ShapeDtypeStruct, sequences: Sequence[EngineSequence]) -> Call:
        count = logits.shape[0]
        rows = [*sequences, *[None] * (count - len(sequences))]
        positions = np.array([0 if one is None else one.prompt_length for one in rows], np.int32)
        forced = self._arrays.forced(rows, 1)[0]
        args = (logits, positions, self._arrays.sampling(rows), forced, self._adjustments(rows))
        return Call("sample" if count == 1 else f"sample_{count}", sample_first, args, {})

    def _adjustments(self, rows: Rows) -> Adjustments:
        """Returns the changes of the logits of each row: those on the device, if no row changes anything."""
        is_adjusted = any(one is not None and params_of(one).is_adjusted for one in rows)
        found = None if is_adjusted else self._unadjusted.get(len(rows))
        return self._arrays.adjustments(rows) if found is None else found

    def _decode(self, plan: Decode, accept: Accept) -> list[Progress]:
        recall = self._recall(plan) if self._has_recall else None
        call = self._decode_call(plan, has_logits=_has_logits(plan.sequences))
        (generated, _, self.cache), seconds = self._timed(call)
        arrays, results = _on_host(generated), []
        for sequence in plan.sequences:
            slot = sequence.slot
            assert slot is not None
            taken = _taken(arrays, slot, sequence)
            kept, reason = accept(sequence, taken)
            held, taken = _pages_held(sequence), taken.first(kept)
            self.scheduler.record_decode(sequence, taken.tokens, reason)
            results.append(
                Progress(
                    sequence=sequence,
                    taken=taken,
                    seconds=seconds,
                    is_prefill=False,
                    pages_held=held,
                    recall=None if recall is None else recall[:, slot],
                )
            )
        return results

    def _recall(self, plan: Decode) -> np.ndarray:
        """Returns the recall [L, max_num_seqs] of the next step."""
        recall, self.cache = self.programs.run(self._recall_call(plan))
        return np.asarray(recall)

    def _recall_call(self, plan: Decode) -> Call:
        state, tables = self._arrays.decode_state(plan), self._arrays.tables(plan.sequences)
        lengths = np.where(np.asarray(state.remaining) > 0, state.lengths, 0)
        args = (self.params, self.cache, state.tokens, lengths, state.decode_steps, tables)
        return Call("recall", recall_step, args, {"config": self.config})

    def _decode_call(self, plan: Decode, *, has_logits: bool = False) -> Call:
        arrays, max_steps = self._arrays, self.sizes.steps_per_call
        rows = arrays.by_slot(plan.sequences)
        steps = np.int32(plan.num_steps), arrays.forced(rows, max_steps), self._adjustments(rows)
        state, tables = arrays.decode_state(plan), arrays.tables(plan.sequences)
        return Call(
            "decode_logits" if has_logits else "decode",
            decode_loop,
            (self.params, self.cache, state, tables, arrays.sampling(rows), *steps),
            {"config": self.config, "max_steps": max_steps, "has_logits": has_logits},
        )

    def _timed(self, call: Call) -> tuple[Any, float]:
        """Returns the finished result of a call, and its seconds without compilation."""
        self.programs.compile([call])
        begin = time.perf_counter()
        return self.programs.run(call), time.perf_counter() - begin


def _pages_held(sequence: EngineSequence) -> tuple[int, int]:
    """Returns how many pages of the retrieval and of the streaming pool a sequence uses."""
    tables = sequence.retrieval_table, sequence.streaming_table
    retrieval, streaming = (int((table >= 0).sum()) for table in tables)
    return retrieval, streaming


def _has_logits(sequences: Sequence[EngineSequence]) -> bool:
    """Returns whether one of the requests wants logits."""
    return any(sequence.request.has_logits for sequence in sequences)


def _on_host(generated: Generated) -> list[np.ndarray]:
    """Returns the arrays of a call's result that there are; the logits, if any, come last."""
    return [np.asarray(x) for x in generated if x is not None]


def _taken(arrays: Sequence[np.ndarray], row: int, sequence: EngineSequence) -> Taken:
    """Returns the tokens of a row of a call's result, with what the request wants to know of them."""
    params = params_of(sequence)
    num_top = params.top_logprobs if params.logprobs else 0
    return Taken.of(arrays, row, num_top, has_logits=sequence.request.has_logits)
