"""Shapes of published models by name, for memory plans and benches that need no weights (``known.json``)."""

import json
from functools import cache
from importlib import resources
from typing import Any


@cache
def known_configs() -> dict[str, dict[str, Any]]:
    """Returns the ``config.json`` of each known model by its lower-case name; treat it as read-only."""
    return json.loads(resources.files("lserve_jax.models").joinpath("known.json").read_text(encoding="utf-8"))
