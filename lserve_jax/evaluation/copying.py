"""Copying: repeats a passage of a long text word by word, which shows small losses that needles hide."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from lserve_jax.evaluation.haystack import Hay, cut, nominal_depth, sample_rng
from lserve_jax.evaluation.length import fit
from lserve_jax.evaluation.matching import matching_start
from lserve_jax.evaluation.sample import Metric, Request, Sample

_TEXT = "{context}\n\nRepeat the passage of the text above that begins with these words, exactly as it stands: {start}"
_START = 100
"""Characters, less a part of a word, that identify the passage; the answer begins with them."""
_ROOM_A_TOKEN = 6
"""Characters of the passage per token, more than tokenizers have in prose."""


@dataclass(frozen=True, kw_only=True)
class Copying:
    """A passage that begins with a sentence; its first words begin the answer, and the words after them are the target.

    Attributes:
      num_tokens: tokens of the target, less a part of a word.
    """

    name: str = "copy"
    num_tokens: int = 128
    metric: Metric = matching_start

    @property
    def max_tokens(self) -> int:
        """Most tokens of an answer."""
        return self.num_tokens

    def make(self, request: Request) -> Sample:
        """Returns a sample whose passage is at the depth of its index."""
        hay = Hay(request.haystack(sample_rng(self.name, request, "haystack")))
        depth = nominal_depth(request.index)
        room = _START + self.num_tokens * _ROOM_A_TOKEN

        def build(size: int) -> Sample:
            sentences = hay.take(size)
            begins = accumulate((len(sentence) + len(hay.separator) for sentence in sentences[:-1]), initial=0)
            begin = min(begins, key=lambda begin: abs(begin - depth * (size - room)))
            context = hay.separator.join(sentences)
            start = cut(context[begin:], _START)
            target = self._target(context[begin + len(start) :], start, request)
            return Sample(
                text=_TEXT.format(context=context, start=start),
                answer_prefix=start,
                references=(target,),
                target=target,
                max_tokens=self.max_tokens,
                info={"depth": depth},
            )

        return build(fit(self.name, request, build, least=2 * room))

    def _target(self, text: str, start: str, request: Request) -> str:
        """Returns the first words of a text that have at most ``num_tokens`` tokens after the start of the passage."""

        def count(characters: int) -> int:
            return len(request.render("", start + text[:characters]))

        most = count(0) + self.num_tokens
        return cut(text, bisect_right(range(len(text) + 1), most, key=count) - 1)
