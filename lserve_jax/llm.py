"""`LLM`: a loaded model that generates text."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from lserve_jax.engine.engine import Engine, Progress
from lserve_jax.engine.memory import dense_bf16_bytes, page_bytes
from lserve_jax.engine.outputs import RequestMetrics, RequestOutput, ScoreOutput, TextChunk
from lserve_jax.engine.reads import PageReads
from lserve_jax.engine.request import Request
from lserve_jax.engine.request import Sequence as EngineSequence
from lserve_jax.engine.setup import DEFAULT_MODEL, Setup, default_sampling_params, prepare
from lserve_jax.runtime.sampling import SamplingParams
from lserve_jax.text.stream import TextStream
from lserve_jax.text.tokenizer import Tokenizer, open_tokenizer

type Prompt = str | Sequence[int]
type Message = Mapping[str, Any]
type OnProgress = Callable[[str, int, int], None]
"""Stage, done, total: ("weights", bytes, bytes), ("prefill", tokens, tokens), ("compile <program>", 0, 1)."""


class LLM:
    """A model, its KV cache and its compiled steps.

    Sequences are batched continuously; results depend on neither batch-mates nor their order. Several streams may be
    open at once and share the batch. Not thread-safe.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        tokenizer: str | None = None,
        on_progress: OnProgress | None = None,
        **settings: Any,
    ) -> None:
        """Opens and loads a model.

        Args:
          model: folder, GGUF file, converted checkpoint, hub id, or the name of the embedded model.
          tokenizer: folder or GGUF file to take the tokenizer from instead.
          on_progress: called as the work goes on, see `OnProgress`.
          **settings: see `lserve_jax.engine.setup.prepare`: ``attention`` (preset), ``kv_dtype``, ``max_model_len``,
            ``max_num_seqs``, ``head_pattern``, ``token_budget``, … .

        Raises:
          ValueError: for a model or setting that cannot be, in one line; before any weight is loaded, where possible.
        """
        self._start(prepare(model, **settings), tokenizer, on_progress, None)

    @classmethod
    def from_setup(
        cls,
        setup: Setup,
        *,
        tokenizer: str | Tokenizer | None = None,
        on_progress: OnProgress | None = None,
        expected_tokens: int | None = None,
    ) -> "LLM":
        """Returns the model that `lserve_jax.engine.setup.prepare` has opened, loaded.

        Args:
          setup: what was opened.
          tokenizer: as for `LLM`, or one that is open already.
          on_progress: as for `LLM`.
          expected_tokens: of the prompt that will come first: its programs are compiled while weights load.
        """
        llm = cls.__new__(cls)
        llm._start(setup, tokenizer, on_progress, expected_tokens)
        return llm

    def _start(
        self,
        setup: Setup,
        tokenizer: str | Tokenizer | None,
        on_progress: OnProgress | None,
        expected_tokens: int | None,
    ) -> None:
        setup.plan.require_fit()
        report = on_progress or (lambda stage, done, total: None)
        self.setup = setup
        self.config = setup.config
        self.tokenizer = (
            tokenizer
            if isinstance(tokenizer, Tokenizer)
            else open_tokenizer(setup.checkpoint.tokenizer_source, tokenizer)
        )
        self.engine = Engine(
            setup.checkpoint.promised_params(self.config.dtype),
            self.config,
            setup.engine_config,
            setup.plan.pools,
            on_compile=lambda program: report(f"compile {program}", 0, 1),
        )

        def on_weights(done: int, total: int) -> None:
            if done == 0 and expected_tokens is not None:
                prompt = (0,) * expected_tokens
                self.engine.expect(Request(id=-1, prompt=prompt, sampling=SamplingParams(max_tokens=2)))
            report("weights", done, total)

        self.engine.load(setup.checkpoint.load_params(self.config.dtype, self.config.heads, on_weights))
        setup.warn()
        self._report = report
        self._ids = itertools.count()
        self._works: dict[int, _Work] = {}
        self._page_bytes = page_bytes(self.config)

    @property
    def compile_seconds(self) -> float:
        """Seconds spent compiling so far."""
        return self.engine.programs.compile_seconds

    def default_sampling_params(self) -> SamplingParams:
        """Returns the checkpoint's own sampling settings (generation_config.json), greedy where it names none."""
        return default_sampling_params(self.setup.checkpoint)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Returns the continuation of every prompt, in order.

        Args:
          prompts: strings or lists of token ids; one or several.
          sampling_params: one for all, or one each; None takes `default_sampling_params`.

        Raises:
          ValueError: if a prompt is empty or too long, or the numbers of prompts and settings differ; nothing has run.
        """
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
            prompts = [prompts]  # type: ignore[list-item]
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or self.default_sampling_params()] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many sampling_params, got {len(sampling_params)}")
        works = [self._work(prompt, params) for prompt, params in zip(prompts, sampling_params, strict=True)]  # type: ignore[arg-type]
        for _ in self._run(works):
            pass
        return [work.output(self) for work in works]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Returns the model's answer to a conversation, or to each of several.

        Args:
          messages: ``[{"role": "user", "content": "…"}, …]``, or a list of such lists.
          sampling_params: None takes `default_sampling_params`.
        """
        if not isinstance(next(iter(messages), {}), Mapping):
            return self.generate([self.render_chat(one) for one in messages], sampling_params)  # type: ignore[arg-type]
        return self.generate([self.render_chat(messages)], sampling_params)[0]  # type: ignore[arg-type]

    def render_chat(self, messages: Sequence[Message]) -> list[int]:
        """Returns the token ids of a conversation in the checkpoint's own chat format, ready for the answer."""
        return self._need_tokenizer("a chat").apply_chat_template(list(messages))

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Generator[TextChunk]:
        """Yields the text of a continuation as it becomes certain. Closing the iterator ends the request."""
        for chunk, _ in self.stream_output(prompt, sampling_params):
            if chunk or chunk.token_ids:
                yield chunk

    def stream_output(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[tuple[TextChunk, RequestOutput | None]]:
        """Yields chunks as `stream` does, and at the last one the finished output."""
        work = self._work(prompt, sampling_params or self.default_sampling_params())
        for _ in self._run([work]):
            is_done = work.finish_reason is not None
            yield work.take_chunk(), (work.output(self) if is_done else None)

    def logits(self, token_ids: Prompt) -> np.ndarray:
        """Returns the logits [T, V] float32 after every token of a prompt, through the same path as generation."""
        return self._alone().prompt_logits(self._encode(token_ids))

    def prompt_logprobs(self, token_ids: Prompt) -> np.ndarray:
        """Returns the log-probabilities [T - 1] float32 of a prompt's tokens from the second on.

        Natural logarithms, each given all tokens before; through prefill: streaming heads are at work, page selection
        is not (see `score`).
        """
        return self._alone().prompt_logprobs(self._encode(token_ids))

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[Prompt]) -> list[ScoreOutput]:
        """Returns what the model thinks of given continuations of prompts, in order.

        A prompt goes through prefill and its continuation through decode steps, as if the model had generated it: page
        selection is at work as in generation.

        Raises:
          ValueError: if either is empty, they are too long together, or their numbers differ; nothing has run.
        """
        if len(prompts) != len(continuations):
            raise ValueError(f"{len(prompts)} prompts need as many continuations, got {len(continuations)}")
        works = [self._forced_work(*pair) for pair in zip(prompts, continuations, strict=True)]
        for _ in self._run(works):
            pass
        return [work.score(self) for work in works]

    def _forced_work(self, prompt: Prompt, continuation: Prompt) -> "_Work":
        ids, forced = self._encode(prompt), self._encode(continuation, is_start=False)
        limit = self.setup.engine_config.max_model_len
        if len(ids) + len(forced) > limit:
            raise ValueError(
                f"prompt and continuation have {len(ids)} + {len(forced)} tokens, but max_model_len is {limit}: "
                "shorten them or raise max_model_len"
            )
        params = SamplingParams(max_tokens=len(forced), ignore_eos=True, logprobs=True)
        request = Request(id=next(self._ids), prompt=ids, sampling=params, forced=forced, arrival=time.perf_counter())
        return _Work(request, self)

    def _alone(self) -> Engine:
        if not self.engine.scheduler.is_idle:
            raise ValueError("logits need the model alone: finish or close the streams that are open")
        return self.engine

    def _need_tokenizer(self, purpose: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"{self.setup.checkpoint.name} has no tokenizer, which {purpose} needs: pass token ids, or a tokenizer"
            )
        return self.tokenizer

    def _encode(self, prompt: Prompt, *, is_start: bool = True) -> tuple[int, ...]:
        """Returns the tokens of a prompt, each one of the model's vocabulary; ``is_start`` if nothing stands before."""
        if not len(prompt):  # before encoding: a tokenizer may put a token before even an empty text
            raise ValueError("the prompt is empty: give at least one token")
        if isinstance(prompt, str):
            ids = self._need_tokenizer("a text prompt").encode(prompt, add_special_tokens=is_start)
        else:
            ids = prompt
        vocabulary = self.config.model.vocab_size
        wrong = [token for token in ids if not (isinstance(token, int | np.integer) and 0 <= token < vocabulary)]
        if wrong:
            raise ValueError(f"prompt token {wrong[0]!r} is outside the model's vocabulary of {vocabulary} tokens")
        return tuple(int(token) for token in ids)

    def _work(self, prompt: Prompt, params: SamplingParams) -> "_Work":
        """Returns a request whose prompt is encoded and whose stop tokens include the model's own."""
        ids = self._encode(prompt)
        if params.stop:
            self._need_tokenizer("a stop string")
        if not params.ignore_eos:
            own = () if self.tokenizer is None else self.tokenizer.eos_token_ids
            stops = dict.fromkeys((*params.stop_token_ids, *self.config.model.eos_token_ids, *own))
            params = dataclasses.replace(params, stop_token_ids=tuple(stops))
        return _Work(Request(id=next(self._ids), prompt=ids, sampling=params, arrival=time.perf_counter()), self)

    def _run(self, works: Sequence["_Work"]) -> Iterator[None]:
        """Runs requests to their end, yielding after each device call; aborts what is left when closed or failing.

        A call advances all requests there are, those of other runs too, so a run may find its own advanced.
        """
        try:
            sequences = []
            for work in works:
                sequences.append(self.engine.add(work.request))
                self._works[work.request.id] = work
            is_done = not works
            while not is_done:
                if any(sequence.finish_reason == "abort" for sequence in sequences):
                    raise RuntimeError("a call for several requests failed, and this one was ended with the others")
                if any(work.finish_reason is None for work in works):
                    self._step()
                is_done = all(work.finish_reason is not None for work in works)
                yield
        finally:
            for work in works:
                self.engine.scheduler.abort(work.request.id)
                self._works.pop(work.request.id, None)

    def _step(self) -> None:
        """Makes one device call and tells each request what it brought."""

        def accept(sequence: EngineSequence, tokens: list[int]) -> tuple[int, str | None]:
            return self._works[sequence.request.id].accept(tokens)

        for one in self.engine.step(accept):
            self._works[one.sequence.request.id].note(one, self.compile_seconds)
            if one.is_prefill:
                self._report("prefill", one.sequence.num_cached, one.sequence.prompt_length)

    @cached_property
    def _page_reads(self) -> PageReads:
        attention, config = self.config.attention, self.config
        kv_heads = config.model.num_kv_heads
        counts = enumerate(config.num_retrieval)
        return PageReads(
            page_size=attention.page_size,
            sink=attention.sink,
            local=attention.local,
            selector_interval=attention.selector_interval,
            heads=tuple((count, kv_heads - count, config.num_selected(layer)) for layer, count in counts),
        )


