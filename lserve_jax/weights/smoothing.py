"""Smoothing factors: what a linear map's inputs are divided by, and its weights multiplied, before both get 8 bits.

A few channels of a model's hidden states are much larger than the others. With one scale per token they leave few of
the 8 bits to the rest. Factors per channel move size from the inputs into the weights, which have room (SmoothQuant,
Xiao et al. 2023, section 4). The inputs of a map come from a norm or from another map, whose weights are divided: no
run-time work is added, and without quantisation the model stays the same up to rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from lserve_jax.config.digest import json_digest
from lserve_jax.config.errors import InputError
from lserve_jax.config.heads import SMOOTHING_FILE
from lserve_jax.config.model import ModelConfig
from lserve_jax.weights.rules import Parameter, Tensor, parameters

STEPS = 8
"""Factors are powers of the STEPS-th root of two, which fit into a byte."""

SITES = {
    "attention.qkv_proj": "input_norm",
    "mlp.gate_up_proj": "post_attention_norm",
    "mlp.down_proj": "mlp.up_proj",
}
"""The linear maps of a layer whose inputs are smoothed, each with what makes these inputs and is divided instead."""
_MAKERS = {maker: site for site, maker in SITES.items()}


@dataclass(frozen=True)
class Smoothing:
    """Factors of a model; they are equal if they have the same digest.

    Attributes:
      exponents: [D] int8 per linear map, by its path with dots: inputs are divided by ``2.0 ** (exponent / STEPS)``.
      digest: 16 hexadecimal digits that stand for them.
    """

    exponents: Mapping[str, np.ndarray] = field(compare=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        found = json_digest({name: self.exponents[name].tolist() for name in sorted(self.exponents)})
        object.__setattr__(self, "digest", found)

    def of_inputs(self, parameter: Parameter) -> np.ndarray | None:
        """Returns [D] float32, by which a kernel's columns are multiplied; None for any other parameter."""
        exponents = self.exponents.get(".".join(parameter.path[:-1])) if parameter.is_matrix else None
        return None if exponents is None else _factors(exponents)

    def of_outputs(self, tensor: Tensor) -> np.ndarray | None:
        """Returns [F] float32, by which a norm, or the rows of a matrix or bias, are multiplied; None for others."""
        if tensor.layer is None or (site := _MAKERS.get(".".join(tensor.path[1:-1]))) is None:
            return None
        return 1 / _factors(self.exponents[f"{tensor.path[0]}.{site}"])

    def save(self, folder: Path) -> None:
        """Writes `SMOOTHING_FILE` into a folder."""
        partial = folder / f".{SMOOTHING_FILE}.partial"
        safetensors.numpy.save_file(dict(self.exponents), partial)
        partial.replace(folder / SMOOTHING_FILE)


def load_smoothing(folder: Traversable, config: ModelConfig) -> Smoothing | None:
    """Returns the factors in a folder; None if it has none.

    Raises:
      InputError: if the file is damaged, or belongs to a model of another shape.
    """
    path = folder / SMOOTHING_FILE
    if not path.is_file():
        return None
    try:
        held = safetensors.numpy.load(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error})") from None
    expected = {
        ".".join(parameter.path[:-1]): parameter.shape[-1:]
        for parameter in parameters(config)
        if parameter.is_matrix and ".".join(parameter.path[1:-1]) in SITES
    }
    shapes = {name: array.shape for name, array in held.items()}
    wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if wrong:
        name = wrong[0]
        raise InputError(
            f"{path}: {name} has shape {shapes.get(name)}, this model needs {expected.get(name)}: "
            "the factors of another model; make new ones with python -m lserve_jax.calibrate"
        )
    if any(array.dtype != np.int8 for array in held.values()):
        raise InputError(f"{path}: exponents must be int8")
    return Smoothing(held)


def _factors(exponents: np.ndarray) -> np.ndarray:
    return np.exp2(exponents.astype(np.float32) / STEPS)
