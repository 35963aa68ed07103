"""Text that appears token by token, up to a stop string."""

from collections.abc import Iterable, Sequence
from itertools import chain
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

    A stop string may contain the texts of special tokens that the text does not show: each special token is then either
    a part of the stop string, as a whole, or between two of its characters.

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
        self._search = _StopSearch(stop)
        self._skip_special_tokens = skip_special_tokens
        self._settled: list[int] = []  # the tokens before the pending ones, which the decoder needs as context
        self._pending: list[int] = []
        self._returned = 0  # characters of the pending tokens' text that were returned already
        self._parts: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._parts)

    def push(self, token_id: int, *, is_shown: bool = True) -> str:
        """Returns the new text that is certain: no incomplete character, no possible beginning of a stop string.

        Args:
          token_id: the next token.
          is_shown: whether the token's text is part of the text; if not, it can still complete a stop string.
        """
        if self.stopped:
            return ""
        hidden = self._tokenizer.decode([token_id], False)
        if is_shown and not self._is_skipped(token_id, hidden):
            return self._release((character, True) for character in self._decode(token_id))
        return self._release([(hidden, False)])  # as context of the decoder it would remove the next token's space

    def finish(self) -> str:
        """Returns the text kept back so far. Call it once, after the last token."""
        if self.stopped:
            return ""
        rest = self._pending_text()[self._returned :]
        self._pending, self._returned = [], 0
        released = self._release((character, True) for character in rest)
        held = "" if self.stopped else self._search.rest()
        self._parts.append(held)
        return released + held

    def _decode(self, token_id: int) -> str:
        """Returns the characters that are certain with this token."""
        self._pending.append(token_id)
        text = self._pending_text()
        certain = max(len(text.rstrip("\ufffd")), len(text) - _UNDECIDED)
        new = text[self._returned : certain]
        self._returned = max(self._returned, certain)
        if text and certain == len(text):
            self._settled, self._pending, self._returned = self._pending, [], 0
        elif len(self._pending) > _MOST_PENDING:
            new += text[certain:]
            self._settled, self._pending, self._returned = self._pending, [], 0
        return new

    def _is_skipped(self, token_id: int, text: str) -> bool:
        return bool(text) and not self._tokenizer.decode([token_id], self._skip_special_tokens)

    def _pending_text(self) -> str:
        """Returns the text of the pending tokens, decoded after the settled ones."""
        before = self._tokenizer.decode(self._settled, self._skip_special_tokens)
        text = self._tokenizer.decode(self._settled + self._pending, self._skip_special_tokens)
        if text.startswith(before):
            return text[len(before) :]
        # New bytes have made a run of valid bytes invalid that was returned already.
        return self._tokenizer.decode(self._pending, self._skip_special_tokens)

    def _release(self, pieces: Iterable[tuple[str, bool]]) -> str:
        """Returns what may be shown after new pieces, see `_StopSearch`."""
        shown: list[str] = []
        for piece, is_shown in pieces:
            text, self.stopped = self._search.add(piece, is_shown=is_shown)
            shown.append(text)
            if self.stopped:
                break
        self._parts += shown
        return "".join(shown)


class _StopSearch:
    """The search for stop strings in a text of pieces: characters that are shown, and special tokens that are not.

    A piece that is not shown belongs to a match as a whole or is passed over, so that the end of such a token's text
    (``|>``) is no match, while stop strings of the shown text are found across it.

    Args:
      stops: the stop strings.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(dict.fromkeys(stops))
        self._held: list[str] = []  # what is shown of each piece that may belong to a stop string
        self._open: dict[str, int] = {}  # what is missing of a stop string: where in the held pieces it began

    def add(self, piece: str, *, is_shown: bool) -> tuple[str, bool]:
        """Returns what may be shown with one more piece, and whether it completes a stop string."""
        begun = chain(self._open.items(), ((stop, len(self._held)) for stop in self._stops))
        grown = [(rest[len(piece) :], start) for rest, start in begun if rest.startswith(piece)]
        passed = [] if is_shown else list(self._open.items())
        self._held.append(piece if is_shown else "")
        ends = [start for rest, start in grown if not rest]
        if ends:
            return "".join(self._held[: min(ends)]), True
        self._open = {}
        for rest, start in chain(grown, passed):
            self._open[rest] = min(start, self._open.get(rest, start))
        first = min(self._open.values(), default=len(self._held))
        shown, self._held = "".join(self._held[:first]), self._held[first:]
        self._open = {rest: start - first for rest, start in self._open.items()}
        return shown, False

    def rest(self) -> str:
        """Returns what is shown of the pieces kept back."""
        return "".join(self._held)
