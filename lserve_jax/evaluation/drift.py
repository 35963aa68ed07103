"""Drift: how far a variant departs from the reference over a long generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lserve_jax.config.sampling import SamplingParams
from lserve_jax.evaluation.corpus import Windows
from lserve_jax.evaluation.measurement import Item, Reference, by_position, decoding, mean, prompt_length
from lserve_jax.llm import LLM

NAME = "drift"


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The measurement of prompts of ``length`` tokens.

    The reference continues each prompt greedily. The other variants score its text: two free generations cannot be
    compared after their first different token, but a forced one shows at every token whether the variant agrees.

    Attributes:
      windows: the text of the prompts.
      context: tokens of the model's context.
      tokens: number of generated tokens.
    """

    windows: Windows
    context: int
    tokens: int
    name: str = NAME

    def count(self, length: int) -> int:
        """Returns the number of prompts that the text has."""
        return self.windows.count(length)

    def make(self, length: int, index: int) -> Item:
        """Returns a prompt, slightly shorter than asked for if the generation needs room in the context."""
        prompt = self.windows.get(length, index)[: prompt_length(self.name, length, self.tokens, self.context)]
        return Item(
            task=self.name,
            length=length,
            index=index,
            prompt=prompt,
            continuation=(),
            room=self.tokens,
            record={"prompt_tokens": len(prompt), "text": self.windows.tokenizer.decode(prompt.tolist())},
        )

    def measure(self, llm: LLM, items: Sequence[Item], reference: Reference) -> list[dict[str, Any]]:
        """Returns agreement with the reference's greedy tokens, and the negative log-likelihood of its text."""
        prompts = [item.prompt.tolist() for item in items]
        led_by = [reference.row(item) for item in items]
        if any(row is None for row in led_by):
            params = SamplingParams(max_tokens=self.tokens, ignore_eos=True, logprobs=True)
            return [
                {
                    **_values(output.logprobs or (), np.ones(len(output.token_ids))),
                    **decoding(output.metrics),
                    "answer": output.text,
                    "token_ids": list(output.token_ids),
                }
                for output in llm.generate(prompts, params)
            ]
        outputs = llm.score(prompts, [row["token_ids"] for row in led_by if row])
        return [
            {
                **_values(output.logprobs, np.equal(output.token_ids, output.greedy_token_ids)),
                **decoding(output.metrics),
            }
            for output in outputs
        ]


def _values(logprobs: Sequence[float], agrees: np.ndarray) -> dict[str, Any]:
    nll = np.negative(logprobs)
    return {
        "agreement": mean(agrees),
        "nll": mean(nll),
        "agreement_by_position": by_position(agrees),
        "nll_by_position": by_position(nll),
    }
