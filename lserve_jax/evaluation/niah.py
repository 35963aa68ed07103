"""Needles in a haystack: RULER's eight variants (arXiv 2404.06654, table 2)."""

import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from lserve_jax.evaluation.haystack import Hay, Lazy, insert, noise, nominal_depth, sample_rng
from lserve_jax.evaluation.length import fit
from lserve_jax.evaluation.matching import string_match_all
from lserve_jax.evaluation.sample import Metric, Request, Sample
from lserve_jax.text import prose

_NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
_ONE_TEXT = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?"
)
_ONE_PREFIX = "The special magic {kind} for {query} mentioned in the provided text is"
_SEVERAL_TEXT = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind}s afterwards.\n{context}\n"
    "What are all the special magic {kind}s for {query} mentioned in the provided text?"
)
_SEVERAL_PREFIX = "The special magic {kind}s for {query} mentioned in the provided text are"
_DRAW: dict[str, Callable[[random.Random], str]] = {
    "number": lambda rng: str(rng.randrange(10**6, 10**7)),
    "word": lambda rng: f"{rng.choice(prose.ADJECTIVES)}-{rng.choice(prose.NOUNS)}",
    "uuid": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
}


@dataclass(frozen=True, kw_only=True)
class Niah:
    """A variant.

    Attributes:
      name: the task's name.
      haystack: RULER's noise, prose (RULER: essays), or needles with other keys.
      key: kind of key.
      value: kind of value.
      num_keys: hidden keys, each with ``num_values`` needles.
      num_values: values per key.
      num_queries: keys that the question asks for.
    """

    name: str
    haystack: Literal["noise", "prose", "needles"] = "prose"
    key: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    metric: Metric = string_match_all
    max_tokens: int = 128

    def make(self, request: Request) -> Sample:
        """Returns a sample. If there is one answer, its needle is at the depth of the sample's index."""
        rng = sample_rng(self.name, request)
        pairs = self._pairs(rng)
        keys = [next(pairs)[0] for _ in range(self.num_keys)]
        values = {key: [next(pairs)[1] for _ in range(self.num_values)] for key in keys}
        queries = rng.sample(keys, self.num_queries)
        answers = [value for key in queries for value in values[key]]
        depth = nominal_depth(request.index) if len(answers) == 1 else None
        needles = [(rng.random(), self._needle(key, value)) for key in keys for value in values[key]]
        if depth is not None:
            needles[keys.index(queries[0])] = (depth, self._needle(queries[0], answers[0]))

        def build(pieces: list[str], separator: str, rest: str = "") -> Sample:
            context = separator.join(insert(pieces, needles)) + rest
            return self._sample(context, queries, answers, depth)

        if self.haystack == "needles":
            return self._fill_with_needles(request, pairs, build)
        stream = noise if self.haystack == "noise" else request.haystack
        hay = Hay(stream(sample_rng(self.name, request, "haystack")), "\n" if self.haystack == "noise" else " ")
        size = fit(self.name, request, lambda size: build(hay.take(size), hay.separator))
        return build(hay.take(size), hay.separator)

    def _fill_with_needles(
        self,
        request: Request,
        pairs: Iterator[tuple[str, str]],
        build: Callable[[list[str], str, str], Sample],
    ) -> Sample:
        """Returns a sample of whole needles; noise fills the rest, which is less than a needle."""
        lines = Lazy(self._needle(key, value) for key, value in pairs)
        count = fit(self.name, request, lambda count: build(lines.take(count), "\n", ""), tokens_a_unit=40)
        hay = Hay(noise(random.Random()), "\n")

        def padded(size: int) -> Sample:
            padding = "\n".join(hay.take(size))
            return build(lines.take(count), "\n", f"\n{padding}" if padding else "")

        return padded(fit(self.name, request, padded))

    def _pairs(self, rng: random.Random) -> Iterator[tuple[str, str]]:
        """Yields distinct keys and distinct values."""
        used = set()
        while True:
            pair = (_DRAW[self.key](rng), _DRAW[self.value](rng))
            if used.isdisjoint(pair):
                used.update(pair)
                yield pair

    def _needle(self, key: str, value: str) -> str:
        return _NEEDLE.format(kind=self.value, key=key, value=value)

    def _sample(self, context: str, queries: list[str], answers: list[str], depth: float | None) -> Sample:
        is_one = len(answers) == 1
        text, answer_prefix = (_ONE_TEXT, _ONE_PREFIX) if is_one else (_SEVERAL_TEXT, _SEVERAL_PREFIX)
        query = _join(queries)
        return Sample(
            text=text.format(kind=self.value, context=context, query=query),
            answer_prefix=answer_prefix.format(kind=self.value, query=query),
            references=tuple(answers),
            target=f" {_join(answers)}.",
            max_tokens=self.max_tokens,
            info={} if depth is None else {"depth": depth},
        )


def _join(words: list[str]) -> str:
    return f"{', '.join(words[:-1])}, and {words[-1]}" if len(words) > 1 else words[0]


NIAH = (
    Niah(name="niah_single_1", haystack="noise"),
    Niah(name="niah_single_2"),
    Niah(name="niah_single_3", value="uuid"),
    Niah(name="niah_multikey_1", num_keys=4),
    Niah(name="niah_multikey_2", haystack="needles"),
    Niah(name="niah_multikey_3", haystack="needles", key="uuid", value="uuid"),
    Niah(name="niah_multivalue", num_values=4),
    Niah(name="niah_multiquery", num_keys=4, num_queries=4),
)
