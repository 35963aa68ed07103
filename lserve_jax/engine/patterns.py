"""Which head pattern a model gets: the one that is named, its own, or the one that ships for its architecture."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from lserve_jax.config.attention import from_preset
from lserve_jax.config.errors import InputError
from lserve_jax.config.heads import CONFIG_FILE, GATES_FILE, Folder, HeadPattern
from lserve_jax.config.model import ModelConfig
from lserve_jax.weights.load import Checkpoint
from lserve_jax.weights.smoothing import Smoothing, load_smoothing

OWN_FOLDER = "head_pattern"
"""Name of the folder inside a model's folder that holds its pattern."""
_ARCHITECTURE = (
    *("architecture", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"),
    *("head_dim", "tie_embeddings", "qkv_bias", "qk_norm", "rope"),
)


def find_pattern(checkpoint: Checkpoint, named: str | Path | None = None) -> HeadPattern | None:
    """Returns the head pattern of a model; None if there is none.

    It is the first of these:

    1. the folder that is named;
    2. the model's own: the folder ``head_pattern`` inside the model's folder, or the gates beside its ``config.json``;
    3. the one that ships with the package for a model of the same architecture (`architecture`).

    Raises:
      InputError: if its settings are not valid fields of `AttentionConfig`, in one line that names the file.
    """
    pattern = next(_candidates(checkpoint, named), None)
    if pattern is not None:
        try:
            from_preset("lserve", **pattern.settings)
        except InputError as error:
            raise InputError(f"{pattern.folder / CONFIG_FILE}: attention: {error}") from None
    return pattern


def find_smoothing(checkpoint: Checkpoint, named: str | Path | None = None) -> Smoothing | None:
    """Returns the smoothing factors of a model, from the first folder of a pattern that has some; None if none has.

    The order is that of `find_pattern`, so that a named pattern without factors does not change the weights. Factors
    that ship for another model of the same architecture are not taken.

    Raises:
      InputError: if the file is damaged, or of another model.
    """
    for pattern in _candidates(checkpoint, named):
        if not pattern.is_guess and (found := load_smoothing(pattern.folder, checkpoint.config)) is not None:
            return found
    return None


def architecture(model: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a model by which a pattern that ships with the package is found, as JSON values."""
    fields = asdict(model)
    return {name: fields[name] for name in _ARCHITECTURE}


def _candidates(checkpoint: Checkpoint, named: str | Path | None) -> Iterator[HeadPattern]:
    model = checkpoint.config
    shape = model.num_layers, model.num_kv_heads
    if named is not None:
        if not (Path(named) / GATES_FILE).is_file():
            raise InputError(f"{named}: no head pattern, which is a folder that holds {GATES_FILE}")
        yield HeadPattern(folder=Path(named), shape=shape, origin=str(named))
    own = checkpoint.folder
    if own is not None and (own / OWN_FOLDER / GATES_FILE).is_file():
        yield HeadPattern(folder=own / OWN_FOLDER, shape=shape, origin=f"the model's own, {own / OWN_FOLDER}")
    if own is not None and (own / GATES_FILE).is_file():
        # The config.json there is the model's.
        yield HeadPattern(folder=own, shape=shape, has_settings=False, origin=f"the model's own, {own / GATES_FILE}")
    known = architecture(model)
    for folder in _shipped():
        if _agrees(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["architecture"], known):
            is_named = Path(checkpoint.name).name.lower().startswith(folder.name)
            why = "for this model" if is_named else f"for {folder.name}, which has the same architecture"
            yield HeadPattern(
                folder=folder, shape=shape, origin=f"shipped with the package {why}", is_guess=not is_named
            )


def _shipped() -> list[Folder]:
    folders = (resources.files("lserve_jax") / "data" / "patterns").iterdir()
    return sorted((folder for folder in folders if (folder / GATES_FILE).is_file()), key=lambda folder: folder.name)


def _agrees(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Returns whether ``found`` has all the values of ``wanted``, which may be mappings in turn."""
    return all(
        _agrees(value, found[name]) if isinstance(value, Mapping) else found.get(name) == value
        for name, value in wanted.items()
    )