class _Work:
    """One request on its way: its text, its log-probabilities, its times."""

    def __init__(self, request: Request, llm: LLM) -> None:
        assert isinstance(request.sampling, SamplingParams)
        self.request = request
        self.params = request.sampling
        self.finish_reason: str | None = None
        self.token_ids: list[int] = []
        self._compiled_before = llm.compile_seconds
        tokenizer = None if request.forced else llm.tokenizer
        self._stream = None if tokenizer is None else TextStream(tokenizer, stop=self.params.stop)
        self._new_text: list[str] = []
        self._num_streamed = 0
        self._logprobs: list[float] = []
        self._choices: list[int] = []
        self._recalls: list[np.ndarray] = []
        self._first_token_at: float | None = None
        self._prefill_s = self._decode_s = 0.0
        self._pages = (0, 0)

    def accept(self, tokens: list[int]) -> tuple[int, str | None]:
        """Returns how many of the new tokens count, and why the request is finished, if it is."""
        for kept, token in enumerate(tokens, start=1):
            self.token_ids.append(token)
            if token in self.params.stop_token_ids:
                self.finish_reason = "stop"
                return kept, "stop"
            if self._stream is not None:
                self._new_text.append(self._stream.push(token))
                if self._stream.stopped:
                    self.finish_reason = "stop"
                    return kept, "stop"
        return len(tokens), None

    def note(self, progress: Progress, compile_seconds: float) -> None:
        """Takes in log-probabilities and times of a call, and what the sequence held when it finished.

        ``compile_seconds`` are all that were spent compiling so far.
        """
        sequence = progress.sequence
        self._logprobs += progress.logprobs
        self._choices += progress.choices
        if progress.recall is not None:
            self._recalls.append(progress.recall)
        if progress.is_prefill:
            self._prefill_s += progress.seconds
        else:
            self._decode_s += progress.seconds
        if progress.tokens and self._first_token_at is None:
            self._first_token_at = time.perf_counter() - (compile_seconds - self._compiled_before)
        if sequence.finish_reason is not None:
            self.finish_reason = sequence.finish_reason
            self._pages = progress.pages_held
            if self._stream is not None and not self._stream.stopped:
                self._new_text.append(self._stream.finish())

    def take_chunk(self) -> TextChunk:
        """Returns the text and tokens since the last call."""
        chunk = TextChunk.of("".join(self._new_text), tuple(self.token_ids[self._num_streamed :]))
        self._new_text, self._num_streamed = [], len(self.token_ids)
        return chunk

    def output(self, llm: LLM) -> RequestOutput:
        """Returns the finished request."""
        assert self.finish_reason is not None
        return RequestOutput(
            prompt_token_ids=self.request.prompt,
            token_ids=tuple(self.token_ids),
            text="" if self._stream is None else self._stream.text,
            finish_reason=self.finish_reason,
            logprobs=tuple(self._logprobs) if self.params.logprobs else None,
            metrics=self._metrics(llm),
        )

    def score(self, llm: LLM) -> ScoreOutput:
        """Returns the finished request, whose continuation was forced."""
        return ScoreOutput(
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self._logprobs),
            greedy_token_ids=tuple(self._choices),
            metrics=self._metrics(llm),
        )

    def _metrics(self, llm: LLM) -> RequestMetrics:
        assert self._first_token_at is not None
        prompt = len(self.request.prompt)
        decoded = len(self.token_ids) - 1
        by_layer = _mean_of_measured(self._recalls)
        retrieval, streaming = (count * size for count, size in zip(self._pages, llm._page_bytes, strict=True))
        return RequestMetrics(
            ttft_s=self._first_token_at - self.request.arrival,
            prefill_s=self._prefill_s,
            decode_s=self._decode_s,
            decoded_tokens=decoded,
            pages_read_ratio=llm._page_reads.ratio(prompt, decoded),
            attention_recall=None if np.isnan(by_layer).all() else float(np.nanmean(by_layer)),
            attention_recall_by_layer=tuple(by_layer.tolist()) or None,
            retrieval_bytes=retrieval,
            streaming_bytes=streaming,
            dense_bf16_bytes=dense_bf16_bytes(llm.config, prompt + decoded),
        )


def _mean_of_measured(rows: list[np.ndarray]) -> np.ndarray:
    """Returns the mean of rows [n], element by element and without NaN; NaN where nothing is left, empty of no rows."""
    if not rows:
        return np.empty(0)
    table = np.stack(rows)
    count = (~np.isnan(table)).sum(axis=0)
    return np.where(count > 0, np.nansum(table, axis=0) / np.maximum(count, 1), np.nan)
