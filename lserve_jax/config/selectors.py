"""The names of page selectors, and the scores that are registered under them."""

from collections.abc import Callable
from typing import Any

from lserve_jax.config.errors import InputError, shown

BOUND = "bound"
"""LServe's and Quest's own: by the bounds of the keys of each sub-page, in one fused op."""

type PageScores = Callable[[Any, Any, Any, Any], Any]
"""Queries [B, K · G, H] of the retrieval heads, their layer's `LayerKV`, its `PageTables` and lengths [B] int32 →
scores [B, K, max_pages] float32 of all pages. See `register_selector`."""

_REGISTERED: dict[str, PageScores] = {}


def register_selector(name: str) -> Callable[[PageScores], PageScores]:
    """Returns a decorator that makes scores of pages a selector, to be named by ``AttentionConfig.selector``.

    The scores rank pages in the unit of the products q · k: a difference of √H means e times the attention. Whatever
    has no score of use (the open page, pages that do not exist) may have any. What follows is the same for all
    selectors: pages that are always read, memory, budgets.

    The function is traced when a model is compiled, so a name stands for one function in a process.

    Raises:
      InputError: if the name is taken.
    """

    def register(scores: PageScores) -> PageScores:
        if name == BOUND or name in _REGISTERED:
            raise InputError(f"selector {name!r} is registered already: choose another name")
        _REGISTERED[name] = scores
        return scores

    return register


def page_scores(name: str) -> PageScores:
    """Returns the scores that are registered under a name."""
    return _REGISTERED[name]


def require_selector(name: Any) -> None:
    """Raises InputError if nothing is registered under a name."""
    names = (BOUND, *_REGISTERED)
    if name not in names:
        raise InputError(f"selector={shown(name)} must be one of {', '.join(names)}, or registered before")
