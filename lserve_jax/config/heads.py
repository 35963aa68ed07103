"""The classes of KV heads: retrieval heads keep the whole context, streaming heads only sink and window."""

import math
from dataclasses import dataclass
from functools import cached_property
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lserve_jax.config.digest import json_digest
from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.json_file import parse_json

GATES_FILE = "full_attention_heads.tsv"
CONFIG_FILE = "config.json"
SMOOTHING_FILE = "smoothing.safetensors"
"""Factors for weights in 8 bits (`lserve_jax.weights.smoothing`), which calibration finds along with the gates."""
QUOTAS = ("model", "layer")

type Folder = Path | Traversable
"""A folder on disk, or one inside an installed package."""


@dataclass(frozen=True, kw_only=True)
class HeadClasses:
    """The class of every KV head, as the order in which the weights are loaded.

    Attributes:
      order: per layer, the checkpoint's KV heads: retrieval heads first, ascending inside each class.
      num_retrieval: per layer, how many of them are retrieval heads: 0 to all.
    """

    order: tuple[tuple[int, ...], ...]
    num_retrieval: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.order or len(self.order) != len(self.num_retrieval):
            got = f"{len(self.order)} and {len(self.num_retrieval)}"
            raise InputError(f"order and num_retrieval must have one entry per layer, got {got}")
        for layer, (heads, count) in enumerate(zip(self.order, self.num_retrieval, strict=True)):
            if not 0 <= count <= self.num_kv_heads:
                raise InputError(f"layer {layer}: num_retrieval must be 0 to {self.num_kv_heads}, got {count}")
            if sorted(heads) != list(range(self.num_kv_heads)) or not self.num_kv_heads:
                raise InputError(f"layer {layer}: order must name heads 0 to {self.num_kv_heads - 1} once, got {heads}")
            if list(heads) != sorted(heads[:count]) + sorted(heads[count:]):
                raise InputError(f"layer {layer}: heads must ascend inside each class, got {heads} with {count=}")

    @property
    def num_layers(self) -> int:
        """Returns the number of layers."""
        return len(self.order)

    @property
    def num_kv_heads(self) -> int:
        """Returns the number of KV heads per layer."""
        return len(self.order[0])

    @property
    def is_permuted(self) -> bool:
        """Returns whether the order of heads in any layer differs from the checkpoint's."""
        return any(heads != tuple(range(self.num_kv_heads)) for heads in self.order)

    @property
    def digest(self) -> str | None:
        """Returns 16 hexadecimal digits that stand for the classes of all heads; None if no head streams."""
        if set(self.num_retrieval) == {self.num_kv_heads}:
            return None
        return json_digest([self.order, self.num_retrieval])

    @classmethod
    def all_retrieval(cls, num_layers: int, num_kv_heads: int) -> Self:
        """Returns the classes of a model without a pattern: every head keeps every page."""
        return cls(order=(tuple(range(num_kv_heads)),) * num_layers, num_retrieval=(num_kv_heads,) * num_layers)


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadPattern:
    """The gates of a model's KV heads and the settings that suit them, in a folder that is read when it is needed.

    Attributes:
      folder: holds `GATES_FILE`.
      shape: layers and KV heads of the model.
      has_settings: whether the folder's `CONFIG_FILE`, if any, is that of the pattern and not of a model.
      origin: where the pattern comes from, in words.
      is_guess: whether only the architecture says that the pattern suits the model.
    """

    folder: Folder
    shape: tuple[int, int]
    has_settings: bool = True
    origin: str
    is_guess: bool = False

    @cached_property
    def gates(self) -> NDArray[np.float64]:
        """Returns the gate of every KV head, see `load_gates`."""
        return load_gates(self.folder, *self.shape)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Returns the fields of `AttentionConfig` that suit the pattern, see `load_settings`."""
        return load_settings(self.folder) if self.has_settings else {}

    @cached_property
    def digest(self) -> str:
        """Returns 16 hexadecimal digits that stand for gates and settings."""
        return json_digest([self.gates.tolist(), self.settings])

    @property
    def files(self) -> list[Folder]:
        """Returns the files of the pattern."""
        names = (GATES_FILE, CONFIG_FILE, SMOOTHING_FILE) if self.has_settings else (GATES_FILE, SMOOTHING_FILE)
        return [file for name in names if (file := self.folder / name).is_file()]

    def classify(self, static_sparsity: float) -> HeadClasses:
        """Returns the classes of all heads if that share of them streams, see `classify`."""
        return classify(self.gates, static_sparsity)


def load_gates(folder: str | Folder, num_layers: int, num_kv_heads: int) -> NDArray[np.float64]:
    """Returns the gate of every KV head, [L, K], clipped to [0, 1], from a folder in DuoAttention's format.

    Clipping is needed because training leaves some published gates slightly outside [0, 1] (-0.0014 to 1.0).

    Raises:
      InputError: if the file is missing, is not a rectangle of finite numbers, or belongs to a model of another shape.
    """
    path = (Path(folder) if isinstance(folder, str) else folder) / GATES_FILE
    rows, problems = _parse_rows(path)
    widths = sorted({len(row) for row in rows})
    got = f"[{len(rows)}, {' or '.join(map(str, widths)) or 0}]"
    if len(rows) != num_layers or widths != [num_kv_heads]:
        problems.insert(0, f"expected gates [layers, KV heads] = [{num_layers}, {num_kv_heads}], got {got}")
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}")
    return np.clip(np.array(rows, dtype=np.float64), 0.0, 1.0)


def load_settings(folder: Folder) -> dict[str, Any]:
    """Returns the fields of `AttentionConfig` that suit a pattern, from ``attention`` in its ``config.json``.

    A pattern suits the windows that it was found with. Patterns of other projects name none; the result is then empty.

    Raises:
      InputError: if the file, or its ``attention``, is not a JSON object; in one line.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    found = parse_json(data, str(path)).get("attention", {})
    if not isinstance(found, dict):
        raise InputError(f"{path}: attention must be an object of settings, got {shown(found)}")
    return found


