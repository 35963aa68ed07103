"""The results of a generation: text, tokens and statistics."""

from dataclasses import dataclass, field
from typing import Self

import numpy as np

type TopLogprobs = tuple[tuple[int, float], ...]
"""The likeliest tokens at one place, with their log-probabilities, best first."""


class TextChunk(str):
    """New text of a stream, with its tokens; text may lag behind tokens until it is certain.

    Attributes:
      token_ids: the tokens since the last chunk.
      logprobs: the log-probability of each of these tokens under the model's unmodified distribution.
      top_logprobs: the likeliest tokens at each of these places, if the request asks for them; else empty.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[TopLogprobs, ...]

    @classmethod
    def of(
        cls,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[float, ...] = (),
        top_logprobs: tuple[TopLogprobs, ...] = (),
    ) -> Self:
        """Returns the chunk of ``text`` and its tokens."""
        chunk = cls(text)
        chunk.token_ids, chunk.logprobs, chunk.top_logprobs = token_ids, logprobs, top_logprobs
        return chunk

    @property
    def text(self) -> str:
        """Returns the text as a plain `str`."""
        return str(self)


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """Statistics of one request; times are in seconds, without compilation.

    Attributes:
      ttft_s: time from submission to the first token, waiting for other requests included.
      prefill_s: time in the prefill calls of this request.
      decode_s: time in the decode calls in which this request took part.
      decoded_tokens: tokens that those decode calls generated for this request.
      cached_tokens: tokens of the prompt that were not computed, because an earlier request had left them in the cache.
      pages_read_ratio: KV pages read during decoding, relative to dense attention; None if nothing was decoded.
      attention_recall: the share of the true attention mass that lies in the selected pages, mean over the layers
        below; None if it was not measured or every page was read.
      attention_recall_by_layer: the same per layer, mean over sampled decode steps and retrieval heads; NaN in layers
        that read every page.
      retrieval_bytes: bytes of the retrieval pages at the end, any statistics included.
      streaming_bytes: bytes of the streaming pages at the end.
      dense_bf16_bytes: bytes of the pages that the same tokens fill in bfloat16 without sparsity.
    """

    ttft_s: float
    prefill_s: float
    decode_s: float
    decoded_tokens: int
    cached_tokens: int
    pages_read_ratio: float | None
    attention_recall: float | None
    attention_recall_by_layer: tuple[float, ...] | None
    retrieval_bytes: int
    streaming_bytes: int
    dense_bf16_bytes: int


@dataclass(frozen=True, kw_only=True)
class ScoreOutput:
    """A given continuation, and the model's scores for it.

    Attributes:
      token_ids: the continuation.
      logprobs: the log-probability (natural logarithm) of each of its tokens, given all tokens before it.
      greedy_token_ids: the likeliest token at each of these positions.
      metrics: statistics; ``decoded_tokens`` are those after the first, which the prefill scores.
      logits: [T, V] float32 the model's logits at each of these positions, if asked for.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    greedy_token_ids: tuple[int, ...]
    metrics: RequestMetrics
    logits: np.ndarray | None = field(default=None, compare=False)

    @property
    def is_greedy(self) -> bool:
        """Returns whether greedy decoding would generate this continuation."""
        return self.token_ids == self.greedy_token_ids


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A finished request.

    Attributes:
      prompt_token_ids: the prompt.
      token_ids: the generated tokens, a stop token included.
      text: their text, cut before a stop string, without special tokens unless ``skip_special_tokens`` is False; empty
        if the model has no tokenizer.
      finish_reason: "stop" (a stop token or string), or "length".
      logprobs: the log-probability of each generated token under the model's unmodified distribution, if requested.
      top_logprobs: the likeliest tokens at the place of each generated token, with their log-probabilities, best first,
        if requested.
      prompt_logprobs: the log-probability of each token of the prompt, given all tokens before it; None for the first.
        They come from prefill, in which streaming heads are active and page selection is not.
      prompt_top_logprobs: the likeliest tokens at the place of each token of the prompt; None for the first.
      metrics: statistics of the request.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[float, ...] | None
    top_logprobs: tuple[TopLogprobs, ...] | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None
    prompt_top_logprobs: tuple[TopLogprobs | None, ...] | None = None
    metrics: RequestMetrics
