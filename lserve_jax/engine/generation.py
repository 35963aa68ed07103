"""The host side of one request (`Generation`), and the loop in which requests share the engine (`Session`)."""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from time import perf_counter

import numpy as np

from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.pages import retrieval_pages
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.memory import dense_bf16_bytes, page_bytes
from lserve_jax.engine.outputs import RequestMetrics, RequestOutput, ScoreOutput, TextChunk, TopLogprobs
from lserve_jax.engine.progress import Progress, PromptScores, Taken, not_finite
from lserve_jax.engine.reads import PageReads
from lserve_jax.engine.request import Request
from lserve_jax.engine.request import Sequence as EngineSequence
from lserve_jax.text.stream import TextStream
from lserve_jax.text.tokenizer import Tokenizer

_BUSY = (
    "this model is at work in another thread: an LLM serves one thread at a time; "
    "pass several prompts to one call, or finish what is open first"
)


class Session:
    """The loop over an engine: every device call advances all open requests.

    While requests are open, only the thread that opened them may open more. Another thread gets one clear error, and
    the first does not notice. A stream may be read by any thread; if two read at once, one waits for the other.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._generations: dict[int, Generation] = {}
        self._ended: list[int] = []
        self._owner: int | None = None  # the thread whose requests are open
        self._holder: int | None = None  # the thread that holds the lock
        self._lock = threading.Lock()

    @property
    def is_idle(self) -> bool:
        """Returns whether no request is open."""
        return not self._generations and self.engine.scheduler.is_idle

    def run(self, generations: Sequence["Generation"]) -> Iterator[list[Progress]]:
        """Yields the results of each device call until these requests end, those of other runs' requests included.

        If closed, or if it fails, it ends the rest of its requests.

        Raises:
          Exception: if the host work of one of these requests raised it; requests of other runs go on.
          RuntimeError: if another thread has requests open, or a call for several requests failed in another run.
        """
        sequences: list[EngineSequence] = []
        try:
            sequences += [self.open(generation) for generation in generations]
            is_done = not generations
            while not is_done:
                if any(sequence.finish_reason == "abort" for sequence in sequences):
                    raise RuntimeError("a call for several requests failed, and this one was ended with the others")
                # Another run may have advanced these requests to their end.
                brought = self.step() if any(one.finish_reason is None for one in generations) else []
                for generation in generations:
                    if generation.error is not None:
                        raise generation.error
                is_done = all(generation.finish_reason is not None for generation in generations)
                yield brought
        finally:
            self.end(generations)

    def open(self, generation: "Generation") -> EngineSequence:
        """Returns the waiting sequence of a request, which the next calls of `step` advance until `end` names it.

        Raises:
          InputError: if it can never run.
          RuntimeError: if another thread has requests open.
        """
        with self.entered() as engine:
            sequence = engine.add(generation.request)
            self._generations[generation.request.id] = generation
        return sequence

    def end(self, generations: Iterable["Generation"]) -> None:
        """Ends requests, finished or not, before the next device call; callable from any thread."""
        self._ended += [generation.request.id for generation in generations]
        self._remove_if_free()

    @contextmanager
    def entered(self) -> Iterator[Engine]:
        """Yields the engine to the one thread that may open requests, or that needs the model for itself.

        Raises:
          RuntimeError: if another thread is inside, or has requests open.
        """
        with self._held(may_wait=False):
            if self._owner not in (None, threading.get_ident()):
                raise RuntimeError(_BUSY)
            self._owner = threading.get_ident()
            yield self.engine

    def step(self) -> list[Progress]:
        """Returns the results of one device call, after each request has recorded its result.

        Raises:
          Exception: if the call failed; every open request has then been ended in the engine, and none is finished.
        """

        def accept(sequence: EngineSequence, taken: Taken) -> tuple[int, str | None]:
            return self._generations[sequence.request.id].accept(taken)

        with self._held(may_wait=True):
            brought = self.engine.step(accept)
            for one in brought:
                self._generations[one.sequence.request.id].note(one, self.engine.programs.compile_seconds)
        return brought

    @contextmanager
    def _held(self, *, may_wait: bool) -> Iterator[None]:
        """Holds the lock; the same thread gets an error and not a deadlock, should a callback enter again."""
        # Who holds the lock and is not named removes what has ended, which takes no time.
        may_wait = may_wait or self._holder is None
        if self._holder == threading.get_ident() or not self._lock.acquire(blocking=may_wait):
            raise RuntimeError(_BUSY)
        try:
            self._holder = threading.get_ident()
            yield
        finally:
            self._remove_ended()
            self._holder = None
            self._lock.release()
            self._remove_if_free()

    def _remove_if_free(self) -> None:
        """Removes requests whose run has ended, or leaves that to the thread that holds the lock."""
        while self._ended and self._lock.acquire(blocking=False):
            try:
                self._remove_ended()
            finally:
                self._lock.release()

    def _remove_ended(self) -> None:
        for request_id in list(self._ended):
            self.engine.scheduler.abort(request_id)
            self._generations.pop(request_id, None)
            self._ended.remove(request_id)
        if not self._generations:
            self._owner = None


class Generation:
    """The host side of one request: its text, its log-probabilities, its times.

    Attributes:
      request: the request.
      finish_reason: why it finished; None while it runs.
      error: the error of its logits or of its host work (text, stop strings); it then finished with "error".
      token_ids: tokens so far.
      cached_tokens: tokens of the prompt that an earlier request had left in the cache.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None, compile_seconds: float = 0.0) -> None:
        """Begins a request.

        Args:
          request: the request.
          tokenizer: converts tokens to text; None if no text is wanted.
          compile_seconds: all seconds spent compiling before.
        """
        assert isinstance(request.sampling, SamplingParams)
        self.request = request
        self.params = request.sampling
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.token_ids: list[int] = []
        self._compiled_before = compile_seconds
        self._stream = (
            None
            if tokenizer is None
            else TextStream(tokenizer, stop=self.params.stop, skip_special_tokens=self.params.skip_special_tokens)
        )
        self._new_text: list[str] = []
        self._num_streamed = 0
        self._stop_token_ids = frozenset(self.params.stop_token_ids)
        self._taken: list[Taken] = []
        self._prompt_scores: list[PromptScores] = []
        self._recalls: list[np.ndarray] = []
        self._first_token_at: float | None = None
        self._prefill_s = self._decode_s = 0.0
        self._pages_held = (0, 0)
        self.cached_tokens = 0

    def accept(self, taken: Taken) -> tuple[int, str | None]:
        """Returns how many of the new tokens count, and why the request is finished, or None.

        Logits that are not finite, or an error in this request's text, end only this request.
        """
        for kept, (token, logprob) in enumerate(zip(taken.tokens, taken.logprobs, strict=True), start=1):
            self.token_ids.append(token)
            if self._is_end(token, logprob):
                return kept, self.finish_reason
        return len(taken.tokens), None

    def _is_end(self, token: int, logprob: float) -> bool:
        """Returns whether one token finishes the request, after adding it to the text; a stop token is not shown."""
        is_stop = token in self._stop_token_ids
        if not math.isfinite(logprob):
            self.error = not_finite(len(self.request.prompt), len(self.token_ids) - 1)
        elif self._stream is not None:
            stream = self._stream
            self._add_text(lambda: stream.push(token, is_shown=not is_stop))
        if self.error is not None:
            self.finish_reason = "error"
        elif is_stop or (self._stream is not None and self._stream.stopped):
            self.finish_reason = "stop"
        return self.finish_reason is not None

    def _add_text(self, make: Callable[[], str]) -> None:
        """Adds the text that ``make`` returns, or keeps its error, which must not end other requests."""
        try:
            self._new_text.append(make())
        except Exception as error:  # noqa: BLE001 - whatever it is
            self.error = error

    def note(self, progress: Progress, compile_seconds: float) -> None:
        """Records log-probabilities and times of a call, and the pages of the sequence when it finished.

        ``compile_seconds`` are all seconds spent compiling so far.
        """
        sequence = progress.sequence
        self._taken.append(progress.taken)
        if progress.scores is not None:
            self._prompt_scores.append(progress.scores)
            if not all(map(math.isfinite, progress.scores.logprobs)):
                self.error = not_finite(len(self.request.prompt))
        if progress.recall is not None:
            self._recalls.append(progress.recall)
        if progress.is_prefill:
            self.cached_tokens = sequence.prefix.num_hit
            self._prefill_s += progress.seconds
        else:
            self._decode_s += progress.seconds
        if progress.taken.tokens and self._first_token_at is None:
            self._first_token_at = perf_counter() - (compile_seconds - self._compiled_before)
        if sequence.finish_reason is not None:
            self.finish_reason = sequence.finish_reason
            self._pages_held = progress.pages_held
            if self._stream is not None and not self._stream.stopped and self.error is None:
                self._add_text(self._stream.finish)

    def take_chunk(self) -> TextChunk:
        """Returns the text and tokens since the last call."""
        # Another thread may append meanwhile: what is taken is what was counted first.
        parts = self._taken[self._num_streamed :]
        self._num_streamed += len(parts)
        new = self._new_text[:]
        del self._new_text[: len(new)]
        taken = Taken.joined(parts)
        return TextChunk.of("".join(new), tuple(taken.tokens), tuple(taken.logprobs), tuple(taken.top_logprobs))

    def output(self, costs: "Costs") -> RequestOutput:
        """Returns the output of the finished request."""
        assert self.finish_reason is not None
        params, taken = self.params, Taken.joined(self._taken)
        of_prompt, top_of_prompt = self._prompt_logprobs()
        has_top = params.top_logprobs > 0
        return RequestOutput(
            prompt_token_ids=self.request.prompt,
            token_ids=tuple(self.token_ids),
            text="" if self._stream is None else self._stream.text,
            finish_reason=self.finish_reason,
            logprobs=tuple(taken.logprobs) if params.logprobs else None,
            top_logprobs=tuple(taken.top_logprobs) if params.logprobs and has_top else None,
            prompt_logprobs=of_prompt if params.prompt_logprobs else None,
            prompt_top_logprobs=top_of_prompt if params.prompt_logprobs and has_top else None,
            metrics=self._metrics(costs),
        )

    def _prompt_logprobs(self) -> tuple[tuple[float | None, ...], tuple[TopLogprobs | None, ...]]:
        """Returns, for each token of the prompt, its log-probability and the likeliest tokens; None for the first."""
        logprobs = [logprob for scores in self._prompt_scores for logprob in scores.logprobs]
        top = [found for scores in self._prompt_scores for found in scores.top_logprobs]
        return (None, *logprobs), (None, *top)

    def score(self, costs: "Costs") -> ScoreOutput:
        """Returns the scores of the finished request, whose continuation was forced."""
        taken = Taken.joined(self._taken)
        return ScoreOutput(
            token_ids=tuple(self.token_ids),
            logprobs=tuple(taken.logprobs),
            greedy_token_ids=tuple(taken.choices),
            metrics=self._metrics(costs),
            logits=np.stack(taken.logits) if taken.logits else None,
        )

    def _metrics(self, costs: "Costs") -> RequestMetrics:
        assert self._first_token_at is not None
        prompt, decoded = len(self.request.prompt), len(self.token_ids) - 1
        by_layer = _mean_of_measured(self._recalls)
        # A request that stops within a call leaves pages empty that the call had reserved: they do not count.
        filled = retrieval_pages(prompt + decoded, costs.config.attention.page_size)
        retrieval, streaming = (
            min(count, filled) * size for count, size in zip(self._pages_held, costs.page_bytes, strict=True)
        )
        return RequestMetrics(
            ttft_s=self._first_token_at - self.request.arrival,
            prefill_s=self._prefill_s,
            decode_s=self._decode_s,
            decoded_tokens=decoded,
            cached_tokens=self.cached_tokens,
            pages_read_ratio=costs.page_reads.ratio(prompt, decoded),
            attention_recall=None if np.isnan(by_layer).all() else float(np.nanmean(by_layer)),
            attention_recall_by_layer=tuple(by_layer.tolist()) or None,
            retrieval_bytes=retrieval,
            streaming_bytes=streaming,
            dense_bf16_bytes=dense_bf16_bytes(costs.config, prompt + decoded),
        )


class Costs:
    """The bytes of a model's pages, and how many of them decoding reads, for the statistics of requests."""

    def __init__(self, config: InferenceConfig) -> None:
        self.config = config
        self.page_bytes = page_bytes(config)

    @cached_property
    def page_reads(self) -> PageReads:
        """Returns the page reads per decoded token."""
        return PageReads(
            attention=self.config.attention,
            heads=tuple(
                (kind.num_retrieval, kind.num_streaming, kind.decode.num_selected is not None)
                for kind in self.config.kinds
            ),
        )


def _mean_of_measured(rows: list[np.ndarray]) -> np.ndarray:
    """Returns the elementwise mean of rows [n] without NaN; NaN where all rows have NaN, empty if there are no rows."""
    if not rows:
        return np.empty(0)
    table = np.stack(rows)
    count = (~np.isnan(table)).sum(axis=0)
    return np.where(count > 0, np.nansum(table, axis=0) / np.maximum(count, 1), np.nan)
