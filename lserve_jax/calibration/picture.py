"""The map of a model's heads as a picture."""

import importlib.util
import io

import numpy as np
from numpy.typing import NDArray

from lserve_jax.config.errors import InputError


def require_matplotlib() -> None:
    """Raises InputError if pictures cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("a picture of the heads needs matplotlib: pip install 'lserve_jax[eval]', or --no-picture")


def head_map(gates: NDArray[np.floating], title: str) -> bytes:
    """Returns a PNG of gates [L, K], layers from left to right; darker heads need more of their context."""
    require_matplotlib()
    from matplotlib.figure import Figure

    layers, heads = gates.shape
    figure = Figure(figsize=(max(2.2 + 0.22 * layers, 5.0), 1.3 + 0.22 * heads), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(gates.T, vmin=0, vmax=1, cmap="Blues", aspect="equal", origin="lower")
    axes.set(xlabel="layer", ylabel="KV head", title=title)
    axes.set_xticks(np.arange(0, layers, 2 if layers > 16 else 1))
    axes.set_yticks(np.arange(heads))
    axes.set_xticks(np.arange(-0.5, layers), minor=True)
    axes.set_yticks(np.arange(-0.5, heads), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    figure.colorbar(image, label="gate", ticks=(0, 0.5, 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # the same bytes from any version
    return buffer.getvalue()
