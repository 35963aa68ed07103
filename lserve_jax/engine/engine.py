"""One step of the engine: a plan of the scheduler, a call of a compiled program, and a record of its result."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.config.sizes import PoolSizes, Sizes
from lserve_jax.engine.batch import BatchArrays, Rows, params_of
from lserve_jax.engine.progress import Progress, PromptScores, Taken, not_finite, top_rows
from lserve_jax.engine.request import Request, Sequence
from lserve_jax.engine.scheduler import Decode, Prefill, Scheduler
from lserve_jax.models.llama import Params
from lserve_jax.runtime.adjustments import Adjustments
from lserve_jax.runtime.cache import KVCache, empty_cache
from lserve_jax.runtime.programs import Call, Programs
from lserve_jax.runtime.recall import recall_step
from lserve_jax.runtime.steps import decode_loop, prefill_step, sample_first, score_step

SHORT_CHUNK = 64
"""Chunk size of a separate program for prompts that fit into it, so that a short prompt does not cost a long chunk."""


type Accept = Callable[[Sequence, Taken], tuple[int, str | None]]
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
        self._arrays = BatchArrays(config, sizes)
        self._unadjusted: dict[int, Adjustments] = {}

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
        nobody = {size: self._arrays.adjustments([None] * size) for size in (1, self.sizes.max_num_seqs)}
        self._unadjusted = jax.device_put(nobody)

    def add(self, request: Request) -> Sequence:
        """Returns the waiting sequence of a request; raises `InputError` if it can never run."""
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
        chunks = self._prompt_chunks(prompt, lambda plan: self._run_prefill(plan, has_all_logits=True)[0])
        return np.concatenate([np.asarray(logits)[0, : plan.count] for plan, logits in chunks])

    def prompt_logprobs(self, prompt: tuple[int, ...]) -> np.ndarray:
        """Returns the log-probabilities [T - 1] float32 of a prompt's tokens from the second on, by the same path."""
        chunks = self._prompt_chunks(prompt, lambda plan: self._chunk(plan)[1], prompt_logprobs=True)
        scores = (found for _, found in chunks if found is not None)
        logprobs = np.array([logprob for found in scores for logprob in found.logprobs], np.float32)
        if not np.isfinite(logprobs).all():
            raise not_finite(len(prompt))
        return logprobs

    def _prompt_chunks[T](
        self, prompt: tuple[int, ...], run: Callable[[Prefill], T], *, prompt_logprobs: bool = False
    ) -> Iterator[tuple[Prefill, T]]:
        """Yields the chunks of a prompt that is not continued, each with the result of ``run``."""
        assert self.scheduler.is_idle, "logits are computed between generations"
        self._restore_cache()
        params = SamplingParams(max_tokens=1, prompt_logprobs=prompt_logprobs)
        sequence = self.scheduler.add(Request(id=-1, prompt=prompt, sampling=params))
        with self._ending_all_on_failure():
            while isinstance(plan := self.scheduler.schedule(), Prefill):
                yield plan, run(plan)
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
        sequence, held = plan.sequence, _pages_held(plan.sequence)
        logits, scores, seconds = self._chunk(plan)
        call = {"sequence": sequence, "is_prefill": True, "pages_held": held, "scores": scores}
        if not plan.is_last:
            self.scheduler.record_prefill(plan)
            return Progress(taken=Taken.joined([]), seconds=seconds, **call)
        generated, more = self._timed(self._sample_call(logits, sequence))
        taken = Taken.of([np.asarray(x)[None] for x in generated], 0, _num_top(sequence))
        _, reason = accept(sequence, taken)
        self.scheduler.record_prefill(plan, taken.tokens[0], reason)
        return Progress(taken=taken, seconds=seconds + more, **call)

    def _chunk(self, plan: Prefill) -> tuple[jax.Array, PromptScores | None, float]:
        """Returns a chunk's last logits [1, V], its scores if the request asks for them, and the call's seconds."""
        params = params_of(plan.sequence)
        if not params.prompt_logprobs:
            logits, seconds = self._run_prefill(plan)
            return logits, None, seconds
        (logits, scores, self.cache), seconds = self._timed(self._scored_call(plan))
        count = min(plan.count, plan.sequence.prompt_length - 1 - plan.start)
        logprobs, top_tokens, top_logprobs = (np.asarray(x)[0, :count] for x in scores)
        top = top_rows(top_tokens, top_logprobs, params.top_logprobs)
        return logits, PromptScores(logprobs=logprobs.tolist(), top_logprobs=top), seconds

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
        chunk = self._scored_call if params_of(plan.sequence).prompt_logprobs else self._prefill_call
        calls = [chunk(plan), self._sample_call(logits, plan.sequence)]
        is_decoding = plan.sequence.max_length > plan.sequence.prompt_length + 1
        return [*calls, self._decode_call(Decode((), ()))] if is_decoding else calls

    def _run_prefill(self, plan: Prefill, *, has_all_logits: bool = False) -> tuple[jax.Array, float]:
        """Returns the chunk's logits and seconds, and writes the chunk to the cache."""
        (logits, self.cache), seconds = self._timed(self._prefill_call(plan, has_all_logits=has_all_logits))
        return logits, seconds

    def _scored_call(self, plan: Prefill) -> Call:
        plain = self._prefill_call(plan)
        following = self._arrays.chunk(plan, plain.args[2].shape[1], shift=1)
        has_top = np.bool_(params_of(plan.sequence).top_logprobs > 0)
        static = {name: plain.static[name] for name in ("config", "has_history")}
        return Call(f"{plain.name}_scored", score_step, (*plain.args, following, has_top), static)

    def _prefill_call(self, plan: Prefill, *, has_all_logits: bool = False) -> Call:
        sequence, chunk = plan.sequence, self.sizes.prefill_chunk
        is_short = sequence.prompt_length <= SHORT_CHUNK <= chunk
        size = SHORT_CHUNK if is_short else chunk
        assert not (is_short and plan.start)
        tokens, tables = self._arrays.chunk(plan, size), self._arrays.tables_of(sequence)
        start, count = np.array([plan.start], np.int32), np.array([plan.count], np.int32)
        return Call(
            ("prefill_short" if is_short else f"prefill_{size}") + ("_all_logits" if has_all_logits else ""),
            prefill_step,
            (self.params, self.cache, tokens, start, count, tables),
            {"config": self.config, "has_history": not is_short, "has_all_logits": has_all_logits},
        )

    def _sample_call(self, logits: jax.Array | jax.ShapeDtypeStruct, sequence: Sequence) -> Call:
        positions = np.array([sequence.prompt_length], np.int32)
        forced = self._arrays.forced([sequence], 1)[0]
        args = (logits, positions, self._arrays.sampling([sequence]), forced, self._adjustments([sequence]))
        return Call("sample", sample_first, args, {})

    def _adjustments(self, rows: Rows) -> Adjustments:
        """Returns the changes of the logits of each row: those on the device, if no row changes anything."""
        is_adjusted = any(one is not None and params_of(one).is_adjusted for one in rows)
        found = None if is_adjusted else self._unadjusted.get(len(rows))
        return self._arrays.adjustments(rows) if found is None else found

    def _decode(self, plan: Decode, accept: Accept) -> list[Progress]:
        recall = self._recall(plan) if self._has_recall else None
        (generated, _, self.cache), seconds = self._timed(self._decode_call(plan))
        arrays, results = [np.asarray(x) for x in generated], []
        for sequence in plan.sequences:
            slot = sequence.slot
            assert slot is not None
            taken = Taken.of(arrays, slot, _num_top(sequence))
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
        state, tables = self._arrays.decode_state(plan), self._arrays.tables(plan.sequences)
        lengths = np.where(np.asarray(state.remaining) > 0, state.lengths, 0)
        args = (self.params, self.cache, state.tokens, lengths, state.decode_steps, tables)
        recall, self.cache = self.programs.run(Call("recall", recall_step, args, {"config": self.config}))
        return np.asarray(recall)

    def _decode_call(self, plan: Decode) -> Call:
        arrays, max_steps = self._arrays, self.sizes.steps_per_call
        rows = arrays.by_slot(plan.sequences)
        steps = np.int32(plan.num_steps), arrays.forced(rows, max_steps), self._adjustments(rows)
        state, tables = arrays.decode_state(plan), arrays.tables(plan.sequences)
        return Call(
            "decode",
            decode_loop,
            (self.params, self.cache, state, tables, arrays.sampling(rows), *steps),
            {"config": self.config, "max_steps": max_steps},
        )

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


def _num_top(sequence: Sequence) -> int:
    """Returns how many of the likeliest tokens a request wants at each place of its text."""
    params = params_of(sequence)
    return params.top_logprobs if params.logprobs else 0
