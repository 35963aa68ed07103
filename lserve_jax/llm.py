"""`LLM`: a loaded model that generates text."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from lserve_jax.config.errors import InputError
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.engine.context_file import ContextFormat, SavedContext
from lserve_jax.engine.contexts import context_format, is_cached, read_context, require_prefix_cache, restore_context
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.generation import Costs, Generation, Session
from lserve_jax.engine.inputs import (
    each_conversation,
    each_params,
    each_prompt,
    naming_the_prompt,
    require_ids,
    with_bad_words_spelled,
)
from lserve_jax.engine.outputs import RequestOutput, ScoreOutput, TextChunk
from lserve_jax.engine.request import Request, require_room
from lserve_jax.engine.setup import DEFAULT_MODEL, Setup, default_sampling_params, logger, prepare
from lserve_jax.runtime.key_offsets import key_offset_warning
from lserve_jax.text.chat import ChatOptions, Message
from lserve_jax.text.tokenizer import Tokenizer, open_tokenizer
from pallas_kernels import Choice

type Prompt = str | Sequence[int]
type OnProgress = Callable[[str, int, int], None]
"""Stage, done, total: ("weights", bytes, bytes), ("prefill", tokens, tokens), ("compile <program>", 0, 1)."""

_ATTENDING = ("prefill", "decode")
"""What the names of programs with attention begin with."""


class LLM:
    """A model, its KV cache and its compiled steps.

    Sequences are batched continuously; results depend neither on the other sequences of a batch nor on their order.
    Several streams may be open at once and share the batch. While requests are open, another thread that begins one
    gets a `RuntimeError`; any thread may read a stream.
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
          tokenizer: folder or GGUF file with the tokenizer; None takes that of the model.
          on_progress: called as the work proceeds, see `OnProgress`.
          **settings: see `lserve_jax.engine.setup.prepare`: ``attention`` (preset), ``kv_dtype``, ``max_model_len``,
            ``max_num_seqs``, ``head_pattern``, ``token_budget``, … .

        Raises:
          InputError: if a model or setting is invalid, in one line; if possible, before any weight is loaded.
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
        """Returns the loaded model of a setup.

        Args:
          setup: the result of `lserve_jax.engine.setup.prepare`.
          tokenizer: as for `LLM`, or an open tokenizer.
          on_progress: as for `LLM`.
          expected_tokens: tokens of the first prompt, whose programs are compiled while weights load.
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
            setup.params,
            self.config,
            setup.sizes,
            setup.plan.pools,
            turns=setup.turns,
            has_prefix_cache=setup.plan.has_prefix_cache,
            has_recall=setup.has_recall,
            on_compile=lambda program: report(f"compile {program}", 0, 1),
        )

        def on_weights(done: int, total: int) -> None:
            if done == 0 and expected_tokens is not None:
                prompt = (0,) * expected_tokens
                self.engine.expect(Request(id=-1, prompt=prompt, sampling=SamplingParams(max_tokens=2)))
            report("weights", done, total)

        self.engine.load(setup.load_params(on_weights))
        setup.warn()
        if (warning := key_offset_warning(self.engine.params, self.config)) is not None:
            logger.warning(warning)
        self._report = report
        self.session = Session(self.engine)
        self._ids = itertools.count()
        self._costs = Costs(self.config)

    @property
    def compile_seconds(self) -> float:
        """Returns the seconds spent compiling so far."""
        return self.engine.programs.compile_seconds

    @property
    def implementations(self) -> tuple[Choice, ...]:
        """Returns the implementation that each op took in the programs that have run, and why others refused.

        Empty if nothing has run.
        """
        ran = {name: found for name, found in self.engine.programs.choices.items() if name.startswith(_ATTENDING)}
        if not all(ran.values()):  # JAX had the trace before this process recorded one
            return self.setup.implementations
        return tuple(dict.fromkeys(choice for found in ran.values() for choice in found))

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Returns the tokens at which the model ends a text or a turn: the tokenizer's, then the checkpoint's."""
        own = () if self.tokenizer is None else self.tokenizer.eos_token_ids
        return tuple(dict.fromkeys((*own, *self.config.model.eos_token_ids)))

    def default_sampling_params(self) -> SamplingParams:
        """Returns the sampling settings in the checkpoint's ``generation_config.json``, greedy if it names none."""
        return default_sampling_params(self.setup.checkpoint)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Returns the continuation of every prompt, in order.

        Args:
          prompts: texts, or lists or arrays of token ids; one or several.
          sampling_params: one for all, or one per prompt; None takes `default_sampling_params`.

        Raises:
          InputError: if a prompt is empty or too long, the numbers of prompts and settings differ, or a setting names a
            token that the model does not have: nothing has run then. Also if the model's logits are not finite.
        """
        each = each_prompt(prompts)
        each_setting = each_params(sampling_params or self.default_sampling_params(), len(each))
        generations = []
        for number, (prompt, params) in enumerate(zip(each, each_setting, strict=True), start=1):
            with naming_the_prompt(number, len(each)):
                generations.append(self.request(prompt, params))
        for _ in self._run(generations):
            pass
        return [self.output(one) for one in generations]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | None = None,
        **options: Unpack[ChatOptions],
    ) -> RequestOutput | list[RequestOutput]:
        """Returns the model's answer to a conversation, or to each of several.

        Args:
          messages: ``[{"role": "user", "content": "…"}, …]``, or a list of such lists.
          sampling_params: None takes `default_sampling_params`.
          **options: see `lserve_jax.text.chat.ChatOptions`: ``tools``, ``template_kwargs``, ``chat_template``,
            ``continue_final_message``, ``literal_roles``. The text of a continued message is not part of the output.
        """
        conversations, is_one = each_conversation(messages)
        found = self.generate([self.render_chat(one, **options) for one in conversations], sampling_params)
        return found[0] if is_one else found

    def render_chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> list[int]:
        """Returns the token ids of a conversation in the checkpoint's chat format, up to the start of the answer."""
        return self._need_tokenizer("a chat").apply_chat_template(messages, **options)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Generator[TextChunk]:
        """Yields the text of a continuation as it becomes certain. Closing the iterator ends the request."""
        for chunk, _ in self.stream_output(prompt, sampling_params):
            if chunk or chunk.token_ids:
                yield chunk

    def stream_output(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[tuple[TextChunk, RequestOutput | None]]:
        """Yields chunks as `stream` does, and with the last one the finished output."""
        generation = self.request(prompt, sampling_params)
        for _ in self._run([generation]):
            is_done = generation.finish_reason is not None
            yield generation.take_chunk(), (self.output(generation) if is_done else None)

    def request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        salt: bytes = b"",
        is_context: bool = False,
    ) -> Generation:
        """Returns a request for this model's `session`, which a server opens, advances and ends by itself.

        Callable from any thread, also while requests run.

        Args:
          prompt: text, or token ids.
          sampling_params: None takes `default_sampling_params`.
          priority: requests with a lower number are admitted first.
          salt: only requests with the same salt share cached prefixes.
          is_context: whether the prompt is read for longer ones that will begin with it.

        Raises:
          InputError: as for `generate`.
        """
        (params,) = each_params(sampling_params or self.default_sampling_params(), 1)
        request = Request(
            id=next(self._ids),
            prompt=self._encode(prompt),
            sampling=self._resolved(params),
            arrival=time.perf_counter(),
            priority=priority,
            salt=salt,
            is_cacheable=not params.prompt_logprobs,  # every token of its prompt must be computed
            is_context=is_context,
        )
        require_room(len(request.prompt), self.setup.sizes.max_model_len)
        return Generation(request, self.tokenizer, self.compile_seconds)

    def output(self, generation: Generation) -> RequestOutput:
        """Returns the output of a finished request."""
        return generation.output(self._costs)

    def logits(self, token_ids: Prompt) -> np.ndarray:
        """Returns the logits [T, V] float32 after every token of a prompt, through the same path as generation.

        That path is prefill: a token reads the keys and values of its own call (``prefill_chunk`` tokens) as they were
        computed, and only those of earlier calls from the KV cache. So a prompt that fits into one call does not show
        ``kv_dtype``, and none shows the selection of pages; `score` shows both.
        """
        with self._alone() as engine:
            return engine.prompt_logits(self._encode(token_ids))

    def prompt_logprobs(self, token_ids: Prompt) -> np.ndarray:
        """Returns the log-probabilities [T - 1] float32 of a prompt's tokens from the second on.

        These are natural logarithms, each given all tokens before it. They come from prefill, in which streaming heads
        are active and page selection is not, and in which ``kv_dtype`` acts as in `logits`; see `score` for both.
        ``SamplingParams(prompt_logprobs=True)`` gives them beside a continuation.

        Raises:
          InputError: if the model's logits are not finite.
        """
        with self._alone() as engine:
            return engine.prompt_logprobs(self._encode(token_ids))

    def prefill_density(self, token_ids: Prompt) -> float | None:
        """Returns the share of a prompt's history that is read where ``prefill_sparsity`` leaves something out, 0 … 1.

        It counts pairs of a tile of 128 queries and a block of the history, of the retrieval heads of the layers that
        may leave something out, and reads the prompt once more. None if no layer may.
        """
        with self._alone() as engine:
            return engine.prompt_density(self._encode(token_ids))

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[Prompt], *, has_logits: bool = False
    ) -> list[ScoreOutput]:
        """Returns the model's scores of given continuations of prompts, in order; one or several, as for `generate`.

        A prompt goes through prefill and its continuation through decode steps, as if the model had generated it, so
        page selection is active as in generation.

        Args:
          prompts: texts, or lists or arrays of token ids.
          continuations: the same, one per prompt.
          has_logits: whether the outputs have the logits too, which take 4 bytes for each token of a continuation and
            each token of the vocabulary. Their program is compiled when they are first asked for.

        Raises:
          InputError: if either is empty, they are too long together, or their numbers differ; nothing has run.
        """
        each, following = each_prompt(prompts), each_prompt(continuations)
        if len(each) != len(following):
            raise InputError(f"{len(each)} prompts need as many continuations, got {len(following)}")
        generations = [self._forced(*pair, has_logits=has_logits) for pair in zip(each, following, strict=True)]
        for _ in self._run(generations):
            pass
        # One after the other, so that no more than one prompt's logits are there twice.
        return [generations.pop(0).score(self._costs) for _ in each]

    def save_context(self, prompt: Prompt, path: str | Path) -> tuple[int, ...]:
        """Returns the tokens of a prompt, after it has read the prompt and saved it for `load_context`.

        The file has all tokens, and the cache's pages of the whole chunks (``prefill_chunk`` tokens each) at the start:
        the rest, less than a chunk, is read anew each time. It appears whole or not at all.

        Args:
          prompt: text, or token ids; at least one chunk.
          path: the file, by convention ``*.safetensors``; replaced if it is there.

        Raises:
          InputError: if the prompt is too short or too long, the prefix cache is off or too small, or the file cannot
            be written.
        """
        ids = self._encode(prompt)
        first = self.context_prompt(ids)
        if not self.has_context(ids):
            for _ in self._run([self.request(first, SamplingParams(max_tokens=1), is_context=True)]):
                pass
        self.contexts.write(Path(path), self.read_context(ids))
        return ids

    def context_prompt(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the part of a prompt that must be read before `read_context`: its whole chunks.

        Raises:
          InputError: if the prompt is too short or too long for a context, or there is no prefix cache.
        """
        require_prefix_cache(self.engine)
        self.contexts.require_savable(len(ids))
        require_room(len(ids), self.setup.sizes.max_model_len)
        return ids[: self.contexts.boundary(len(ids))]

    def has_context(self, ids: tuple[int, ...]) -> bool:
        """Returns whether the prefix cache has the whole context of a prompt."""
        return is_cached(self.engine, self.contexts, ids)

    def read_context(self, ids: tuple[int, ...]) -> SavedContext:
        """Returns the context of a prompt that has just been read, for ``contexts.write``.

        Raises:
          InputError: if its pages are not in the prefix cache.
        """
        with self.session.entered() as engine:
            return read_context(engine, self.contexts, ids)

    def load_context(self, path: str | Path | SavedContext, *, salt: bytes = b"") -> tuple[int, ...]:
        """Returns the tokens of a saved context, after it has put its pages into the prefix cache.

        Prompts that begin with these tokens and have the same salt then start where the context ends, with the same
        logits as if the model had read it. The pages stay until other prompts need the room.

        Args:
          path: the file; or a context that `contexts` has read before.
          salt: as for `request`.

        Raises:
          InputError: if the file was saved by another model or with other settings, is damaged, or is larger than the
            cache; in one line, and nothing has changed.
        """
        context = path if isinstance(path, SavedContext) else self.contexts.read(Path(path))
        with self.session.entered() as engine:
            restore_context(engine, self.contexts, context, salt=salt)
        return context.tokens

    @cached_property
    def contexts(self) -> ContextFormat:
        """Returns the format of saved contexts, which belong to a model and its settings."""
        return context_format(self.setup, self.tokenizer)

    def _forced(self, prompt: Prompt, continuation: Prompt, *, has_logits: bool) -> Generation:
        ids, forced = self._encode(prompt), self._encode(continuation, is_start=False)
        limit = self.setup.sizes.max_model_len
        if len(ids) + len(forced) > limit:
            raise InputError(
                f"prompt and continuation have {len(ids)} + {len(forced)} tokens, but max_model_len is {limit}: "
                "shorten them or raise max_model_len"
            )
        params = SamplingParams(max_tokens=len(forced), ignore_eos=True, logprobs=True)
        request = Request(
            id=next(self._ids),
            prompt=ids,
            sampling=params,
            forced=forced,
            arrival=time.perf_counter(),
            has_logits=has_logits,
        )
        return Generation(request, None, self.compile_seconds)

    @contextmanager
    def _alone(self) -> Iterator[Engine]:
        with self.session.entered() as engine:
            if not engine.scheduler.is_idle:
                raise InputError("logits need the model alone: finish or close the streams that are open")
            yield engine

    def _need_tokenizer(self, purpose: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                f"{self.setup.checkpoint.name} has no tokenizer, which {purpose} needs: pass token ids, or a tokenizer"
            )
        return self.tokenizer

    def _encode(self, prompt: Prompt, *, is_start: bool = True) -> tuple[int, ...]:
        """Returns the tokens of a prompt, all in the model's vocabulary; ``is_start`` if no text precedes it."""
        ids: Any = prompt
        if isinstance(prompt, str):  # a tokenizer may add a token even to an empty text
            ids = self._need_tokenizer("a text prompt").encode(prompt, add_special_tokens=is_start) if prompt else ()
        return require_ids(ids, self.config.model.vocab_size)

    def _resolved(self, params: SamplingParams) -> SamplingParams:
        """Returns settings in token ids: the stop tokens include the model's end tokens, bad words are lists of ids."""
        vocabulary = self.config.model.vocab_size
        params.require_vocabulary(vocabulary)
        if params.stop:
            self._need_tokenizer("a stop string")
        if any(isinstance(word, str) for word in params.bad_words):
            self._need_tokenizer("a bad word")
        params = with_bad_words_spelled(params, self.tokenizer, vocabulary)
        ends = () if params.ignore_eos else [token for token in self.end_token_ids if token < vocabulary]
        stops = dict.fromkeys((*params.stop_token_ids, *ends))
        return dataclasses.replace(params, stop_token_ids=tuple(stops))

    def _run(self, generations: Sequence[Generation]) -> Iterator[None]:
        """Runs requests to their end; yields after each device call."""
        for brought in self.session.run(generations):
            for one in brought:
                if one.is_prefill:
                    self._report("prefill", one.sequence.num_cached, one.sequence.prompt_length)
            yield
