"""Text that appears token by token, up to a stop string."""

from collections.abc import Sequence
from typing import Protocol

_UNDECIDED = 3  # bytes of a character that is not complete yet; each may show as one U+FFFD
_MOST_PENDING = 64  # tokens; more only where a model writes no valid text at all


class Decoder(Protocol):
    """What a stream needs of a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of the ids."""
        ...


class TextStream:
    """The text of a growing list of tokens.

    Everything that `push` and `finish` return, joined, is what decoding all tokens at once gives, cut before the first
    stop string. (A run of byte tokens that is not UTF-8 may decode differently at once; SentencePiece only.)

    Args:
      tokenizer: What decodes.
      stop: Strings at which the text ends; they are not part of it. The first to be complete counts, however the text
        is cut into tokens.
      skip_special_tokens: Whether special tokens are left out of the text.

    Attributes:
      stopped: Whether a stop string was met; later tokens add nothing.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = (), *, skip_special_tokens: bool = True):
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop must be a sequence of non-empty strings, got {stop!r}")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._skip_special_tokens = skip_special_tokens
        self._settled: list[int] = []  # the tokens before the pending ones that the decoder needs to see
        self._pending: list[int] = []
        self._shown = 0  # characters of the pending tokens' text that have left the decoder
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self._parts: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All text that was returned so far."""
        return "".join(self._parts)

    def push(self, token_id: int) -> str:
        """Returns the new text that is certain: no half character, nothing that may turn out to begin a stop string."""
        if self.stopped:
            return ""
        return self._release(self._decode(token_id), is_last=False)

    def finish(self) -> str:
        """Returns what was held back; to be called once, when no token follows."""
        if self.stopped:
            return ""
        rest = self._pending_text()[self._shown :]
        self._pending, self._shown = [], 0
        return self._release(rest, is_last=True)

    def _decode(self, token_id: int) -> str:
        """Returns the characters that this token makes certain."""
        if self._is_skipped(token_id):  # as context it would cost the next token its space
            return ""
        self._pending.append(token_id)
        text = self._pending_text()
        certain = max(len(text.rstrip("\ufffd")), len(text) - _UNDECIDED)
        new = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if text and certain == len(text):
            self._settled, self._pending, self._shown = self._pending, [], 0
        elif len(self._pending) > _MOST_PENDING:
            new += text[certain:]
            self._settled, self._pending, self._shown = self._pending, [], 0
        return new

    def _is_skipped(self, token_id: int) -> bool:
        shown = self._tokenizer.decode([token_id], self._skip_special_tokens)
        return not shown and bool(self._tokenizer.decode([token_id], False))

    def _pending_text(self) -> str:
        """Returns the text of the pending tokens, as it reads behind the settled ones."""
        before = self._tokenizer.decode(self._settled, self._skip_special_tokens)
        text = self._tokenizer.decode(self._settled + self._pending, self._skip_special_tokens)
        if text.startswith(before):
            return text[len(before) :]
        # New bytes spoilt a run of valid ones that was shown already.
        return self._tokenizer.decode(self._pending, self._skip_special_tokens)

    def _release(self, new: str, *, is_last: bool) -> str:
        """Returns what may be shown of the text held back and the new text."""
        text = self._held + new
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            shown = text[: min(ends)[1]]
            self._held = ""
        else:
            keep = 0 if is_last else self._may_become_stop(text)
            shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self._parts.append(shown)
        return shown

    def _may_become_stop(self, text: str) -> int:
        """Returns the length of the longest end of the text that is the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
