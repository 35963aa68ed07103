"""Variable tracking: RULER's chain of assignments (arXiv 2404.06654, table 2), and assignments without a chain."""

import dataclasses
import itertools
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass

from lserve_jax.evaluation.haystack import Hay, insert, noise, nominal_depth, sample_rng
from lserve_jax.evaluation.length import fit
from lserve_jax.evaluation.matching import string_match_all
from lserve_jax.evaluation.sample import Metric, Request, Sample

_CHAIN_TEXT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
_CHAIN_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are:"
)
_DIRECT_TEXT = (
    "Memorize the variable assignments hidden in the following text.\n\n{context}\n"
    "Question: What value is assigned to the variable {name} in the text above?"
)
_DIRECT_PREFIX = "Answer: According to the text above, VAR {name} ="
_EXAMPLE_LENGTH = 500
_EXAMPLE_LETTERS = 3
_LETTERS = 5
_DIRECT_LETTERS = 8
"""Longer names than RULER's, which the model distinguishes better."""


@dataclass(frozen=True, kw_only=True)
class VariableTracking:
    """RULER's task: a chain of variables in noise, after a worked example of about 500 tokens with shorter names.

    Attributes:
      num_hops: assignments from variable to variable; the chain has one more variable, which holds the value.
    """

    name: str = "vt"
    num_hops: int = 4
    metric: Metric = string_match_all
    max_tokens: int = 30

    def make(self, request: Request) -> Sample:
        """Returns a sample whose references are the chain's variables in order."""
        example_request = dataclasses.replace(request, length=_EXAMPLE_LENGTH)
        example = self._fill(example_request, "example", _EXAMPLE_LETTERS, "")
        shown = f"{example.text} {example.answer_prefix}{example.target}\n\n"
        return self._fill(request, "question", _LETTERS, shown)

    def _fill(self, request: Request, purpose: str, letters: int, before: str) -> Sample:
        rng = sample_rng(self.name, request, purpose)
        variables = list(itertools.islice(_names(rng, letters), self.num_hops + 1))
        value = str(rng.randrange(10000, 100000))
        chain = [f"VAR {variables[0]} = {value}"]
        chain += [f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(variables)]
        needles = list(zip(sorted(rng.random() for _ in chain), chain, strict=True))
        hay = Hay(noise(rng), "\n")

        def build(size: int) -> Sample:
            context = "\n".join(insert(hay.take(size), needles))
            return Sample(
                text=before + _CHAIN_TEXT.format(context=context, value=value),
                answer_prefix=_CHAIN_PREFIX.format(count=len(variables), value=value),
                references=tuple(variables),
                target=f" {' '.join(variables)}",
                max_tokens=self.max_tokens,
            )

        return build(fit(self.name, request, build))


@dataclass(frozen=True, kw_only=True)
class DirectAssignment:
    """Variables with different values in noise; the question asks for the value of one. There is no chain.

    The values differ in their first digit, so that a wrong variable is wrong from that digit on.

    Attributes:
      num_variables: hidden variables; a model of 135M parameters distinguishes two, but four only most of the time.
    """

    name: str = "vt_direct"
    num_variables: int = 2
    metric: Metric = string_match_all
    max_tokens: int = 30

    def make(self, request: Request) -> Sample:
        """Returns a sample that asks for the variable at the depth of the sample's index."""
        rng = sample_rng(self.name, request)
        variables = list(itertools.islice(_names(rng, _DIRECT_LETTERS), self.num_variables))
        values = [f"{digit}{rng.randrange(10000):04}" for digit in rng.sample(range(1, 10), self.num_variables)]
        depth = nominal_depth(request.index)
        depths = [depth, *(rng.random() for _ in variables[1:])]
        lines = [f"VAR {name} = {value}" for name, value in zip(variables, values, strict=True)]
        needles = list(zip(depths, lines, strict=True))
        hay = Hay(noise(rng), "\n")

        def build(size: int) -> Sample:
            context = "\n".join(insert(hay.take(size), needles))
            return Sample(
                text=_DIRECT_TEXT.format(context=context, name=variables[0]),
                answer_prefix=_DIRECT_PREFIX.format(name=variables[0]),
                references=(values[0],),
                target=f" {values[0]}",
                max_tokens=self.max_tokens,
                info={"depth": depth},
            )

        return build(fit(self.name, request, build))


def _names(rng: random.Random, letters: int) -> Iterator[str]:
    """Yields distinct random names in capitals."""
    seen = set()
    while True:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in seen:
            seen.add(name)
            yield name
