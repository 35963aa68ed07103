"""What a request may say: the fields of both routes, what is refused by name, and what is ignored."""

import logging
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, FiniteFloat

from lserve_jax.config.checks import LARGEST_INT
from lserve_jax.config.errors import shown
from lserve_jax.config.sampling import MOST_TOP_LOGPROBS
from lserve_jax.serve.errors import bad_request

MOST_CHOICES = 128
"""The largest ``n``, as at OpenAI."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What a request's id may be: it stands in headers and logs."""

_HARMLESS = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_retention", "prediction"),
        *("parallel_tool_calls", "spaces_between_special_tokens", "reasoning_effort", "verbosity"),
    )
)
"""Known fields that change nothing here: bookkeeping, speed, and advice to models of another kind."""

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "allowed_token_ids": ([],),
    "truncate_prompt_tokens": (-1,),
    "include_stop_str_in_output": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "prompt_embeds": (),
    "logits_processors": ([],),
}
"""Known fields that would change the answer and are not supported, with the values (besides null) that ask nothing."""

_MOST_BIASES = 10_000
_MOST_TEXTS, _LONGEST_TEXT = 1000, 1000
"""Of stop texts and bad words, and their characters: the engine compares them at every token."""
_MOST_NAMES, _LONGEST_NAME = 1000, 100  # of unknown fields that are remembered as logged, and their characters

logger = logging.getLogger("lserve_jax")
_logged: set[str] = set()


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_few(value: Any) -> Any:
    """Returns a mapping of few entries; pydantic would note an error for each of millions."""
    if isinstance(value, dict) and len(value) > _MOST_BIASES:
        raise ValueError(f"must have at most {_MOST_BIASES} entries")
    return value


# Lists end at the first error, for the same reason.
type _Texts = Annotated[
    list[Annotated[str, Field(max_length=_LONGEST_TEXT)]],
    FailFast(),
    Field(max_length=_MOST_TEXTS),
    BeforeValidator(_as_list),
]
type _Ids = Annotated[list[int], FailFast()]
type _Biases = Annotated[dict[str, FiniteFloat], BeforeValidator(_as_few)]
type _Messages = Annotated[list[dict[str, Any]], FailFast(), Field(min_length=1)]
type _Whole = Annotated[int, Field(ge=-LARGEST_INT, le=LARGEST_INT)]
type _Count = Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)]


class StreamOptions(BaseModel):
    """What a stream contains besides text."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """The fields that both routes have. Null is the same as none given.

    Types are strict: ``true`` is no number. Ranges of sampling settings are `SamplingParams`' affair.
    """

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())
    most_stops: ClassVar[int]

    model: str | None = None
    max_tokens: _Whole | None = None
    min_tokens: int | None = None
    temperature: FiniteFloat | None = None
    top_p: FiniteFloat | None = None
    top_k: int | None = None
    min_p: FiniteFloat | None = None
    repetition_penalty: FiniteFloat | None = None
    presence_penalty: FiniteFloat | None = None
    frequency_penalty: FiniteFloat | None = None
    logit_bias: _Biases | None = None
    bad_words: _Texts | None = None
    suppress_tokens: _Ids | None = None
    begin_suppress_tokens: _Ids | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: _Texts | None = None
    stop_token_ids: _Ids | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: _Count | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    prompt_cache_key: str | None = None
    priority: _Whole | None = None
    timeout_s: Annotated[FiniteFloat, Field(gt=0)] | None = None
    request_id: Annotated[str, Field(pattern=f"^{REQUEST_ID.pattern}$")] | None = None
    return_progress: bool = False
    return_lserve: bool = False

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self:
        """Returns a request from the parsed body.

        Raises:
          ValidationError: if a field has the wrong type.
          ApiError: if a field is not supported, or fields contradict each other.
        """
        found = cls.model_validate({name: value for name, value in body.items() if value is not None})
        for name, value in (found.model_extra or {}).items():
            if name in _UNSUPPORTED and value not in _UNSUPPORTED[name]:
                raise bad_request(f"{name} is not supported here: leave it out", name, "unsupported_parameter")
        found.check()
        return found

    def check(self) -> None:
        """Raises `ApiError` if fields contradict each other."""
        if self.best_of is not None and self.best_of != self.choices:
            raise bad_request("best_of is not supported: it must equal n", "best_of", "unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options needs stream: true", "stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise bad_request("prompt_logprobs are not given in streams: set stream to false", "prompt_logprobs")
        if len(self.stop or ()) > self.most_stops:
            raise bad_request(f"stop: at most {self.most_stops} texts, got {len(self.stop or ())}", "stop")

    @property
    def choices(self) -> int:
        """Returns how many answers each prompt gets."""
        return 1 if self.n is None else self.n

    @property
    def has_usage_chunk(self) -> bool:
        """Returns whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def ignored(self) -> list[str]:
        """Returns the names of fields that nobody here knows; the first request with one is logged."""
        names = [name for name in self.model_extra or {} if name not in _UNSUPPORTED and name not in _HARMLESS]
        new = sorted({name[:_LONGEST_NAME] for name in names} - _logged)[: _MOST_NAMES - len(_logged)]
        if new:
            _logged.update(new)
            logger.warning(f"a request has fields that are not known here and are ignored: {shown(new, 200)}")
        return names


class ChatRequest(GenerationRequest):
    """The body of ``/v1/chat/completions``."""

    most_stops = 4

    messages: _Messages
    max_completion_tokens: _Whole | None = None
    logprobs: bool | None = None
    top_logprobs: _Count | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    echo: bool = False

    def check(self) -> None:
        """Raises `ApiError` if fields contradict each other."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            message = "continue_final_message and add_generation_prompt exclude each other"
            raise bad_request(message, "continue_final_message")
        if self.echo:
            raise bad_request("echo is not supported for chats", "echo", "unsupported_parameter")


class CompletionRequest(GenerationRequest):
    """The body of ``/v1/completions``. There lm-eval sends all stop texts of a task, more than OpenAI's four."""

    most_stops = 16

    prompt: Any  # see `completions.each_prompt`
    logprobs: _Count | None = None
    echo: bool = False
    add_special_tokens: bool = True

    def check(self) -> None:
        """Raises `ApiError` if fields contradict each other."""
        super().check()
        if self.stream and self.echo and self.logprobs is not None:
            raise bad_request("echo with logprobs is not given in streams: set stream to false", "echo")
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens: 0 needs echo: true, else there is nothing to answer", "max_tokens")


class TokenizeRequest(BaseModel):
    """The body of ``/tokenize``: a text, or a conversation."""

    model_config = ConfigDict(strict=True, extra="ignore")

    prompt: str | None = None
    messages: _Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    """The body of ``/detokenize``."""

    model_config = ConfigDict(strict=True, extra="ignore")

    tokens: Annotated[list[Annotated[int, Field(ge=0, le=LARGEST_INT)]], FailFast()]
