"""Endless varied English prose from a seed, and lists of common words, for long prompts.

The prose is expanded from a grammar (data/prose.txt). A paragraph keeps a topic, a person, a place and a few things, so
that a language model finds it natural. Sentence shapes and words hardly repeat. The prose has no digits and no number
words, which would collide with what tasks hide in it.
"""

import itertools
import random
import re
from collections import deque
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources

type _Grammar = Mapping[str, tuple[str, ...]]

_SENTENCES_A_PARAGRAPH = (5, 11)
_SHAPES_APART = 24
"""Number of consecutive sentences of which no two have the same shape."""
_DRAWS = 8
"""Most attempts to draw a wording that the paragraph does not have yet."""
_PEOPLE = {
    "woman": {"HE": "she", "HIM": "her", "HIS": "her"},
    "man": {"HE": "he", "HIM": "him", "HIS": "his"},
}
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeiou])")
_FIRST_LETTER = re.compile(r"[a-zA-Z]")


def sentences(rng: random.Random) -> Iterator[str]:
    """Yields grammatical English sentences for ever; consecutive ones belong together."""
    return itertools.chain.from_iterable(paragraphs(rng))


def paragraphs(rng: random.Random) -> Iterator[list[str]]:
    """Yields the same sentences for ever, as one list per person and topic."""
    grammar = _read_grammar()
    recent_shapes: deque[str] = deque(maxlen=_SHAPES_APART)
    while True:
        paragraph = _Paragraph(grammar, rng)
        shapes = [_other_than(recent_shapes, grammar["opening"], rng)]
        for _ in range(rng.randint(*_SENTENCES_A_PARAGRAPH) - 1):
            shapes.append(_other_than(recent_shapes, grammar["sentence"], rng))
        yield [_finish(paragraph.expand(shape)) for shape in shapes]


class _Paragraph:
    """What the sentences of a paragraph share: the values of slots in capitals, and the wordings used so far."""

    def __init__(self, grammar: _Grammar, rng: random.Random) -> None:
        self._grammar = grammar
        self._rng = rng
        self._topic = rng.choice(grammar["topic"])
        self._used: set[str] = set()
        kind = rng.choice(list(_PEOPLE))
        self._kept = {**_PEOPLE[kind], "PERSON": self._draw(kind)}

    def expand(self, template: str) -> str:
        """Returns a template with all its slots filled."""
        return _SLOT.sub(lambda slot: self._fill(slot[1]), template)

    def _fill(self, slot: str) -> str:
        if not slot.isupper():
            return self._draw(slot)
        if slot not in self._kept:
            self._kept[slot] = self._draw(slot.lower())
        return self._kept[slot]

    def _draw(self, symbol: str) -> str:
        """Returns an expansion of a symbol, if possible one that the paragraph does not have yet."""
        alternatives = self._grammar.get(f"{self._topic}.{symbol}") or self._grammar[symbol]
        text = ""
        for _ in range(_DRAWS):
            text = self.expand(self._rng.choice(alternatives))
            if text not in self._used:
                break
        self._used.add(text)
        return text


def _other_than(recent: deque[str], shapes: tuple[str, ...], rng: random.Random) -> str:
    """Returns a shape that is not among the recent ones, and remembers it."""
    fresh = [shape for shape in shapes if shape not in recent]
    shape = rng.choice(fresh or shapes)
    recent.append(shape)
    return shape


def _finish(text: str) -> str:
    text = _ARTICLE_BEFORE_VOWEL.sub(r"\1n ", text)
    return _FIRST_LETTER.sub(lambda letter: letter[0].upper(), text, count=1)


@cache
def _read_grammar() -> _Grammar:
    text = (resources.files("lserve_jax") / "data" / "prose.txt").read_text(encoding="utf-8")
    grammar: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            symbol, alternatives = line.split(": ", maxsplit=1)
            grammar[symbol] = (*grammar.get(symbol, ()), *alternatives.split(" | "))
    return grammar


def _read_words() -> dict[str, tuple[str, ...]]:
    """Returns the lists of data/words.txt by name; the file has the names in brackets above the lists."""
    text = (resources.files("lserve_jax") / "data" / "words.txt").read_text(encoding="utf-8")
    _, *sections = re.split(r"\[(\w+)\]", text)
    return {name: tuple(words.split()) for name, words in zip(sections[::2], sections[1::2], strict=True)}


_LISTS = _read_words()
NOUNS, ADJECTIVES, VERBS = (_LISTS[name] for name in ("nouns", "adjectives", "verbs"))
WORDS = tuple(dict.fromkeys((*NOUNS, *ADJECTIVES, *VERBS)))
"""All nouns, adjectives and verbs, each once."""
