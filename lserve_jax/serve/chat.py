"""``/v1/chat/completions``: a conversation becomes a prompt, and its continuation a message."""

from collections.abc import Mapping
from typing import Any

from lserve_jax.config.errors import InputError
from lserve_jax.engine.outputs import RequestOutput, TextChunk
from lserve_jax.serve import logprobs
from lserve_jax.serve.answer import Answer
from lserve_jax.serve.errors import bad_request
from lserve_jax.serve.params import room, sampling_params
from lserve_jax.serve.protocol import ChatRequest, TokenizeRequest
from lserve_jax.serve.service import Service, Trace


def begin_chat(service: Service, body: Mapping[str, Any], trace: Trace) -> "ChatAnswer":
    """Returns the answer to a body, for which nothing has run yet. Takes its time: for a thread of its own.

    Raises:
      ApiError: if the request is wrong, or too long.
      ValidationError: if a field has the wrong type.
    """
    request = ChatRequest.of(body)
    trace.id, trace.ignored = request.request_id or trace.id, request.ignored()
    service.require_model(request.model)
    service.require_time(request.timeout_s)
    service.require_few(request.choices)
    prompt = render(service, request)
    wanted = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    max_tokens = room(len(prompt), wanted, service.options.default_max_tokens, service.context)
    params = sampling_params(request, service.default_params, max_tokens)
    return ChatAnswer(service, request, service.generations(request, [prompt], lambda _: params), trace)


def render(service: Service, request: ChatRequest | TokenizeRequest) -> list[int]:
    """Returns the token ids of a conversation.

    Raises:
      ApiError: if the messages or the template's variables are wrong, or the template refuses them.
    """
    service.require_tokenizer()
    try:
        return service.llm.render_chat(
            request.messages or [],
            add_generation_prompt=request.add_generation_prompt is not False,
            continue_final_message=request.continue_final_message,
            template_kwargs=request.chat_template_kwargs,
        )
    except InputError as error:
        message = str(error).replace("template_kwargs", "chat_template_kwargs")
        is_variable = message.startswith("chat_template_kwargs")
        raise bad_request(message, "chat_template_kwargs" if is_variable else "messages") from None


class ChatAnswer(Answer):
    """The answer to a conversation, see `Answer`."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    _request: ChatRequest

    def opening(self) -> list[dict[str, Any]]:
        """Returns a chunk with the role for each choice: the client sees at once that it was heard."""
        role = {"role": "assistant", "content": ""}
        return [self.chunk([_choice(index, role)]) for index in range(len(self.generations))]

    def delta(self, index: int, chunk: TextChunk) -> dict[str, Any] | None:
        """Returns the chunk for new text of a choice; None if there is nothing to tell."""
        has_logprobs = bool(self._request.logprobs and chunk.token_ids)
        if not chunk and not has_logprobs:
            return None
        found = self._logprobs(chunk.token_ids, chunk.logprobs, chunk.top_logprobs) if has_logprobs else None
        return self.chunk([_choice(index, {"content": chunk.text}, found)])

    def last_delta(self, index: int) -> dict[str, Any]:
        """Returns the choice of an empty chunk."""
        return _choice(index, {})

    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """Returns a choice of the whole response."""
        has_logprobs = output.logprobs is not None
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs(output.token_ids, output.logprobs, output.top_logprobs)
            if has_logprobs
            else None,
        }

    def _logprobs(self, tokens: Any, values: Any, top: Any) -> dict[str, Any]:
        count = self._request.top_logprobs or 0
        return logprobs.of_chat(self.service.token_texts, tokens, values, top or (), count)


def _choice(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
