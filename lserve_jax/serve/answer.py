"""What the answers of both routes have in common: a response or its chunks, as dictionaries."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lserve_jax.engine.generation import Generation
from lserve_jax.engine.outputs import RequestOutput, TextChunk
from lserve_jax.serve import logprobs
from lserve_jax.serve.protocol import ChatRequest, CompletionRequest
from lserve_jax.serve.service import Service, Trace
from lserve_jax.serve.ticket import PromptProgress


class Answer(ABC):
    """A checked request, and how its results are written.

    Args:
      service: the model and its names.
      request: what the client asks for.
      generations: the requests to the engine, ``n`` for each prompt; a choice's index is its place here.
      trace: the request's id.

    Attributes:
      generations: as given.
      is_stream: whether the answer is a stream.
    """

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(
        self,
        service: Service,
        request: ChatRequest | CompletionRequest,
        generations: Sequence[Generation],
        trace: Trace,
    ) -> None:
        self.generations = generations
        self.is_stream = bool(request.stream)
        self.service = service
        self._request = request
        self._id = f"{self.id_prefix}{trace.id}"
        self._created = int(time.time())

    @abstractmethod
    def opening(self) -> list[dict[str, Any]]:
        """Returns the chunks that need nothing of the model."""

    @abstractmethod
    def delta(self, index: int, chunk: TextChunk) -> dict[str, Any] | None:
        """Returns the chunk for new text of a choice; None if there is nothing to tell."""

    @abstractmethod
    def last_delta(self, index: int) -> dict[str, Any]:
        """Returns the choice of an empty chunk, with which a choice ends."""

    @abstractmethod
    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """Returns a choice of a whole response, but for what `ended` adds."""

    def closing(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """Returns the last chunk of a choice."""
        return self.chunk([self.last_delta(index) | self._ending(output)])

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Returns the response, from the outputs in the order of the choices."""
        choices = [
            self.choice(index, output) | self._ending(output) | self._of_prompt(output)
            for index, output in enumerate(outputs)
        ]
        return self._message(self.whole_object, choices) | {"usage": self._usage(outputs)}

    def chunk(self, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns a chunk; if the client asks for usage, each but the last has none."""
        return self._message(self.chunk_object, choices) | ({"usage": None} if self._request.has_usage_chunk else {})

    def usage_chunk(self, outputs: Sequence[RequestOutput]) -> dict[str, Any] | None:
        """Returns the chunk with the numbers of tokens, if the client asks for it."""
        return self.chunk([]) | {"usage": self._usage(outputs)} if self._request.has_usage_chunk else None

    def progress(self, index: int, progress: PromptProgress) -> dict[str, Any] | None:
        """Returns the chunk that says how far a prompt has been read, as llama.cpp's server has it, if asked for."""
        if not self._request.return_progress:
            return None
        found = {
            "index": index,
            "total": progress.total,
            "cache": progress.cached,
            "processed": progress.processed,
            "time_ms": round(1000 * progress.seconds),
        }
        return self.chunk([]) | {"prompt_progress": found}

    @property
    def deadline(self) -> float | None:
        """Returns the time of `time.perf_counter` at which the client wants an end; None if it names no time."""
        timeout_s = self._request.timeout_s
        return None if timeout_s is None else self.generations[0].request.arrival + timeout_s

    @property
    def is_echo_alone(self) -> bool:
        """Returns whether the one token that the engine generates at least is not wanted."""
        return self._request.max_tokens == 0

    def generated(self, output: RequestOutput) -> int:
        """Returns how many tokens of an output are the answer."""
        return 0 if self.is_echo_alone else len(output.token_ids)

    def _message(self, kind: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.service.model,
            "choices": choices,
        }

    def _ending(self, output: RequestOutput) -> dict[str, Any]:
        """Returns why a choice ended, and if asked for, what it took."""
        reason = "length" if self.is_echo_alone else output.finish_reason
        return {"finish_reason": reason} | (_statistics(output) if self._request.return_lserve else {})

    def _of_prompt(self, output: RequestOutput) -> dict[str, Any]:
        count = self._request.prompt_logprobs
        if count is None or output.prompt_logprobs is None:
            return {}
        top = output.prompt_top_logprobs or ()
        found = logprobs.of_prompt(
            self.service.token_texts, output.prompt_token_ids, output.prompt_logprobs, top, count
        )
        return {"prompt_logprobs": found}

    def _usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Returns the numbers of tokens: each prompt counts once, every answer counts."""
        first = outputs[:: self._request.choices]
        prompt = sum(len(output.prompt_token_ids) for output in first)
        completion = sum(map(self.generated, outputs))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(output.metrics.cached_tokens for output in first)},
        }


def _statistics(output: RequestOutput) -> dict[str, Any]:
    """Returns times in the shape of llama.cpp's server, and what sparsity saved."""
    metrics = output.metrics
    computed = len(output.prompt_token_ids) - metrics.cached_tokens
    timings = {
        "cache_n": metrics.cached_tokens,
        "prompt_n": computed,
        "prompt_ms": 1000 * metrics.prefill_s,
        "prompt_per_second": computed / metrics.prefill_s if metrics.prefill_s else None,
        "predicted_n": len(output.token_ids),
        "predicted_ms": 1000 * metrics.decode_s,
        "predicted_per_second": metrics.decoded_tokens / metrics.decode_s if metrics.decode_s else None,
        "first_token_ms": 1000 * metrics.ttft_s,
    }
    lserve = {
        "pages_read_ratio": metrics.pages_read_ratio,
        "kv_bytes": metrics.retrieval_bytes + metrics.streaming_bytes,
        "dense_bytes": metrics.dense_bf16_bytes,
        "attention_recall": metrics.attention_recall,
    }
    return {"timings": timings, "lserve": lserve}
