"""Metrics that look for expected strings in an answer; those of RULER ignore case (arXiv 2404.06654)."""

from itertools import takewhile


def string_match_all(answer: str, references: tuple[str, ...]) -> float:
    """Returns the share of the references that the answer contains, 0 … 1."""
    answer = answer.lower()
    return sum(reference.lower() in answer for reference in references) / len(references)


def string_match_part(answer: str, references: tuple[str, ...]) -> float:
    """Returns 1 if the answer contains at least one of the references, else 0."""
    answer = answer.lower()
    return float(any(reference.lower() in answer for reference in references))


def matching_start(answer: str, references: tuple[str, ...]) -> float:
    """Returns the share of the (only) reference's words that the answer repeats before its first different word."""
    (reference,) = references
    expected = reference.split()
    pairs = zip(expected, answer.split(), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) / len(expected)
