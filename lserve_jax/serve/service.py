"""What every route needs: the engine thread, the options, and what follows from the loaded model."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.engine.generation import Generation
from lserve_jax.llm import LLM
from lserve_jax.serve import params as settings
from lserve_jax.serve.engine_thread import EngineThread
from lserve_jax.serve.errors import ApiError, bad_request
from lserve_jax.serve.logprobs import TokenTexts
from lserve_jax.serve.options import ServeOptions
from lserve_jax.serve.protocol import ChatRequest, CompletionRequest
from lserve_jax.text.tokenizer import Tokenizer


@dataclass
class Trace:
    """What is known of a request outside its route.

    Attributes:
      id: in the header X-Request-Id, in the log and in the response.
      route: the path of its route; "other" if it has none.
      ignored: names of fields that were ignored.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    route: str = "other"
    ignored: Sequence[str] = ()


class Service:
    """The engine thread and the options, and what follows from the loaded model.

    Args:
      thread: the engine thread.
      options: the server's.
    """

    def __init__(self, thread: EngineThread, options: ServeOptions) -> None:
        self.thread = thread
        self.options = options
        self.started = int(time.time())

    @property
    def llm(self) -> LLM:
        """Returns the model."""
        return self.thread.llm

    @cached_property
    def model(self) -> str:
        """Returns the name by which requests ask for the model: of a folder or file the last part of its path."""
        name = self.llm.setup.checkpoint.name
        return self.options.served_model_name or (Path(name).resolve().name if Path(name).exists() else name)

    @property
    def context(self) -> int:
        """Returns the most tokens of prompt and answer together."""
        return self.llm.setup.sizes.max_model_len

    @cached_property
    def token_texts(self) -> TokenTexts:
        """Returns the texts of single tokens."""
        return TokenTexts(self.llm.tokenizer)

    @cached_property
    def default_params(self) -> SamplingParams:
        """Returns the settings that the model recommends."""
        return self.llm.default_sampling_params()

    def require_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer; raises `InputError` if the model has none."""
        if self.llm.tokenizer is None:
            raise InputError(f"the model {self.model} has no tokenizer: send token ids to /v1/completions")
        return self.llm.tokenizer

    def require_model(self, name: str | None) -> None:
        """Raises `ApiError` unless the name is that of the model; a request may also name none."""
        if name is not None and name != self.model:
            message = f"the model {shown(name)} does not exist here; this server has {shown(self.model)}"
            raise ApiError(404, "model_not_found", message, param="model")

    def require_few(self, answers: int) -> None:
        """Raises `ApiError` if a request asks for more answers than can ever wait and run together."""
        most = self.options.max_queued_requests + self.llm.setup.sizes.max_num_seqs
        if answers > most:
            raise bad_request(f"the request asks for {answers} answers, and at most {most} can wait and run here", "n")

    def require_time(self, timeout_s: float | None) -> None:
        """Raises `ApiError` if a request asks for more time than the server gives; it may also name no time."""
        most = self.options.request_timeout
        if most and timeout_s is not None and timeout_s > most:
            message = f"timeout_s: at most {most} seconds (the server's --request-timeout), got {timeout_s}"
            raise bad_request(message, "timeout_s")

    def generations(
        self,
        request: ChatRequest | CompletionRequest,
        prompts: Sequence[Sequence[int]],
        params_of: Callable[[Sequence[int]], SamplingParams],
    ) -> list[Generation]:
        """Returns the requests to the engine: ``n`` for each prompt, one after another.

        Args:
          request: what the client asks for.
          prompts: token ids.
          params_of: returns the settings for a prompt.

        Raises:
          ApiError: if a prompt or a setting names a token that the model does not have.
        """
        salt = settings.salt(request, self.options.api_key)
        try:
            return [
                self.llm.request(prompt, settings.seeded(params, index), priority=request.priority or 0, salt=salt)
                for prompt in prompts
                for params in [params_of(prompt)]
                for index in range(request.choices)
            ]
        except InputError as error:
            raise settings.naming_the_field(error, "prompt") from None
