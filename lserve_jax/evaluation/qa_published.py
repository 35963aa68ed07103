"""The questions of SQuAD and HotpotQA as published, which RULER's qa_1 and qa_2 ask."""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lserve_jax.config.errors import InputError
from lserve_jax.evaluation.qa import Case, Cases


@dataclass(frozen=True, kw_only=True)
class _Question:
    """A question of a file: documents that answer it, related documents, and answers."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    near: tuple[str, ...] = ()


def read_squad(path: Path) -> Cases:
    """Returns the questions of SQuAD 2.0 that have answers; the first distractors are from the same article.

    Raises:
      InputError: if the file cannot be read, or is not what was published as dev-v2.0.json.
    """
    return _read(path, _squad, "dev-v2.0.json of SQuAD")


def read_hotpot(path: Path) -> Cases:
    """Returns the questions of HotpotQA, each with its ten documents.

    Raises:
      InputError: if the file cannot be read, or is not what was published as hotpot_dev_distractor_v1.json.
    """
    return _read(path, _hotpot, "hotpot_dev_distractor_v1.json of HotpotQA")


def _squad(data: Any) -> Iterator[_Question]:
    for article in data["data"]:
        contexts = dict.fromkeys(paragraph["context"] for paragraph in article["paragraphs"])
        for paragraph in article["paragraphs"]:
            here = paragraph["context"]
            for entry in paragraph["qas"]:
                if not entry["is_impossible"]:
                    yield _Question(
                        question=entry["question"],
                        answers=tuple(dict.fromkeys(answer["text"] for answer in entry["answers"])),
                        documents=(here,),
                        near=tuple(context for context in contexts if context != here),
                    )


def _hotpot(data: Any) -> Iterator[_Question]:
    for entry in data:
        documents = tuple(f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"])
        yield _Question(question=entry["question"], answers=(entry["answer"],), documents=documents)


def _read(path: Path, parse: Callable[[Any], Iterator[_Question]], what: str) -> Cases:
    try:
        questions = list(parse(json.loads(path.read_text(encoding="utf-8"))))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): {what} is wanted") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not {what}: {type(error).__name__}: {error}") from None
    if not questions or not all(one.answers for one in questions):
        raise InputError(f"{path} is not {what}: it must hold questions, and an answer for each")
    documents = sorted({document for one in questions for document in (*one.documents, *one.near)})

    def cases(rng: random.Random, index: int) -> Case:
        """Returns questions in the file's order, as RULER does; all other documents are distractors."""
        one = questions[index % len(questions)]
        used = {*one.documents, *one.near}
        others = [document for document in documents if document not in used]
        distractors = rng.sample(one.near, len(one.near)) + rng.sample(others, len(others))
        if not distractors:
            raise InputError(f"{path}: it has no document besides those of a question")
        return Case(
            question=one.question,
            answers=one.answers,
            documents=one.documents,
            distractors=itertools.cycle(distractors),
        )

    return cases
