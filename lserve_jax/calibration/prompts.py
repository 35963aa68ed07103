"""Synthetic prompts with right answers; the answers' tokens show what a head is needed for."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from lserve_jax.config.digest import text_digest
from lserve_jax.config.errors import InputError
from lserve_jax.text.prose import ADJECTIVES, NOUNS, sentences
from lserve_jax.text.tokenizer import Tokenizer

ANSWER_TOKENS = 128
"""Most tokens of an answer."""

_ADVICE = "for an instruct model, give --tokenizer DIR that has its chat template as the default"
_FACTS = 8
_ASKED = 4


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt and its answer.

    Attributes:
      kind: a row of `KINDS`, or the caller's name for a kind of task.
      tokens: ids of the prompt and of the answer after it.
      num_answer: number of tokens at the end that are the answer.
      sources: number of the passage to which each token belongs, from 1; 0 for none.
      asks: number of the passage that contains each answer token; 0 for none.
    """

    kind: str
    tokens: tuple[int, ...]
    num_answer: int
    sources: tuple[int, ...]
    asks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.num_answer < len(self.tokens):
            raise InputError(f"num_answer={self.num_answer} must be from 1 to less than the {len(self.tokens)} tokens")
        if (len(self.sources), len(self.asks)) != (len(self.tokens), self.num_answer):
            raise InputError("sources must have an entry for each token, asks one for each token of the answer")

    @property
    def digest(self) -> str:
        """A name for exactly these tokens, sources and asks."""
        return text_digest(repr(self))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task in words, without the prose around it.

    Attributes:
      passages: the texts that are hidden in the prose.
      depths: their places, 0 … 1, ascending.
      question: the end of the user's message.
      answer: the parts of the answer, each with the number of the passage from which it comes.
    """

    passages: tuple[str, ...]
    depths: tuple[float, ...]
    question: str
    answer: tuple[tuple[str, int], ...]

    def compose(self, lines: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
        """Returns the user's message with ``lines`` of prose, and where in it each passage begins and ends."""
        text, spans, done = "", [], 0
        for passage, depth in zip(self.passages, self.depths, strict=True):
            upto = round(depth * len(lines))
            text += "".join(f"{line} " for line in lines[done:upto])
            spans.append((len(text), len(text) + len(passage)))
            text, done = f"{text}{passage} ", upto
        return f"{text}{' '.join(lines[done:])}\n\n{self.question}", spans


_FORMS = (
    ("The number of the {key} is {value}.", "What are the numbers of {keys}?", "The number of the {key} is {value}."),
    ("The secret word of the {key} is {value}.", "What are the secret words of {keys}?", "The {key}: {value}."),
    ("Remember that the {key} lies in box {value}.", "In which boxes are {keys}?", "Box {value} for the {key}."),
)
"""How a fact is stated, asked for and answered."""


def _retrieval(rng: random.Random, prose: Iterator[str]) -> Task:
    """Returns a task with several facts, some of which are asked for."""
    told, asked_for, answered = rng.choice(_FORMS)
    keys = [" ".join(pair) for pair in zip(rng.sample(ADJECTIVES, _FACTS), rng.sample(NOUNS, _FACTS), strict=True)]
    values = rng.sample(NOUNS, _FACTS) if "word" in told else [str(rng.randrange(10**5, 10**6)) for _ in keys]
    asked = rng.sample(range(_FACTS), _ASKED)
    names = [f"the {keys[index]}" for index in asked]
    return Task(
        passages=tuple(told.format(key=key, value=value) for key, value in zip(keys, values, strict=True)),
        depths=tuple(sorted(rng.uniform(0.02, 0.9) for _ in keys)),
        question=asked_for.format(keys=f"{', '.join(names[:-1])} and {names[-1]}") + " Answer in this order.",
        answer=tuple((answered.format(key=keys[index], value=values[index]), index + 1) for index in asked),
    )


