"""What clients ask: scripts of requests, deterministic by seed, in English prose that no two documents share."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from lserve_jax.text.prose import sentences
from lserve_jax.text.tokenizer import Tokenizer

_ROOM = 128
"""Tokens of a request besides its document, prompts and answers: its question and the chat format."""
_LEAST_CONTEXT = 512
_QUESTIONS = (
    "What is this text about? Answer in one paragraph.",
    "Which people does the text name, and what do they do?",
    "Which places does the text name, and what happens there?",
    "Retell the last paragraph of the text in other words.",
    "What could happen next? Continue the text.",
    "Which things does the text describe, and how?",
    "Write a title for the text, and say why it fits.",
    "What in the text is surprising, and why?",
)


@dataclass(frozen=True)
class Turn:
    """One request: what the user says, and how many tokens the answer has."""

    text: str
    max_tokens: int


@dataclass(frozen=True)
class Script:
    """The requests of one client, each sent when the answer to the one before has ended.

    Attributes:
      turns: the requests.
      system: the system message, if any.
      is_conversation: whether a request has the earlier turns and the server's answers before it.
      starts_after: texts that the stage's first script must have got before this one starts.
    """

    turns: tuple[Turn, ...]
    system: str = ""
    is_conversation: bool = False
    starts_after: int = 0


@dataclass(frozen=True)
class Stage:
    """Scripts that run at the same time."""

    name: str
    scripts: tuple[Script, ...]


@dataclass(frozen=True)
class Shape:
    """The sizes of a workload, in tokens and numbers; a result belongs to its shape.

    Attributes:
      clients: scripts at the same time, for which a server has as many slots.
      turns: requests of each.
      document: tokens of what a request begins with.
      prompt: tokens of prose in each turn.
      answer: tokens of each answer.
      chunk: prompt tokens per prefill call, where a server can be told; 0 leaves it to the server.
    """

    clients: int
    turns: int
    document: int
    prompt: int
    answer: int
    chunk: int = 0

    def context(self, name: str) -> int:
        """Returns a power of two in which the longest request and its answer fit: servers of few sizes are compiled."""
        grown = self.turns if name == "chat" else 1
        need = self.document + _ROOM + grown * (self.prompt + self.answer + _ROOM // 4)
        return max(_LEAST_CONTEXT, 1 << (need - 1).bit_length())


SHAPES = {
    "short": Shape(clients=16, turns=3, document=0, prompt=64, answer=64),
    "documents": Shape(clients=4, turns=4, document=4096, prompt=0, answer=64),
    "shared_document": Shape(clients=4, turns=2, document=6144, prompt=0, answer=64),
    "chat": Shape(clients=4, turns=4, document=512, prompt=96, answer=48),
    # 20 chunks of 256 tokens, of which the question and the chat format take some.
    "long_arrival": Shape(clients=2, turns=1, document=20 * 256 - _ROOM, prompt=0, answer=320, chunk=256),
}
WORKLOADS = {
    "short": "clients with short prompts, one after the other",
    "documents": "clients with different documents, several questions about each",
    "shared_document": "clients with several questions about the same document",
    "chat": "conversations that begin with the same system message",
    "long_arrival": "a stream runs while a long prompt arrives; before, each of the two alone",
}
ALONE, STREAM, BOTH = "long prompt alone", "stream alone", "both"
"""The stages of `long_arrival`."""
_ARRIVES_AFTER = 24
_LONG_ANSWER = 8


def stages(name: str, shape: Shape, seed: int, tokenizer: Tokenizer) -> tuple[Stage, ...]:
    """Returns what clients ask in a workload; other seeds give other documents, so that no cache has seen them."""

    def prose(tokens: int, *labels: object) -> str:
        return prose_of(tokens, " ".join(map(str, (name, seed, *labels))), tokenizer)

    return _BUILDERS[name](shape, prose)


def as_arrivals(found: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Returns stages in which every request that needs no earlier answer is a script of its own, client by client."""

    def apart(script: Script) -> Iterator[Script]:
        turns = [script.turns] if script.is_conversation else [(turn,) for turn in script.turns]
        return (replace(script, turns=some) for some in turns)

    return tuple(Stage(one.name, tuple(part for script in one.scripts for part in apart(script))) for one in found)


def prose_of(tokens: int, seed: str, tokenizer: Tokenizer) -> str:
    """Returns whole sentences of at most so many tokens, of which about as many; at least one sentence."""
    text, count = "", 0
    for sentence in sentences(random.Random(seed)):
        following = f"{text} {sentence}" if text else sentence
        count += len(tokenizer.encode(following[len(text) :], add_special_tokens=False))
        if text and count > tokens:
            return text
        text = following
    raise AssertionError("prose does not end")


type _Prose = Callable[..., str]


def _short(shape: Shape, prose: _Prose) -> tuple[Stage, ...]:
    scripts = [
        Script(tuple(Turn(f"Continue: {prose(shape.prompt, c, t)}", shape.answer) for t in range(shape.turns)))
        for c in range(shape.clients)
    ]
    return (Stage("", tuple(scripts)),)


def _documents(shape: Shape, prose: _Prose) -> tuple[Stage, ...]:
    return (Stage("", tuple(_questions(prose(shape.document, c), c, shape) for c in range(shape.clients))),)


def _shared_document(shape: Shape, prose: _Prose) -> tuple[Stage, ...]:
    document = prose(shape.document)
    return (Stage("", tuple(_questions(document, c * shape.turns, shape) for c in range(shape.clients))),)


def _questions(document: str, first: int, shape: Shape) -> Script:
    asked = [_QUESTIONS[(first + turn) % len(_QUESTIONS)] for turn in range(shape.turns)]
    return Script(tuple(Turn(f"{document}\n\n{question}", shape.answer) for question in asked))


def _chat(shape: Shape, prose: _Prose) -> tuple[Stage, ...]:
    system = f"You talk about this text.\n\n{prose(shape.document)}"
    scripts = [
        Script(
            tuple(Turn(f"And what of this? {prose(shape.prompt, c, t)}", shape.answer) for t in range(shape.turns)),
            system=system,
            is_conversation=True,
        )
        for c in range(shape.clients)
    ]
    return (Stage("", tuple(scripts)),)


def _long_arrival(shape: Shape, prose: _Prose) -> tuple[Stage, ...]:
    def stream(*labels: object) -> Script:
        return Script((Turn(f"Continue: {prose(64, 'stream', *labels)}", shape.answer),))

    def long(starts_after: int, *labels: object) -> Script:
        turn = Turn(f"{prose(shape.document, 'long', *labels)}\n\n{_QUESTIONS[0]}", _LONG_ANSWER)
        return Script((turn,), starts_after=starts_after)

    return (
        Stage(ALONE, (long(0, 0),)),
        Stage(STREAM, (stream(0),)),
        Stage(BOTH, (stream(1), long(_ARRIVES_AFTER, 1))),
    )


_BUILDERS: dict[str, Callable[[Shape, _Prose], tuple[Stage, ...]]] = {
    "short": _short,
    "documents": _documents,
    "shared_document": _shared_document,
    "chat": _chat,
    "long_arrival": _long_arrival,
}


@cache
def tokenizer_of(model: str) -> Tokenizer:
    """Returns a model's tokenizer, which counts the tokens of prompts.

    Raises:
      ValueError: if it has none.
    """
    from lserve_jax.text.tokenizer import open_tokenizer
    from lserve_jax.weights.load import open_checkpoint

    found = open_tokenizer(open_checkpoint(model).tokenizer_source)
    if found is None:
        raise ValueError(f"{model} has no tokenizer, which prompts are counted with")
    return found
