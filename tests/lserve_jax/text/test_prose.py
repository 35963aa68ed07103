"""The prose is varied, grammatical as far as a test can see, the same for a seed, and free of what needles hold."""

import itertools
import random
import re
from collections import Counter

import pytest

from lserve_jax.text import prose

NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen twenty thirty fifty hundred thousand "
    "million dozen first second third fourth fifth tenth once twice zero single double"
)
NEEDLES = "magic number special uuid var passkey value"


def words_of(seed: int, count: int) -> list[str]:
    """Sentences with at least so many words."""
    chosen = []
    for sentence in prose.sentences(random.Random(seed)):
        chosen.append(sentence)
        count -= len(sentence.split())
        if count <= 0:
            return chosen
    raise AssertionError("the stream ended")


@pytest.mark.parametrize("seed", range(5))
def test_hardly_a_sentence_repeats_in_8k_words(seed: int) -> None:
    sentences = words_of(seed, 8000)
    assert 1 - len(set(sentences)) / len(sentences) < 0.02
    # Nor do long runs of words: a passage of 12 words is known by itself.
    words = " ".join(sentences).split()
    runs = Counter(zip(*(words[i:] for i in range(12)), strict=False))
    assert sum(count - 1 for count in runs.values()) / len(words) < 0.02


def test_prose_holds_no_digits_number_words_or_words_of_needles() -> None:
    text = " ".join(words_of(1, 40_000)).lower()
    assert not re.search(r"\d", text)
    found = set(re.findall(r"[a-z]+", text)) & set(f"{NUMBERS} {NEEDLES}".split())
    assert not found


def test_sentences_are_whole() -> None:
    for sentence in words_of(2, 20_000):
        assert re.fullmatch(r'"?[A-Z].*[.?!]"?', sentence), sentence
        assert not re.search(r"[{}|_]|  |\ba [aeiou]", sentence), sentence
        assert sentence.count('"') % 2 == 0, sentence
        assert 4 <= len(sentence.split()) <= 60, sentence


def test_a_paragraph_stays_with_its_person() -> None:
    counts = []
    for paragraph in itertools.islice(prose.paragraphs(random.Random(3)), 100):
        names = Counter(re.findall(r"\b[A-Z][a-z]+\b", " ".join(paragraph)))
        counts.append(names.most_common(1)[0][1])
    assert sum(count >= 2 for count in counts) >= 95
    assert sum(counts) / len(counts) >= 3


def test_the_same_seed_gives_the_same_text() -> None:
    assert words_of(4, 500) == words_of(4, 500)
    assert words_of(4, 500) != words_of(5, 500)
    flat = itertools.chain.from_iterable(prose.paragraphs(random.Random(4)))
    assert list(itertools.islice(flat, 30)) == list(itertools.islice(prose.sentences(random.Random(4)), 30))


@pytest.mark.parametrize(("words", "least"), [(prose.NOUNS, 500), (prose.ADJECTIVES, 300), (prose.VERBS, 300)])
def test_word_lists_hold_distinct_lower_case_words(words: tuple[str, ...], least: int) -> None:
    assert len(words) == len(set(words)) >= least
    assert all(re.fullmatch("[a-z]+", word) for word in words)
    assert not set(words) & set(f"{NUMBERS} {NEEDLES}".split())
    assert set(words) <= set(prose.WORDS)
    assert len(set(prose.WORDS)) == len(prose.WORDS)
