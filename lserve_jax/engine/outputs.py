"""What a generation gives back: text, tokens, and how it went."""

from dataclasses import dataclass
from typing import Self


class TextChunk(str):
    """New text of a stream, with the tokens that brought it; text may lag behind tokens until it is certain.

    Attributes:
      token_ids: the tokens since the last chunk.
    """

    token_ids: tuple[int, ...]

    @classmethod
    def of(cls, text: str, token_ids: tuple[int, ...]) -> Self:
        """Returns the chunk."""
        chunk = cls(text)
        chunk.token_ids = token_ids
        return chunk

    @property
    def text(self) -> str:
        """The text as a plain `str`."""
        return str(self)


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """How one request went; times in seconds, without compilation.

    Attributes:
      ttft_s: from submission to the first token, waiting for other requests included.
      prefill_s: in the prefill calls of this request.
      decode_s: in the decode calls that it took part in.
      decoded_tokens: tokens that those decode calls gave this request.
      pages_read_ratio: KV pages read while decoding, over what dense attention would have read; None if nothing was
        decoded.
      attention_recall: the share of the true attention mass that the selected pages held, mean over the layers below;
        None if it was not measured or nothing was left out.
      attention_recall_by_layer: the same layer by layer, mean over sampled decode steps and retrieval heads; NaN in
        layers that read everything.
      retrieval_bytes: of the retrieval pages held at the end, statistics included.
      streaming_bytes: of the streaming pages held at the end.
      dense_bf16_bytes: of the same tokens' keys and values in bfloat16 without sparsity.
    """

    ttft_s: float
    prefill_s: float
    decode_s: float
    decoded_tokens: int
    pages_read_ratio: float | None
    attention_recall: float | None
    attention_recall_by_layer: tuple[float, ...] | None
    retrieval_bytes: int
    streaming_bytes: int
    dense_bf16_bytes: int


@dataclass(frozen=True, kw_only=True)
class ScoreOutput:
    """A continuation that was given, and what the model thought of it.

    Attributes:
      token_ids: the continuation.
      logprobs: the log-probability (natural logarithm) of each of its tokens, given all before it.
      greedy_token_ids: the likeliest token at each of these places.
      metrics: how it went; ``decoded_tokens`` are those after the first, which the prefill scores.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    greedy_token_ids: tuple[int, ...]
    metrics: RequestMetrics

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would have given this continuation."""
        return self.token_ids == self.greedy_token_ids


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A finished request.

    Attributes:
      prompt_token_ids: the prompt.
      token_ids: the generated tokens, a stop token included.
      text: what they say, without special tokens and cut before a stop string; empty where the model has no tokenizer.
      finish_reason: "stop" (a stop token or string), or "length".
      logprobs: the log-probability of each generated token under the model's own distribution, if asked for.
      metrics: how it went.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[float, ...] | None
    metrics: RequestMetrics
