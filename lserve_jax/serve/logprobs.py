"""Log-probabilities in the shapes of both routes, with the texts of tokens."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from lserve_jax.engine.outputs import TopLogprobs
from lserve_jax.text.tokenizer import Tokenizer

LEAST = -9999.0
"""What stands for a log-probability of minus infinity, which JSON does not have; vLLM takes the same."""


class TokenTexts:
    """The texts of single tokens, as they stand inside a text.

    Args:
      tokenizer: the model's; None if it has none, and a token's text is then ``token_id:`` with its number.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._found: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        """Returns the text of a token; bytes that are no character of their own are U+FFFD."""
        if token not in self._found:
            self._found[token] = self._decoded(token)
        return self._found[token]

    def _decoded(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        before, start = self._before  # a decoder may take the space away from the first token of a text
        text = self._tokenizer.decode([*before, token], skip_special_tokens=False)
        if text.startswith(start) and len(text) > len(start):
            return text.removeprefix(start)
        return self._tokenizer.decode([token], skip_special_tokens=False)

    @cached_property
    def _before(self) -> tuple[list[int], str]:
        assert self._tokenizer is not None
        ids = self._tokenizer.encode("a", add_special_tokens=False)
        return ids, self._tokenizer.decode(ids, skip_special_tokens=False)


def of_chat(
    texts: TokenTexts, tokens: Sequence[int], logprobs: Sequence[float], top: Sequence[TopLogprobs], count: int
) -> dict[str, Any]:
    """Returns ``choices[].logprobs`` of a chat.

    Args:
      texts: the texts of tokens.
      tokens: tokens of the answer.
      logprobs: the log-probability of each.
      top: the likeliest tokens at each place; may be empty if ``count`` is 0.
      count: how many of the likeliest are asked for.
    """
    content = [
        _entry(texts[token], logprob)
        | {"top_logprobs": [_entry(texts[one], value) for one, value in likeliest[:count]]}
        for token, logprob, likeliest in zip(tokens, logprobs, top or [()] * len(tokens), strict=True)
    ]
    return {"content": content, "refusal": None}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    """Returns a token of a chat; its bytes are unknown where they are no text of their own."""
    return {"token": text, "logprob": finite(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}


def of_completion(
    texts: TokenTexts,
    tokens: Sequence[int],
    logprobs: Sequence[float | None],
    top: Sequence[TopLogprobs | None],
    count: int,
    offset: int = 0,
) -> dict[str, Any]:
    """Returns ``choices[].logprobs`` of a completion.

    Args:
      texts: the texts of tokens.
      tokens: tokens, perhaps those of the prompt before those of the answer.
      logprobs: the log-probability of each; None for the first of a prompt.
      top: the likeliest tokens at each place; may be empty if ``count`` is 0.
      count: how many of the likeliest are asked for. The token itself is added to them.
      offset: characters of the text before these tokens.
    """
    shown = [texts[token] for token in tokens]
    likeliest = [
        None if logprob is None else _named(texts, ((token, logprob), *(others or ())[:count]))
        for token, logprob, others in zip(tokens, logprobs, top or [()] * len(tokens), strict=True)
    ]
    return {
        "tokens": shown,
        "token_logprobs": [None if logprob is None else finite(logprob) for logprob in logprobs],
        "top_logprobs": likeliest,
        "text_offset": _offsets(shown, offset),
    }


def _named(texts: TokenTexts, tokens: Iterable[tuple[int, float]]) -> dict[str, float]:
    """Returns log-probabilities by text. Of two tokens with one text the likelier counts: lm-eval takes the maximum."""
    found: dict[str, float] = {}
    for token, logprob in tokens:
        found[texts[token]] = max(finite(logprob), found.get(texts[token], LEAST))
    return found


def _offsets(texts: Sequence[str], offset: int) -> list[int]:
    found = []
    for text in texts:
        found.append(offset)
        offset += len(text)
    return found


def of_prompt(
    texts: TokenTexts,
    tokens: Sequence[int],
    logprobs: Sequence[float | None],
    top: Sequence[TopLogprobs | None],
    count: int,
) -> list[dict[str, Any] | None]:
    """Returns vLLM's ``prompt_logprobs``: for each token of the prompt, values by token id, its own and the likeliest.

    Args:
      texts: the texts of tokens.
      tokens: the prompt.
      logprobs: the log-probability of each token; None for the first.
      top: the likeliest tokens at each place; may be empty if ``count`` is 0.
      count: how many of the likeliest are asked for.
    """
    found: list[dict[str, Any] | None] = []
    for token, logprob, others in zip(tokens, logprobs, top or [()] * len(tokens), strict=True):
        if logprob is None:
            found.append(None)
            continue
        ranked: dict[int, tuple[float, int | None]] = {
            one: (value, rank) for rank, (one, value) in enumerate((others or ())[:count], start=1)
        }
        ranked.setdefault(token, (logprob, None))
        found.append(
            {
                str(one): {"logprob": finite(value), "rank": rank, "decoded_token": texts[one]}
                for one, (value, rank) in ranked.items()
            }
        )
    return found


def finite(logprob: float) -> float:
    """Returns a log-probability that JSON can hold."""
    return max(logprob, LEAST)