def _copying(rng: random.Random, prose: Iterator[str]) -> Task:
    """Returns a task with a passage to repeat."""
    passage = " ".join(islice(prose, 10))
    begin = " ".join(passage.split()[:6])
    return Task(
        passages=(passage,),
        depths=(rng.uniform(0.05, 0.6),),
        question=f'Repeat, word for word, the passage that begins with "{begin}".',
        answer=((passage, 1),),
    )


_TASKS: dict[str, Callable[[random.Random, Iterator[str]], Task]] = {"retrieval": _retrieval, "copying": _copying}
_TEXT = "text"
KINDS = (*_TASKS, _TEXT)
"""Facts to find, a passage to copy, and plain text whose last tokens are the answer."""


def make_prompts(
    tokenizer: Tokenizer, *, count: int, length: int, seed: int | str, kinds: Sequence[str] = KINDS
) -> list[Prompt]:
    """Returns ``count`` prompts of at most ``length`` tokens, answers included, with alternating kinds.

    Prompts are in the checkpoint's chat format; one that has none is warned of. Each prompt depends only on
    seed, length and its number.

    Raises:
      InputError: if ``length`` has no room for a task, or the checkpoint has chat templates, but no default one.
    """
    chosen = [kinds[index % len(kinds)] for index in range(count)]
    return [_make(tokenizer, kind, length, random.Random(f"{seed} {index}")) for index, kind in enumerate(chosen)]


def _make(tokenizer: Tokenizer, kind: str, length: int, rng: random.Random) -> Prompt:
    prose = sentences(rng)
    if kind == _TEXT:
        return _plain(tokenizer, length, prose)
    task = _TASKS[kind](rng, prose)
    least = len(_render(tokenizer, kind, task, []).tokens)
    lines = prose_lines(tokenizer, prose, length - least)
    while len((prompt := _render(tokenizer, kind, task, lines)).tokens) > length:
        if not lines:
            raise InputError(f"length={length} is too short for a {kind} prompt: it must be at least {least} tokens")
        lines.pop()
    return prompt


def _plain(tokenizer: Tokenizer, length: int, prose: Iterator[str]) -> Prompt:
    text = " ".join(prose_lines(tokenizer, prose, length + ANSWER_TOKENS))
    tokens = tuple(tokenizer.encode(text)[:length])
    num_answer = min(ANSWER_TOKENS, len(tokens) - 1)
    return Prompt(kind=_TEXT, tokens=tokens, num_answer=num_answer, sources=(0,) * length, asks=(0,) * num_answer)


def prose_lines(tokenizer: Tokenizer, prose: Iterator[str], room: int) -> list[str]:
    """Returns sentences that have about ``room`` tokens together, and not more."""
    lines: list[str] = []
    for line in prose:
        room -= len(tokenizer.encode(f" {line}", add_special_tokens=False))
        if room < 0:
            break
        lines.append(line)
    return lines


def _render(tokenizer: Tokenizer, kind: str, task: Task, lines: Sequence[str]) -> Prompt:
    text, spans = task.compose(lines)
    ids = _encode(tokenizer, text)
    # A passage begins where the ids of the text before it end, whatever a tokenizer does at the boundary.
    begins, ends = ([_common(_encode(tokenizer, text[:at]), ids) for at in side] for side in zip(*spans, strict=True))
    sources = [0] * len(ids)
    for number, (begin, end) in enumerate(zip(begins, ends, strict=True), start=1):
        sources[begin:end] = [number] * (end - begin)
    answer: list[int] = []
    asks: list[int] = []
    for part, number in task.answer:
        answer += tokenizer.encode(f" {part}" if answer else part, add_special_tokens=False)
        asks += [number] * (len(answer) - len(asks))
    answer, asks = answer[:ANSWER_TOKENS], asks[:ANSWER_TOKENS]
    return Prompt(
        kind=kind,
        tokens=(*ids, *answer),
        num_answer=len(answer),
        sources=(*sources, *(0 for _ in answer)),
        asks=tuple(asks),
    )


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    if tokenizer.decide_chat_format(_ADVICE):
        return tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return tokenizer.encode(f"{text}\n")


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the length of the longest common prefix of two sequences."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
