"""What results were measured on: digests of the checkpoint, the tokenizer, the head pattern and this package."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lserve_jax
import pallas_kernels
from lserve_jax.config.digest import json_digest
from lserve_jax.config.errors import InputError
from lserve_jax.config.heads import HeadPattern
from lserve_jax.text.folder import tokenizer_files
from lserve_jax.text.tokenizer import TokenizerSource
from lserve_jax.weights.digest import content_digest
from lserve_jax.weights.load import Checkpoint
from lserve_jax.weights.smoothing import Smoothing

type Origin = dict[str, str | None]
"""Digests by name: "checkpoint", "tokenizer", "pattern" and "smoothing" (None if the model has none), "source"."""

SOURCE = "source"
NAMED_BY = {"model": "checkpoint", "tokenizer": "tokenizer", "head_pattern": "pattern"}
"""Settings that name something by a path, and the digest of what they name: where that is known, the path is free."""
_WORDS = {
    "checkpoint": "checkpoint",
    "tokenizer": "tokenizer",
    "pattern": "head pattern",
    "smoothing": "set of smoothing factors",
}


def origin_of(
    checkpoint: Checkpoint, tokenizer: TokenizerSource, pattern: HeadPattern | None, smoothing: Smoothing | None
) -> Origin:
    """Returns what the results of a run are measured on.

    Args:
      checkpoint: the model.
      tokenizer: the folder, or the metadata of the GGUF file, that the tokenizer is read from.
      pattern: of variants that name none.
      smoothing: the factors of variants that name no pattern.
    """
    return {
        "checkpoint": checkpoint.digest,
        "tokenizer": _tokenizer_digest(tokenizer),
        "pattern": None if pattern is None else pattern.digest,
        "smoothing": None if smoothing is None else smoothing.digest,
        SOURCE: source_digest(),
    }


def source_digest() -> str:
    """Returns 16 hexadecimal digits that stand for the Python files of this package and of its kernels."""
    folders = [Path(path) for package in (lserve_jax, pallas_kernels) for path in package.__path__]
    return content_digest(path for folder in folders for path in sorted(folder.rglob("*.py")))


def _tokenizer_digest(source: TokenizerSource) -> str | None:
    if isinstance(source, Path):
        return content_digest(tokenizer_files(source))
    if source is None:
        return None
    own = {name: value for name, value in source.items() if name.startswith("tokenizer.")}
    return json_digest(own)


def compare_origins(rows: Iterable[Mapping[str, Any]], now: Mapping[str, Any], where: str) -> list[str]:
    """Returns remarks, one line each, about results that an earlier run stored.

    Results of other sources are kept: most changes of a program change no result, and one that fixes an error is worth
    a remark.

    Args:
      rows: the results.
      now: what this run measures on.
      where: the file's name, for messages.

    Raises:
      InputError: if a result was measured on another checkpoint, tokenizer, head pattern or smoothing.
    """
    without, others = 0, set()
    for row in rows:
        found = row.get("measured_on")
        if not isinstance(found, Mapping):
            without += 1
            continue
        for name, word in _WORDS.items():
            if name in now and name in found and found[name] != now[name]:
                raise InputError(
                    f"{where} was measured on another {word} ({name} {found[name]}, now {now[name]}): "
                    f"name another --out, or take the same {word}"
                )
        if SOURCE in now and found.get(SOURCE) != now[SOURCE]:
            others.add(found.get(SOURCE))
    remarks = []
    if without:
        remarks.append(
            f"{where}: {without} results do not say which checkpoint and head pattern they were measured on, "
            "because an earlier version wrote them: only names were compared"
        )
    if others:
        remarks.append(f"{where}: other sources of this package measured some of the results; a new --out has none")
    return remarks
