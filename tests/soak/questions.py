"""What is asked in a soak: few enough different questions that each can be answered alone as well."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lserve_jax import LLM, SamplingParams

WORDS = ("the", "world", "hello", "of", "and", "read", "water", "order")
VOCABULARY = range(5, 128)
CONTEXT, LONGEST = 220, 170
"""Tokens of prompt and answer together, and of a prompt."""

type Choice = tuple[str, str, tuple[float, ...] | None]
"""Text, why it ended, and the log-probabilities of its tokens if they are asked for."""


@dataclass(frozen=True)
class Question:
    """A prompt and settings of which the answer follows.

    Attributes:
      prompt: a text, token ids, or messages.
      params: fields of `SamplingParams` that have the same name in a request.
      top: likeliest tokens beside each; None if no log-probabilities are asked for.
      n: answers.
      has_prompt_scores: whether the log-probabilities of the prompt are asked for, which streams do not have.
    """

    prompt: Any
    params: Mapping[str, Any] = field(default_factory=dict)
    top: int | None = None
    n: int = 1
    has_prompt_scores: bool = False

    @property
    def is_chat(self) -> bool:
        """Returns whether the prompt is a conversation."""
        return isinstance(self.prompt, list) and isinstance(self.prompt[0], dict)

    @property
    def path(self) -> str:
        """Returns the route."""
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    @property
    def body(self) -> dict[str, Any]:
        """Returns the body of a request."""
        found = {**self.params, "n": self.n}
        if self.has_prompt_scores:
            found["prompt_logprobs"] = 1
        if not self.is_chat:
            return found | {"prompt": self.prompt} | ({} if self.top is None else {"logprobs": self.top})
        return found | {"messages": self.prompt, "logprobs": self.top is not None, "top_logprobs": self.top}

    def alone(self, llm: LLM) -> tuple[Choice, ...]:
        """Returns the answers of a model that does nothing else, and remembers nothing."""
        prompt = llm.render_chat(self.prompt) if self.is_chat else self.prompt
        found = []
        for index in range(self.n):
            seed = {"seed": self.params["seed"] + index} if "seed" in self.params else {}
            params = SamplingParams(
                **{**self.params, **seed},
                logprobs=self.top is not None,
                top_logprobs=self.top or 0,
                prompt_logprobs=self.has_prompt_scores,
            )
            (output,) = llm.generate([prompt], params)
            found.append((output.text, output.finish_reason, output.logprobs))
        return tuple(found)


def random_questions(rng: random.Random, count: int) -> list[Question]:
    """Returns questions of any length, many of which begin as others do."""
    documents = [rng.choices(VOCABULARY, k=LONGEST) for _ in range(4)]
    return [_question(rng, documents) for _ in range(count)]


def _question(rng: random.Random, documents: list[list[int]]) -> Question:
    prompt, params = _prompt(rng, documents), _params(rng)
    if rng.random() < 0.2 and not isinstance(prompt[0], dict | str):
        params["max_tokens"] = min(120, CONTEXT - len(prompt))  # it grows until others have to leave
    return Question(
        prompt=prompt,
        params=params,
        top=rng.choice([None, None, None, 0, 2]),
        n=rng.choice([1, 1, 1, 1, 2, 3]),
        has_prompt_scores=rng.random() < 0.05,
    )


def _prompt(rng: random.Random, documents: list[list[int]]) -> Any:
    kind = rng.randrange(6)
    if kind == 0:
        return " ".join(rng.choices(WORDS, k=rng.randrange(1, 20)))
    if kind == 1:
        turns = rng.choice([1, 1, 3])
        roles = ["user", "assistant", "user"][:turns]
        return [{"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randrange(1, 6)))} for role in roles]
    if kind == 2:
        return rng.choices(VOCABULARY, k=rng.randrange(1, LONGEST))
    document = rng.choice(documents)
    own = rng.choices(VOCABULARY, k=rng.randrange(1, 30))
    return document[: rng.choice([40, 64, 72, 128, 140])] + own


def _params(rng: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 5, 12, 30, 48]), "ignore_eos": rng.random() < 0.7}
    if rng.random() < 0.4:
        found |= {"temperature": rng.choice([0.5, 1.0, 2.0]), "seed": rng.randrange(2**31)}
        found |= rng.choice([{}, {"top_p": 0.8}, {"top_k": 10}, {"min_p": 0.05}])
    if rng.random() < 0.3:
        found |= rng.choice(
            [
                {"stop": rng.choice(["e", "th", ["a", "o"]])},
                {"presence_penalty": 1.0, "frequency_penalty": 0.5},
                {"repetition_penalty": 1.3},
                {"logit_bias": {7: 3.0, 9: -5.0}},
                {"bad_words": ["he"], "suppress_tokens": [11, 12]},
                {"stop_token_ids": list(range(5, 40)), "min_tokens": 1},
            ]
        )
    return found


def choices_of(question: Question, parts: Iterable[Mapping[str, Any]]) -> tuple[Choice, ...]:
    """Returns the answers in the chunks of a stream, or in one whole response."""
    texts, reasons, logprobs = ["" for _ in range(question.n)], [""] * question.n, [[] for _ in range(question.n)]
    for part in parts:
        for choice in part["choices"]:
            index = choice["index"]
            message = choice.get("message") or choice.get("delta") or {}
            texts[index] += (message.get("content") or "") if question.is_chat else choice["text"]
            reasons[index] = choice["finish_reason"] or reasons[index]
            if (found := choice["logprobs"]) is not None:
                values = [one["logprob"] for one in found["content"]] if question.is_chat else found["token_logprobs"]
                logprobs[index] += values
    return tuple(
        (text, reason, None if question.top is None else tuple(values))
        for text, reason, values in zip(texts, reasons, logprobs, strict=True)
    )
