"""Questions about documents, most of which are irrelevant: RULER's qa_1 (one hop) and qa_2 (two hops).

The documents come from `qa_invented` or `qa_published`.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lserve_jax.evaluation.haystack import Hay, sample_rng
from lserve_jax.evaluation.length import fit
from lserve_jax.evaluation.matching import string_match_part
from lserve_jax.evaluation.sample import Metric, Request, Sample

_TEXT = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {question}"
)
_PREFIX = "Answer:"
_SEPARATOR = "\n\n"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A question.

    Attributes:
      question: the text of the question.
      answers: right answers.
      documents: documents with the facts that the answer needs.
      distractors: endless documents without those facts.
    """

    question: str
    answers: tuple[str, ...]
    documents: Sequence[str]
    distractors: Iterator[str]


type Cases = Callable[[random.Random, int], Case]
"""Random numbers and the index of a sample → its question."""


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering:
    """Numbered documents in random order, some of them with the answer; one distractor may be cut."""

    name: str
    cases: Cases
    metric: Metric = string_match_part
    max_tokens: int = 32

    def make(self, request: Request) -> Sample:
        """Returns a sample whose references are all right answers."""
        rng = sample_rng(self.name, request)
        case = self.cases(rng, request.index)
        order = sample_rng(self.name, request, "order").random()
        hay = Hay(case.distractors, _SEPARATOR)

        def build(size: int) -> Sample:
            documents = [*case.documents, *hay.take(size)]
            random.Random(order).shuffle(documents)
            numbered = [f"Document {number}:\n{document}" for number, document in enumerate(documents, start=1)]
            return Sample(
                text=_TEXT.format(context=_SEPARATOR.join(numbered), question=case.question),
                answer_prefix=_PREFIX,
                references=case.answers,
                target=f" {case.answers[0]}",
                max_tokens=self.max_tokens,
            )

        return build(fit(self.name, request, build))
