"""Opens measurements by their names on a command line: tasks, perplexity and drift, with their texts and files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lserve_jax.config.errors import InputError
from lserve_jax.evaluation import drift, longbench, perplexity
from lserve_jax.evaluation.answers import Answers
from lserve_jax.evaluation.corpus import Windows, python_reference, read_texts
from lserve_jax.evaluation.haystack import PROSE, open_haystack
from lserve_jax.evaluation.measurement import Measurement
from lserve_jax.evaluation.rendering import chat_render, raw_render
from lserve_jax.evaluation.tasks import TASKS, get_task
from lserve_jax.text.tokenizer import Tokenizer

LONGBENCH = "longbench:"
NAMES = (*TASKS, perplexity.NAME, drift.NAME)
"""What can be measured, besides ``longbench:NAME``."""
_RAW = "--raw says that prompts are meant to have no chat format"


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Where prompts come from and how they are written; the "help" of a field says what it does."""

    seed: int = field(default=0, metadata={"help": "prompts are a function of it"})
    raw: bool = field(default=False, metadata={"help": "write prompts without the model's chat format"})
    word_lengths: bool = field(
        default=False, metadata={"help": "--lengths count words instead of tokens (tasks of RULER's kind)"}
    )
    haystack: str = field(
        default=PROSE,
        metadata={
            "help": "folder of texts to hide needles in",
            "metavar": "DIR",
            "default": "generated prose",
        },
    )
    longbench: str | None = field(
        default=None,
        metadata={"help": "folder of LongBench's *.jsonl", "metavar": "DIR", "default": "fetched from the hub"},
    )
    qa: str | None = field(
        default=None,
        metadata={
            "help": "folder with squad.json and hotpotqa.json for qa_1 and qa_2",
            "metavar": "DIR",
            "default": "invented questions",
        },
    )
    corpus: str | None = field(
        default=None,
        metadata={
            "help": "file or folder of text for perplexity and drift",
            "metavar": "PATH",
            "default": "the reference of the Python language",
        },
    )
    tail: int = field(default=128, metadata={"help": "perplexity: last tokens of a window, scored by decode steps"})
    drift_tokens: int = field(default=1024, metadata={"help": "drift: tokens to generate"})

    def __post_init__(self) -> None:
        for name, least in (("tail", 1), ("drift_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")


def measurement_names(text: str) -> list[str]:
    """Returns the names in a text such as ``copy,perplexity``, each once; raises InputError for an unknown one."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name.startswith(LONGBENCH) and name.removeprefix(LONGBENCH) not in longbench.NAMES:
            raise InputError(f"--tasks: {name!r} must be {LONGBENCH} with one of {', '.join(longbench.NAMES)}")
        if not name.startswith(LONGBENCH) and name not in NAMES:
            raise InputError(f"--tasks: {name!r} must be one of {', '.join(NAMES)} or {LONGBENCH}NAME")
    return names


def open_measurements(
    names: Sequence[str], settings: PromptSettings, tokenizer: Tokenizer, context: int
) -> list[Measurement]:
    """Returns the measurements with these names, in order.

    Args:
      names: see `measurement_names`.
      settings: settings of the prompts.
      tokenizer: the model's.
      context: tokens of the model's context.

    Raises:
      InputError: for a file or folder that is missing or cannot be read.
    """
    corpus = python_reference() if settings.corpus is None else read_texts(settings.corpus)
    windows = Windows(corpus, tokenizer, settings.seed)
    haystack = open_haystack(settings.haystack)
    qa_folder = Path(settings.qa) if settings.qa else None

    def answers(task: Any, *, is_raw: bool, **fields: Any) -> Answers:
        is_chat = not is_raw and tokenizer.decide_chat_format(_RAW)
        render = chat_render(tokenizer) if is_chat else raw_render(tokenizer)
        common = {"tokenizer": tokenizer, "context": context, "seed": settings.seed, "haystack": haystack}
        return Answers(task=task, render=render, **common, **fields)

    def open_one(name: str) -> Measurement:
        if name == perplexity.NAME:
            return perplexity.Perplexity(windows=windows, context=context, tail=settings.tail)
        if name == drift.NAME:
            return drift.Drift(windows=windows, context=context, tokens=settings.drift_tokens)
        if name.startswith(LONGBENCH):
            task = longbench.open_task(name.removeprefix(LONGBENCH), settings.longbench, tokenizer)
            is_raw = settings.raw or not task.use_chat_format
            return answers(task, name=name, is_raw=is_raw, samples=len(task))
        task = get_task(name, qa_folder)
        return answers(task, name=name, is_raw=settings.raw, has_word_lengths=settings.word_lengths)

    return [open_one(name) for name in names]
