"""Tasks with right answers: how good the model's answer is, and how likely the model finds the right one."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lserve_jax.config.sampling import SamplingParams
from lserve_jax.evaluation.matching import matching_start
from lserve_jax.evaluation.measurement import Item, Reference, decoding, mean, prompt_length
from lserve_jax.evaluation.rendering import word_render
from lserve_jax.evaluation.sample import Render, Request, Sample, Task
from lserve_jax.llm import LLM
from lserve_jax.text.tokenizer import Tokenizer

_VALUES = ("score", "nll", "token_accuracy", "pages_read_ratio", "attention_recall", "answer")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The measurement of a task.

    Attributes:
      name: the task's name on the command line.
      task: the task.
      tokenizer: the model's.
      render: how a prompt becomes tokens.
      context: tokens of the model's context.
      seed: seed of the run.
      haystack: see `Request`.
      samples: number of samples that the task has; None if unlimited.
      has_word_lengths: whether lengths count words.
    """

    name: str
    task: Task
    tokenizer: Tokenizer
    render: Render
    context: int
    seed: int
    haystack: Callable[[random.Random], Any]
    samples: int | None = None
    has_word_lengths: bool = False

    def count(self, length: int) -> int | None:
        """Returns the number of samples, or None if unlimited."""
        del length
        return self.samples

    def make(self, length: int, index: int) -> Item:
        """Returns a sample as a prompt, slightly shorter than asked for if its answer needs room in the context.

        Raises:
          InputError: if it would have to be clearly shorter, or the task does not fit into the length.
        """
        item = self._make(length, length, index)
        if self.has_word_lengths:
            prompt_length(self.name, len(item.prompt), item.room, self.context)
            return item
        tokens = prompt_length(self.name, length, item.room, self.context)
        return item if tokens == length else self._make(tokens, length, index)

    def _make(self, tokens: int, length: int, index: int) -> Item:
        render = word_render if self.has_word_lengths else self.render
        request = Request(length=tokens, index=index, seed=self.seed, render=render, haystack=self.haystack)
        sample = self.task.make(request)
        prompt = self.render(sample.text, sample.answer_prefix)
        target = self._target(sample, prompt)
        return Item(
            task=self.name,
            length=length,
            index=index,
            prompt=np.asarray(prompt, np.int32),
            continuation=target,
            room=max(sample.max_tokens, len(target)),
            record={"prompt_tokens": len(prompt), **vars(sample)},
            sample=sample,
        )

    def _target(self, sample: Sample, prompt: list[int]) -> tuple[int, ...]:
        """Returns the tokens of the target after the prompt."""
        if not sample.target:
            return ()
        whole = self.render(sample.text, sample.answer_prefix + sample.target)
        if whole[: len(prompt)] == prompt:
            return tuple(whole[len(prompt) :])
        # The prompt's end and the target's beginning would share a token, but the prompt's tokens are fixed.
        return tuple(self.tokenizer.encode(sample.target, add_special_tokens=False))

    def measure(self, llm: LLM, items: Sequence[Item], reference: Reference) -> list[dict[str, Any]]:
        """Returns score, answer, and the model's likelihood of the target."""
        rows: list[dict[str, Any]] = [dict.fromkeys(_VALUES) for _ in items]
        pairs = list(zip(items, rows, strict=True))
        self._score(llm, [(item, row) for item, row in pairs if item.continuation], reference)
        _answer(llm, [(item, row) for item, row in pairs if row["answer"] is None])
        for item, row in pairs:
            sample = _sample(item)
            row.update(score=float(self.task.metric(row["answer"], sample.references)), info=sample.info)
        return rows

    def _score(self, llm: LLM, pairs: Sequence[tuple[Item, dict[str, Any]]], reference: Reference) -> None:
        """Adds the model's likelihood of targets, and the answer if that determines it.

        Scoring feeds the target's tokens through the decode steps, greedy decoding feeds the tokens that it chooses.
        Both agree up to the first chosen token that differs from the target's. So if none differs, or if the metric
        ends at the first wrong word, the generation is skipped, since a prompt costs far more than its answer. Text
        after the target is ignored. A right word that begins with another token than the target's counts as wrong.
        """
        prompts, targets = [item.prompt.tolist() for item, _ in pairs], [item.continuation for item, _ in pairs]
        outputs = llm.score(prompts, targets, has_logits=True)
        for (item, row), output in zip(pairs, outputs, strict=True):
            hits = np.equal(output.token_ids, output.greedy_token_ids)
            row.update(nll=mean(np.negative(output.logprobs)), token_accuracy=mean(hits), **decoding(output.metrics))
            row.update(reference.compare(item, output))
            sample = _sample(item)
            if output.is_greedy and len(item.continuation) <= sample.max_tokens:
                row["answer"] = sample.target
            elif self.task.metric is matching_start:
                end = len(hits) if hits.all() else int(np.argmin(hits)) + 1
                row["answer"] = self.tokenizer.decode(list(output.greedy_token_ids[: min(end, sample.max_tokens)]))


def _sample(item: Item) -> Sample:
    assert item.sample is not None
    return item.sample


def _answer(llm: LLM, pairs: Sequence[tuple[Item, dict[str, Any]]]) -> None:
    """Adds greedy answers."""
    samples = [_sample(item) for item, _ in pairs]
    params = [SamplingParams(max_tokens=sample.max_tokens, stop=sample.stop) for sample in samples]
    outputs = llm.generate([item.prompt.tolist() for item, _ in pairs], params)
    for (item, row), output in zip(pairs, outputs, strict=True):
        row["answer"] = output.text
        if not item.continuation:
            row.update(decoding(output.metrics))
