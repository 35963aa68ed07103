"""Counting words: RULER's common words and frequent words extraction (arXiv 2404.06654, table 2)."""

import math
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass

from lserve_jax.evaluation.haystack import Lazy, sample_rng
from lserve_jax.evaluation.length import fit
from lserve_jax.evaluation.matching import string_match_all
from lserve_jax.evaluation.sample import Metric, Request, Sample
from lserve_jax.text import prose

_COMMON_TEXT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
_COMMON_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
_NUM_COMMON = 10
_UNPAIRED = 50
"""Words that are not part of a longer word: those of the example, and the common ones of the question."""
_LONG = 4096
"""Shorter prompts have the lower frequencies, as in RULER."""

_FREQUENT_TEXT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
_FREQUENT_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"
_NUM_FREQUENT = 3
_DOTS = "..."
"""Replaces the most frequent word, as noise."""
_ALPHA = 2
_ZETA = math.pi**2 / 6
"""ζ(2), which normalises the shares k^-2."""
_LETTERS = 6
_TOKENS_A_CODED_WORD = 50
"""Tokens of the prompt per different coded word."""
_LEAST_WORDS = 120
"""With fewer words, the last frequent word is no more frequent than the next one."""


@dataclass(frozen=True, kw_only=True)
class CommonWords:
    """Ten words appear more often than all others; a worked example of the same kind comes before.

    Attributes:
      long: how often a common and an uncommon word appear, in the example and in the question, from 4096 tokens on.
      short: the same below 4096 tokens.
    """

    name: str = "cwe"
    long: tuple[tuple[int, int], tuple[int, int]] = ((10, 3), (30, 3))
    short: tuple[tuple[int, int], tuple[int, int]] = ((3, 1), (6, 1))
    metric: Metric = string_match_all
    max_tokens: int = 120

    def make(self, request: Request) -> Sample:
        """Returns a sample whose references are the ten common words."""
        is_long = request.length + self.max_tokens >= _LONG
        of_example, of_question = self.long if is_long else self.short
        rng = sample_rng(self.name, request)
        example_words = 40 if is_long else 20
        drawn = _distinct_words(rng)
        shown = Lazy(drawn).take(example_words)
        example = f"{_common_text(shown, of_example, rng)} {_COMMON_PREFIX} {_numbered(shown[:_NUM_COMMON])}\n"
        words = Lazy(drawn)
        common = words.take(_NUM_COMMON)
        order = sample_rng(self.name, request, "order").random()

        def build(count: int) -> Sample:
            return Sample(
                text=example + _common_text(words.take(count), of_question, random.Random(order)),
                answer_prefix=_COMMON_PREFIX,
                references=tuple(common),
                max_tokens=self.max_tokens,
            )

        return build(fit(self.name, request, build, least=_NUM_COMMON + 1, tokens_a_unit=6 * of_question[1]))


@dataclass(frozen=True, kw_only=True)
class FrequentWords:
    """Coded words by the zeta distribution: the k-th has a share of k^-2 / ζ(2); the first is noise, three count."""

    name: str = "fwe"
    metric: Metric = string_match_all
    max_tokens: int = 50

    def make(self, request: Request) -> Sample:
        """Returns a sample whose references are the three most frequent coded words in order."""
        rng = sample_rng(self.name, request)
        size = max(request.length // _TOKENS_A_CODED_WORD, _NUM_FREQUENT + 2)
        vocabulary = [_DOTS, *Lazy(_coded_words(rng)).take(size - 1)]
        order = rng.random()

        def build(num_words: int, num_dots: int = 0) -> Sample:
            counts = [int(num_words * rank**-_ALPHA / _ZETA) for rank in range(1, size + 1)]
            text = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
            text += [_DOTS] * num_dots
            random.Random(order).shuffle(text)
            return Sample(
                text=_FREQUENT_TEXT.format(context=" ".join(text)),
                answer_prefix=_FREQUENT_PREFIX,
                references=tuple(vocabulary[1 : 1 + _NUM_FREQUENT]),
                max_tokens=self.max_tokens,
            )

        num_words = fit(self.name, request, build, least=_LEAST_WORDS, tokens_a_unit=2)
        # A step of the count adds several words at once: noise fills the room that the next step would exceed.
        return build(num_words, fit(self.name, request, lambda dots: build(num_words, dots), tokens_a_unit=1))


def _common_text(words: list[str], frequencies: tuple[int, int], rng: random.Random) -> str:
    of_common, of_others = frequencies
    entries = words[:_NUM_COMMON] * of_common + words[_NUM_COMMON:] * of_others
    rng.shuffle(entries)
    return _COMMON_TEXT.format(context=_numbered(entries))


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def _distinct_words(rng: random.Random) -> Iterator[str]:
    """Yields all words in random order, and then endless pairs without the first `_UNPAIRED` words."""
    words = rng.sample(prose.WORDS, len(prose.WORDS))
    yield from words
    seen = {f"{a}-{n}" for a in prose.ADJECTIVES for n in prose.NOUNS if not {a, n}.isdisjoint(words[:_UNPAIRED])}
    while True:
        pair = f"{rng.choice(prose.ADJECTIVES)}-{rng.choice(prose.NOUNS)}"
        if pair not in seen:
            seen.add(pair)
            yield pair


def _coded_words(rng: random.Random) -> Iterator[str]:
    seen = set()
    while True:
        word = "".join(rng.choices(string.ascii_lowercase, k=_LETTERS))
        if word not in seen:
            seen.add(word)
            yield word