def _parse_rows(path: Folder, max_problems: int = 5) -> tuple[list[list[float]], list[str]]:
    """Returns the numbers of each line, and the first ``max_problems`` problems of single values."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a head pattern is a folder that holds {GATES_FILE}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}") from None
    rows: list[list[float]] = []
    problems: list[str] = []
    for line_number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split("\t")
        rows.append([_finite(field) for field in fields])
        wrong = [field.strip() for field, value in zip(fields, rows[-1], strict=True) if math.isnan(value)]
        problems += [f"line {line_number}: {field!r} is not a finite number" for field in wrong]
    if len(problems) > max_problems:
        problems[max_problems:] = [f"and {len(problems) - max_problems} more such values"]
    return rows, problems


def _finite(field: str) -> float:
    """Returns a field as a number; NaN if it is not a finite number."""
    try:
        value = float(field)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def classify(gates: NDArray[np.floating], static_sparsity: float, quota: str = "model") -> HeadClasses:
    """Returns classes that make the ``round(static_sparsity * heads)`` heads with the lowest gates streaming heads.

    ``heads`` is ``L * K`` for quota "model" (the default), or ``K`` in each layer for quota "layer". Among heads with
    equal gates, the first by (layer, head) is the retrieval head. This is LServe's rule, ``gate >= the s-quantile of
    the gates`` (arXiv 2502.14866), except that order breaks ties; the released code breaks them by noise. This order
    gives the published counts, 1, 1, 3, 2, 2, 4... retrieval heads per layer, for Llama-3-8B-Instruct-Gradient-1048k at
    0.5, where three heads tie at the threshold.

    Args:
      gates: [L, K], finite.
      static_sparsity: the share of streaming heads, 0 to 1. `round` is Python's: it rounds halves to the even number.
      quota: "model" ranks all heads together, so that layers differ; "layer" gives each layer the same count.
    """
    if gates.ndim != 2 or not gates.size or not np.isfinite(gates).all():
        raise InputError(f"gates must be finite and [layers, KV heads], got shape {gates.shape}")
    if not 0.0 <= static_sparsity <= 1.0:
        raise InputError(f"static_sparsity must be between 0 and 1, got {static_sparsity}")
    if quota not in QUOTAS:
        raise InputError(f"quota must be one of {', '.join(QUOTAS)}, got {quota!r}")
    groups = gates.reshape(1, -1) if quota == "model" else gates
    is_retrieval = np.stack([_highest(group, static_sparsity) for group in groups]).reshape(gates.shape)
    return HeadClasses(
        order=tuple(tuple(np.argsort(~row, kind="stable").tolist()) for row in is_retrieval),
        num_retrieval=tuple(is_retrieval.sum(axis=1).tolist()),
    )


def _highest(gates: NDArray[np.floating], static_sparsity: float) -> NDArray[np.bool_]:
    """Returns which of ``gates`` [n] are among the ``n - round(static_sparsity * n)`` highest; the first win ties."""
    ranked = np.argsort(-gates, kind="stable")
    kept = ranked[: gates.size - round(static_sparsity * gates.size)]
    return np.isin(np.arange(gates.size), kept)
