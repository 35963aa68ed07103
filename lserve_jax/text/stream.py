"""Text that appears token by token, up to a stop string."""

from collections.abc import Sequence
from typing import Protocol

from lserve_jax.config.errors import InputError

_UNDECIDED = 3  # most bytes of an incomplete character; each may decode to one U+FFFD
_MOST_PENDING = 64  # tokens; only a model that writes no valid text reaches this


class Decoder(Protocol):
    """What a stream needs of a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of the ids."""
        ...


class TextStream:
    """The text of a growing list of tokens.

    The results of `push` and `finish`, joined, equal the decoding of all tokens at once, cut before the first stop
    string. (With SentencePiece, byte tokens that are not UTF-8 may differ from that.)

    Args:
      tokenizer: decodes the tokens.
      stop: strings that end the text and are not part of it. The first complete one counts, however the text is cut
        into tokens.
      skip_special_tokens: whether special tokens are left out of the text.

    Attributes:
      stopped: whether the text has reached a stop string; later tokens add nothing.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = (), *, skip_special_tokens: bool = True):
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise InputError(f"stop must be a sequence of non-empty strings, got {stop!r}")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._skip_special_tokens = skip_special_tokens
        self._settled: list[int] = []  # the tokens before the pending ones, which the decoder needs as context
        self._pending: list[int] = []
        self._shown = 0  # characters of the pending tokens' text that were returned already
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self._parts: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._parts)

    def push(self, token_id: int) -> str:
        """Returns the new text that is certain: no incomplete character, no possible beginning of a stop string."""
        if self.stopped:
            return ""
        return self._release(self._decode(token_id), is_last=False)

    def finish(self) -> str:
        """Returns the text kept back so far. Call it once, after the last token."""
        if self.stopped:
            return ""
        rest = self._pending_text()[self._shown :]
        self._pending, self._shown = [], 0
        return self._release(rest, is_last=True)

    def _decode(self, token_id: int) -> str:
        """Returns the characters that are certain with this token."""
        if self._is_skipped(token_id):  # as context it would remove the next token's space
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
        """Returns the text of the pending tokens, decoded after the settled ones."""
        before = self._tokenizer.decode(self._settled, self._skip_special_tokens)
        text = self._tokenizer.decode(self._settled + self._pending, self._skip_special_tokens)
        if text.startswith(before):
            return text[len(before) :]
        # New bytes have made a run of valid bytes invalid that was shown already.
        return self._tokenizer.decode(self._pending, self._skip_special_tokens)

    def _release(self, new: str, *, is_last: bool) -> str:
        """Returns the part of the kept-back and the new text that may be shown."""
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
        """Returns the length of the longest suffix of the text that is a prefix of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
