"""Perplexity on natural text: by position, and of the last tokens when they are decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lserve_jax.config.errors import InputError
from lserve_jax.evaluation.corpus import Windows
from lserve_jax.evaluation.measurement import Item, Reference, by_position, decoding, mean, prompt_length
from lserve_jax.llm import LLM

NAME = "perplexity"


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The measurement of windows of ``length`` tokens.

    All positions go through prefill, which uses streaming heads. The last ``tail`` tokens also go through decode steps,
    which use page selection and the window for decoding too.

    Attributes:
      windows: the text.
      context: tokens of the model's context.
      tail: tokens that are also decoded.
    """

    windows: Windows
    context: int
    tail: int
    name: str = NAME

    def count(self, length: int) -> int:
        """Returns the number of windows of the text."""
        return self.windows.count(length)

    def make(self, length: int, index: int) -> Item:
        """Returns a window; raises InputError if it is too short for the tail or too long for the context."""
        prompt_length(self.name, length, 0, self.context)
        if length <= self.tail:
            raise InputError(f"{self.name} at length {length} needs more tokens than the {self.tail} of its tail")
        window = self.windows.get(length, index)
        return Item(
            task=self.name,
            length=length,
            index=index,
            prompt=window[: -self.tail],
            continuation=tuple(window[-self.tail :].tolist()),
            room=self.tail,
            record={"prompt_tokens": length, "text": self.windows.tokenizer.decode(window.tolist())},
        )

    def measure(self, llm: LLM, items: Sequence[Item], reference: Reference) -> list[dict[str, Any]]:
        """Returns negative log-likelihoods per token, in nats."""
        prompts, continuations = [item.prompt.tolist() for item in items], [item.continuation for item in items]
        tails = llm.score(prompts, continuations, has_logits=True)
        rows = []
        for item, tail in zip(items, tails, strict=True):
            nll = np.negative(llm.prompt_logprobs([*item.prompt.tolist(), *item.continuation]))
            rows.append(
                {
                    "nll": mean(nll),
                    "nll_by_position": by_position(nll),
                    "tail_nll": mean(np.negative(tail.logprobs)),
                    **decoding(tail.metrics),
                    **reference.compare(item, tail),
                }
            )
        return rows
