"""``/v1/completions``: prompts as texts or token ids, continued, and echoed with their log-probabilities."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.engine.generation import Generation
from lserve_jax.engine.outputs import RequestOutput, TextChunk
from lserve_jax.serve import logprobs
from lserve_jax.serve.answer import Answer
from lserve_jax.serve.errors import bad_request
from lserve_jax.serve.params import room, sampling_params
from lserve_jax.serve.protocol import CompletionRequest
from lserve_jax.serve.service import Service, Trace

type Prompt = str | list[int]


def begin_completion(service: Service, body: Mapping[str, Any], trace: Trace) -> "CompletionAnswer":
    """Returns the answer to a body, for which nothing has run yet. Takes its time: for a thread of its own.

    Raises:
      ApiError: if the request is wrong, or too long.
      ValidationError: if a field has the wrong type.
    """
    request = CompletionRequest.of(body)
    trace.id, trace.ignored = request.request_id or trace.id, request.ignored()
    service.require_model(request.model)
    service.require_time(request.timeout_s)
    prompts = each_prompt(request.prompt)
    service.require_few(request.choices * len(prompts))
    ids = [_encoded(service, prompt, request.add_special_tokens) for prompt in prompts]

    def params_of(prompt: Sequence[int]) -> SamplingParams:
        max_tokens = room(len(prompt), request.max_tokens, service.options.default_max_tokens, service.context)
        # The engine generates one token at least; with max_tokens 0 it is not shown.
        return sampling_params(request, service.default_params, 1 if request.max_tokens == 0 else max_tokens)

    return CompletionAnswer(service, request, service.generations(request, ids, params_of), trace, prompts)


def each_prompt(prompt: Any) -> list[Prompt]:
    """Returns the prompts of a request: one text, some texts, one list of token ids, or some lists.

    Raises:
      ApiError: if it is anything else, or empty.
    """
    if isinstance(prompt, str):
        return [prompt]
    wanted = "prompt must be a text, a list of token ids, or a list of either"
    if not isinstance(prompt, list):
        raise bad_request(f"{wanted}, got {shown(prompt)}", "prompt", "invalid_type")
    if not prompt:
        raise bad_request("the prompt is empty: give a text or token ids", "prompt")
    if _is_ids(prompt):
        return [prompt]
    for one in prompt:
        if not isinstance(one, str) and not (isinstance(one, list) and _is_ids(one)):
            raise bad_request(f"{wanted}, got a list with {shown(one)}", "prompt", "invalid_type")
    return prompt


def _is_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def _encoded(service: Service, prompt: Prompt, add_special_tokens: bool) -> list[int]:
    if not prompt:  # a tokenizer may add a token even to an empty text
        raise bad_request("the prompt is empty: give a text or token ids", "prompt")
    if not isinstance(prompt, str):
        return prompt
    try:
        return service.require_tokenizer().encode(prompt, add_special_tokens=add_special_tokens)
    except InputError as error:
        raise bad_request(str(error), "prompt") from None


class CompletionAnswer(Answer):
    """The continuations of prompts, see `Answer`.

    Args:
      service: the model and its names.
      request: what the client asks for.
      generations: the requests to the engine, ``n`` for each prompt.
      trace: the request's id.
      prompts: as the client gave them, to be echoed.
    """

    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    _request: CompletionRequest

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        generations: Sequence[Generation],
        trace: Trace,
        prompts: Sequence[Prompt],
    ) -> None:
        super().__init__(service, request, generations, trace)
        echoed = [self._text_of(prompt) for prompt in prompts] if request.echo else [""] * len(prompts)
        self._echoed = list(chain.from_iterable([text] * request.choices for text in echoed))
        self._offsets = [len(text) for text in self._echoed]

    def _text_of(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        tokenizer = self.service.llm.tokenizer
        return "" if tokenizer is None else tokenizer.decode(prompt, skip_special_tokens=False)

    def opening(self) -> list[dict[str, Any]]:
        """Returns the echoed prompts, if they are asked for."""
        return [self.chunk([_choice(index, text)]) for index, text in enumerate(self._echoed) if text]

    def delta(self, index: int, chunk: TextChunk) -> dict[str, Any] | None:
        """Returns the chunk for new text of a choice; None if there is nothing to tell."""
        has_logprobs = self._request.logprobs is not None and bool(chunk.token_ids)
        if self.is_echo_alone or not (chunk or has_logprobs):
            return None
        found = None
        if has_logprobs:
            found = self._logprobs(chunk.token_ids, chunk.logprobs, chunk.top_logprobs, self._offsets[index])
            self._offsets[index] += sum(map(len, found["tokens"]))
        return self.chunk([_choice(index, chunk.text, found)])

    def last_delta(self, index: int) -> dict[str, Any]:
        """Returns the choice of an empty chunk."""
        return _choice(index, "")

    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """Returns a choice of the whole response: the prompt, if it is echoed, and its continuation."""
        text = "" if self.is_echo_alone else output.text
        return _choice(index, self._echoed[index] + text, self._whole_logprobs(output))

    def _whole_logprobs(self, output: RequestOutput) -> dict[str, Any] | None:
        """Returns the log-probabilities of a choice; those of an echoed prompt stand before those of the answer."""
        if self._request.logprobs is None or output.logprobs is None:
            return None
        count = self.generated(output)
        tokens, values = output.token_ids[:count], output.logprobs[:count]
        top = (output.top_logprobs or ())[:count]
        if not self._request.echo:
            return self._logprobs(tokens, values, top)
        assert output.prompt_logprobs is not None
        top = (*(output.prompt_top_logprobs or ()), *top)
        return self._logprobs((*output.prompt_token_ids, *tokens), (*output.prompt_logprobs, *values), top)

    def _logprobs(self, tokens: Any, values: Any, top: Any, offset: int = 0) -> dict[str, Any]:
        count = self._request.logprobs or 0
        return logprobs.of_completion(self.service.token_texts, tokens, values, top, count, offset)


def _choice(index: int, text: str, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
