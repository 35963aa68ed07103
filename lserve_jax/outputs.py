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
      retrieval_bytes: of the retrieval pages held at the end, statistics included.
      streaming_bytes: of the streaming pages held at the end.
      dense_bf16_bytes: of the same tokens' keys and values in bfloat16 without sparsity.
    """

    ttft_s: float
    prefill_s: float
    decode_s: float
    decoded_tokens: int
    pages_read_ratio: float | None
    retrieval_bytes: int
    streaming_bytes: int
    dense_bf16_bytes: int


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
