"""What variants are compared with: the reference's rows, and files of its distributions, which later runs need too."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lserve_jax.config.errors import InputError
from lserve_jax.engine.outputs import ScoreOutput
from lserve_jax.evaluation.divergence import LIKELIEST, Distributions
from lserve_jax.evaluation.measurement import Item, Row, mean
from lserve_jax.evaluation.store import PromptKey, Store

FOLDER = "reference"
"""The folder of the distributions, in that of the run: a file per prompt."""
_WITHOUT = "delete it to go on without this prompt's kl, or name another --out"


@dataclass(frozen=True, kw_only=True)
class StoredReference:
    """The reference variant's results in the folder of a run.

    Attributes:
      store: the rows, and the folder.
      label: the label of the reference variant.
      is_measured: whether the reference itself is being measured.
    """

    store: Store
    label: str
    is_measured: bool

    def row(self, item: Item) -> Row | None:
        """Returns the reference's row; None while the reference itself is measured."""
        return None if self.is_measured else self.store.rows[*item.key, self.label]

    def compare(self, item: Item, score: ScoreOutput) -> Mapping[str, float]:
        """Returns how far the distributions of decoded tokens are from the reference's.

        While the reference itself is measured, this keeps its distributions and returns nothing. It returns nothing
        either if they were not kept, see `runner.without_distributions`.

        Args:
          item: the prompt.
          score: the scores of its continuation, with logits.

        Returns:
          ``kl``: the mean of `Distributions.divergences`, in nats; ``same_token``: the share of tokens at whose place
          both find the same token likeliest.

        Raises:
          InputError: if the file is damaged, or is of other tokens.
        """
        assert score.logits is not None
        path = _path(self.store.folder, item.key)
        if self.is_measured:
            _write(path, Distributions.of(score.logits))
        if self.is_measured or not path.exists():
            return {}
        reference = _read(path, *score.logits.shape)
        return {
            "kl": mean(reference.divergences(score.logits), digits=9),
            "same_token": mean(np.equal(reference.tokens[:, 0], score.greedy_token_ids)),
        }


def has_distributions(folder: Path, key: PromptKey) -> bool:
    """Returns whether the folder of a run has the reference's distributions for a prompt."""
    return _path(folder, key).exists()


def _path(folder: Path, key: PromptKey) -> Path:
    task, length, index = key
    return folder / FOLDER / f"{task}-{length}-{index}.npz"


def _write(path: Path, distributions: Distributions) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **distributions._asdict())
    partial.replace(path)


def _read(path: Path, places: int, vocabulary: int) -> Distributions:
    try:
        # Opened here because np.load leaves a file open that is no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            found = Distributions(**{name: saved[name] for name in Distributions._fields})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: damaged ({error}): {_WITHOUT}") from None
    table = places, min(LIKELIEST, vocabulary)
    is_whole = [(x.shape, x.dtype) for x in found] == [(table, np.int32), (table, np.float32), ((places,), np.float32)]
    if not is_whole or not np.isin(found.tokens, np.arange(vocabulary)).all():
        raise InputError(f"{path}: not of this prompt and model: {_WITHOUT}")
    return found
