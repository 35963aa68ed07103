"""A head pattern on disk, in DuoAttention's format: gates as a table, and how they were found."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lserve_jax.calibration.progress import PROGRESS_FILE
from lserve_jax.config.errors import InputError
from lserve_jax.config.heads import CONFIG_FILE, GATES_FILE
from lserve_jax.weights.smoothing import Smoothing

SCORES_FILE = "scores.npz"
PICTURE_FILE = "heads.png"


def require_target(folder: Path) -> None:
    """Raises InputError unless ``folder`` is new, empty, or holds the progress of an interrupted calibration."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: exists and is not a folder")
    if not folder.is_dir() or (folder / PROGRESS_FILE).is_file():
        return
    if any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise InputError(f"{folder}: the folder is not empty and has no {PROGRESS_FILE} to go on from; name a new one")


def write_pattern(
    folder: Path,
    gates: NDArray[np.floating],
    settings: Mapping[str, Any],
    *,
    scores: Mapping[str, Mapping[str, NDArray[np.floating]]] | None = None,
    picture: bytes | None = None,
    smoothing: Smoothing | None = None,
) -> None:
    """Writes a pattern, the gates last, so that a folder without gates is incomplete.

    Args:
      folder: created if it does not exist.
      gates: [L, K] in [0, 1].
      settings: the content of `CONFIG_FILE`.
      scores: kind of prompt → score → [L, K], stored in `SCORES_FILE` as ``kind/score``.
      picture: a PNG.
      smoothing: factors for weights in 8 bits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if scores is not None:
        arrays = {f"{kind}/{name}": value for kind, found in scores.items() for name, value in found.items()}
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        _write(folder / SCORES_FILE, buffer.getvalue())
    if picture is not None:
        _write(folder / PICTURE_FILE, picture)
    if smoothing is not None:
        smoothing.save(folder)
    write_settings(folder, settings)
    rows = "".join("\t".join(f"{gate:.6f}" for gate in row) + "\n" for row in gates)
    _write(folder / GATES_FILE, rows.encode())


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes how a pattern was found into its `CONFIG_FILE`."""
    _write(folder / CONFIG_FILE, f"{json.dumps(settings, indent=1)}\n".encode())


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
