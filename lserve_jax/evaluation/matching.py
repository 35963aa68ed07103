"""Measures that look for expected strings in an answer; RULER's disregard case (arXiv 2404.06654)."""

from itertools import takewhile


def string_match_all(answer: str, references: tuple[str, ...]) -> float:
    """Returns the share of the references that stand in the answer, 0 … 1."""
    answer = answer.lower()
    return sum(reference.lower() in answer for reference in references) / len(references)


def string_match_part(answer: str, references: tuple[str, ...]) -> float:
    """Returns 1 where at least one of the references stands in the answer, else 0."""
    answer = answer.lower()
    return float(any(reference.lower() in answer for reference in references))


def matching_start(answer: str, references: tuple[str, ...]) -> float:
    """Returns which share of the words of the (only) reference the answer has before the first that is another."""
    (reference,) = references
    expected = reference.split()
    pairs = zip(expected, answer.split(), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) / len(expected)
