"""Launch configurations: a heuristic's, unless a table tuned on the device has one for the shape.

A table is a file ``pallas_kernels/tuned/<device>.json``, ``{op: {shape: {field: value}}}``, written by `bench.tune`.
"""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parents[1] / "tuned"


def configure[C](op: str, device: str, shape: str, default: C) -> C:
    """Returns the configuration (a dataclass) of an op for a shape: the default with the tuned fields replaced.

    Args:
      op: the op's name.
      device: the device's kind, as JAX names it.
      shape: what the configuration depends on, as the op spells it.
      default: what the heuristic chose.

    Raises:
      ValueError: if the table names a field that the configuration does not have.
    """
    fields = table(device).get(op, {}).get(shape, {})
    launch: Any = default
    unknown = fields.keys() - {field.name for field in dataclasses.fields(launch)}
    if unknown:
        raise ValueError(f"{_file(device)}: {op} has no field {', '.join(sorted(unknown))} ({shape})")
    return dataclasses.replace(launch, **fields)


@cache
def table(device: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the tuned configurations of a device, by op and shape; none where no table was made."""
    file = _file(device)
    return json.loads(file.read_text()) if file.exists() else {}


def _file(device: str) -> Path:
    return TABLES / (device.lower().replace(" ", "_") + ".json")
