"""Distinguishes the text that users write from the control tokens that a chat template writes.

A message may hold the text ``<|im_end|>``. In the rendered conversation it would look like the token that ends a turn.
So such text is replaced before rendering by a stand-in that no one can guess. All control tokens in the result are then
the template's. They are respelled, the users' text is restored, and a twin of the tokenizer, which knows control tokens
by the new spelling only, encodes the result. A conversation without such text is encoded as it is.

This also covers a message that ends in the beginning of a control token's text, so that two messages or parts cannot
form one together. It does not cover a template that cuts a piece out of a message's middle and thereby makes a control
token of the rest, or that writes the beginning of one right before a message. Added tokens that the checkpoint does not
call special (``<think>`` in Qwen3) mean the same in a message as anywhere.
"""

import json
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tokenizers


@dataclass(kw_only=True)
class Literals:
    """The texts of one conversation that are meant literally, and their stand-ins.

    A stand-in is a number of 38 digits. It has no blanks that a template might trim, no letters that a template might
    capitalise, and nothing that JSON escapes.
    """

    nonce: str = field(default_factory=lambda: str(10**31 + secrets.randbelow(9 * 10**31)))
    texts: list[str] = field(default_factory=list)

    def stand_in(self, text: str) -> str:
        """Returns the stand-in for the text, and remembers the text."""
        if text not in self.texts:
            self.texts.append(text)
        return f"{self.nonce}{self.texts.index(text):06d}"

    def restore(self, text: str) -> str:
        """Returns the text with each stand-in replaced by what it stands for."""
        return re.sub(self.nonce + r"(\d{6})", lambda match: self.texts[int(match[1])], text)


class ControlTexts:
    """The texts of a tokenizer's special tokens.

    Args:
      backend: the tokenizer; it is not changed.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        added = backend.get_added_tokens_decoder().values()
        self._special = [token.content for token in added if token.special and token.content]
        self._beginnings = {text[:length] for text in self._special for length in range(1, len(text))}
        self._pattern = _any_of(self._special)
        self._added_pattern = _any_of([token.content for token in added if token.content])
        self._twin: _Twin | None = None
        self._twin_lock = threading.Lock()  # conversations may be encoded by several threads

    def guard(self, value: Any, literals: Literals) -> Any:
        """Returns a value with stand-ins in its texts, for special tokens and for a beginning of one at the end."""
        if isinstance(value, str):
            return self._guard_text(value, literals)
        if isinstance(value, Mapping):
            return {self.guard(key, literals): self.guard(item, literals) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.guard(item, literals) for item in value]
        return value

    def _guard_text(self, text: str, literals: Literals) -> str:
        if not self._special:
            return text
        pieces = self._pattern.split(text)  # text, special token, text, …, text
        # A plain word stays whole: templates compare roles, and some make control tokens of them.
        tail = "" if text.isidentifier() else self._beginning_at_end(pieces[-1])
        rest = pieces[-1][: len(pieces[-1]) - len(tail)]
        guarded = [literals.stand_in(piece) if index % 2 else piece for index, piece in enumerate(pieces[:-1])]
        return "".join([*guarded, rest, literals.stand_in(tail) if tail else ""])

    def _beginning_at_end(self, text: str) -> str:
        longest = max(map(len, self._special)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return text[-length:]
        return ""

    def encode(self, rendered: str, literals: Literals) -> list[int]:
        """Returns the ids of a rendered conversation, in which the special tokens are those that no stand-in hides."""
        if not literals.texts:
            return encode(self._backend, rendered, add_special_tokens=False)
        with self._twin_lock:
            self._twin = twin = self._twin or self._make_twin()
        text = self._added_pattern.sub(lambda match: twin.respelled.get(match[0], match[0]), rendered)
        return encode(twin.backend, literals.restore(text), add_special_tokens=False)

    def _make_twin(self) -> "_Twin":
        """Returns the same tokenizer with secret texts for its special tokens."""
        nonce = secrets.token_hex(16)
        respelled = {text: f"<{nonce}-{index}>" for index, text in enumerate(self._special)}
        description = json.loads(self._backend.to_str())
        for token in description["added_tokens"]:
            if token["special"]:
                token["content"] = respelled.get(token["content"], token["content"])
        model = description["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {respelled.get(text, text): index for text, index in model["vocab"].items()}
        else:  # Unigram: pairs of text and score
            model["vocab"] = [[respelled.get(text, text), score] for text, score in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = respelled.get(model["unk_token"], model["unk_token"])
        description["post_processor"] = None  # it only adds tokens around a text, which the template does
        return _Twin(backend=tokenizers.Tokenizer.from_str(json.dumps(description)), respelled=respelled)


@dataclass(frozen=True, kw_only=True)
class _Twin:
    """A tokenizer that knows control tokens by another spelling only.

    Attributes:
      backend: the tokenizer.
      respelled: the other spelling of each control token's text.
    """

    backend: tokenizers.Tokenizer
    respelled: Mapping[str, str]


def encode(backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Returns the ids of a text, while other threads run: ``encode`` itself stops them, for seconds at a long text."""
    (found,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return found.ids


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """Returns a pattern of one group that finds the leftmost match, and the longest there, as the library does."""
    return re.compile("(" + "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) + ")")
