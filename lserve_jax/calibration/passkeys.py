"""DuoAttention's training data (arXiv 2410.10819): passkeys hidden in long prose, all asked for at the end."""

import random
from dataclasses import dataclass

import numpy as np

from lserve_jax.calibration.prompts import Task, prose_lines
from lserve_jax.calibration.two_streams import BLOCK, Example
from lserve_jax.config.errors import InputError
from lserve_jax.text.prose import sentences
from lserve_jax.text.tokenizer import Tokenizer

ALPHABET = (
    *("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima"),
    *("mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey"),
    *("xray", "yankee", "zulu"),
)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_LENGTHS = 50


@dataclass(frozen=True, kw_only=True)
class Passkeys:
    """An endless set of examples; each is a function of the seed and its number.

    Attributes:
      tokenizer: the model's.
      min_length: tokens of the shortest sequences, passkeys and questions included.
      max_length: tokens of the longest sequences; lengths are drawn from 50 evenly spaced ones.
      seed: seed of all random draws.
      num_passkeys: 1 to 10.
      num_words: words per passkey.

    Raises:
      InputError: if the shortest sequences have no room for the passkeys.
    """

    tokenizer: Tokenizer
    min_length: int
    max_length: int
    seed: int
    num_passkeys: int = len(ORDINALS)
    num_words: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.num_passkeys <= len(ORDINALS):
            raise InputError(f"num_passkeys={self.num_passkeys} must be from 1 to {len(ORDINALS)}")
        if self.min_length > self.max_length:
            raise InputError(f"min_length={self.min_length} must be at most max_length={self.max_length}")
        for step in range(10):  # passkeys differ a little in tokens: a few show how long they may become
            self._tokens(random.Random(f"{self.seed} {step}"), self.min_length)

    def make(self, step: int) -> Example:
        """Returns the example of a training step, padded to a power of two of blocks to have few compiled programs."""
        rng = random.Random(f"{self.seed} {step}")
        lengths = np.linspace(self.min_length, self.max_length, _LENGTHS).astype(int)
        ids, is_labelled = self._tokens(rng, int(rng.choice(lengths)))
        size = BLOCK
        while size < len(ids):
            size *= 2
        tokens, labels = np.zeros(size, np.int32), np.zeros(size, bool)
        tokens[: len(ids)], labels[: len(ids)] = ids, is_labelled
        return Example(tokens, labels)

    def _tokens(self, rng: random.Random, length: int) -> tuple[list[int], list[bool]]:
        keys = [" ".join(rng.choices(ALPHABET, k=self.num_words)) for _ in range(self.num_passkeys)]
        ids, is_labelled = [], []
        for ordinal, key in zip(ORDINALS, keys, strict=False):
            for text, is_answer in ((f"\n\nWhat is the {ordinal} passkey?\n", False), (f"{key}.", True)):
                ids += self.tokenizer.encode(text, add_special_tokens=False)
                is_labelled += [is_answer] * (len(ids) - len(is_labelled))
        hidden = Task(
            passages=tuple(f"The {ordinal} passkey is {key}." for ordinal, key in zip(ORDINALS, keys, strict=False)),
            depths=tuple(sorted(rng.uniform(0.0, 0.95) for _ in keys)),
            question="Answer from what stands above.",
            answer=(),
        )
        room = length - len(ids)
        least = len(self.tokenizer.encode(hidden.compose([])[0]))
        if room < least:
            raise InputError(
                f"min_length={length} has no room for {self.num_passkeys} passkeys of {self.num_words} words and as "
                f"many questions: it must be at least about {1.05 * (least + len(ids)):.0f} tokens, or fewer passkeys"
            )
        lines = prose_lines(self.tokenizer, sentences(rng), room - least)
        while len(text := self.tokenizer.encode(hidden.compose(lines)[0])) > room and lines:
            lines.pop()
        return [*text, *ids], [*(False for _ in text), *is_labelled]
