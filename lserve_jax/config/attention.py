"""The sparsity policy: which tokens streaming heads see, how many pages a decoded token reads, how pages are stored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

import numpy as np

from lserve_jax.config.checks import require_whole
from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.selectors import BOUND, require_selector
from lserve_jax.config.settings import settings

KV_DTYPES = ("bfloat16", "float32", "int8", "int4")
REDUCTIONS = ("max", "mean")
PREFILL_SPARSITIES = ("none", "triangle", "blocks")
TILE = 128
"""Queries of a prompt that read the same blocks of the history."""
ALL = "all"
"""The value of ``token_budget``, in `from_preset` and on command lines, that reads all pages."""
_OF_BUDGET = "the preset's, or what suits the budget: {} from 4096 tokens"


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which tokens and pages attention reads, and how pages are stored (LServe sections 3.2–3.5).

    Dense attention is one setting of it. ``preset`` names the preset that a configuration started from. The "help" of
    every other field says what the field does; ``--help`` prints it. A ``token_budget`` of None reads all pages. See
    `pallas_kernels.page_select` for the fields of the page selector.
    """

    preset: str = "lserve"
    token_budget: int | None = field(
        default=4096,
        metadata={
            "help": "tokens whose pages a retrieval head reads per decoded token; all lifts a preset's budget",
            "words": (ALL,),
            "metavar": "N|all",
        },
    )
    budget_share: float = field(
        default=0.0,
        metadata={
            "help": "share of the context that a retrieval head reads per decoded token where that is more than "
            "token_budget, 0 to 1"
        },
    )
    budget_cap: int | None = field(
        default=None,
        metadata={
            "help": "most tokens that budget_share may come to; it is the length of the page lists",
            "default": "that share of the longest context",
            "metavar": "N",
        },
    )
    page_size: int = field(
        default=64,
        metadata={
            "help": "tokens per page of the KV cache",
            "least": 1,
            "default": _OF_BUDGET,
        },
    )
    sub_page_size: int = field(
        default=16,
        metadata={
            "help": "tokens that share key statistics (the paper's logical page)",
            "least": 1,
            "default": _OF_BUDGET,
        },
    )
    selector: str = field(
        default=BOUND,
        metadata={
            "help": "how pages are scored: bound (LServe, Quest); to compare with: mean_key, oracle, random",
            "metavar": "NAME",
        },
    )
    selector_interval: int = field(
        default=1, metadata={"help": "decode steps from one page selection of a sequence to the next", "least": 1}
    )
    sink: int = field(default=128, metadata={"help": "first tokens that streaming heads see", "least": 0})
    local: int = field(
        default=256,
        metadata={
            "help": "newest tokens, the current one included, that streaming heads see during decoding",
            "least": 1,
        },
    )
    prefill_local: int = field(
        default=4096, metadata={"help": "newest tokens that streaming heads see during prefill", "least": 1}
    )
    prefill_sparsity: str = field(
        default="none",
        metadata={
            "help": "what retrieval heads read of a long prompt's history: none leaves nothing out; blocks reads those "
            "that look important, and means of the others; triangle reads sink and window in the upper layers",
            "choices": PREFILL_SPARSITIES,
        },
    )
    prefill_from: int = field(
        default=16384,
        metadata={"help": "position in a prompt from which prefill_sparsity leaves something out", "least": 0},
    )
    prefill_threshold: float = field(
        default=0.1,
        metadata={"help": "share of the best block's estimated attention from which blocks reads a block, above 0"},
    )
    prefill_block: int = field(
        default=128,
        metadata={"help": "tokens per block of the history, a multiple of page_size", "least": 1},
    )
    prefill_near: int = field(
        default=512,
        metadata={
            "help": "tokens before each 128 queries that blocks and triangle always read, beside those of sink",
            "least": 0,
        },
    )
    prefill_last: int | None = field(
        default=None,
        metadata={
            "help": "tokens at the end of a prompt, of its last chunk at most, that read everything",
            "least": 0,
            "default": "1024 with blocks, 128 with triangle",
        },
    )
    prefill_first_layer: int | None = field(
        default=None,
        metadata={
            "help": "first layer that leaves something out",
            "least": 0,
            "default": "2 with blocks, half of the layers with triangle",
        },
    )
    is_prefill_corrected: bool = field(
        default=True, metadata={"help": "let the mean of a block stand in for it where blocks does not read it"}
    )
    uncorrected_layers: tuple[int, ...] = field(
        default=(), metadata={"help": "layers in which no means stand in for blocks that are not read"}
    )
    static_sparsity: float = field(default=0.5, metadata={"help": "share of the model's KV heads that stream, 0 to 1"})
    dense_layers: tuple[int, ...] = field(
        default=(), metadata={"help": "layers whose retrieval heads always read all pages"}
    )
    kv_dtype: str = field(
        default="auto",
        metadata={
            "help": "element type of the KV cache; auto is the model's own; with int4, the pages of streaming heads, "
            "which do not grow with the context, have 8 bits per element",
            "choices": ("auto", *KV_DTYPES),
        },
    )
    is_sink_forced: bool = field(
        default=True, metadata={"help": "select the first page whatever its score, if there is a sink"}
    )
    selector_spread: float = field(
        default=0.5,
        metadata={
            "help": "share of the distance between the bounds of a sub-page's keys that counts in its score, 0 to 1; "
            "1 is the upper bound of Quest and LServe"
        },
    )
    selector_memory: float = field(
        default=0.6,
        metadata={
            "help": "what is left, after each decode step, of the share of attention that a selected page had, 0 to 1; "
            "0 ranks pages by the newest query alone"
        },
    )
    group_reduction: str = field(
        default="max",
        metadata={"help": "how the scores of the query heads of a KV head become one score", "choices": REDUCTIONS},
    )

    def __post_init__(self) -> None:
        for name, setting in settings(type(self)).items():
            if "least" in setting.metadata and not (setting.default is None and getattr(self, name) is None):
                object.__setattr__(self, name, require_whole(name, getattr(self, name), setting.metadata["least"]))
        if self.page_size % self.sub_page_size:
            raise InputError(f"page_size={self.page_size} must be a multiple of sub_page_size={self.sub_page_size}")
        for name in ("static_sparsity", "selector_spread", "selector_memory", "budget_share"):
            share = getattr(self, name)
            if not (isinstance(share, Real) and 0 <= float(share) <= 1):
                raise InputError(f"{name}={shown(share)} must be a number from 0 to 1")
            object.__setattr__(self, name, float(share))
        require_selector(self.selector)
        for name in ("is_sink_forced", "is_prefill_corrected"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={shown(getattr(self, name))} must be true or false")
        self._check_prefill()
        if self.kv_dtype not in ("auto", *KV_DTYPES):
            raise InputError(f"kv_dtype={shown(self.kv_dtype)} must be auto or one of {', '.join(KV_DTYPES)}")
        if self.group_reduction not in REDUCTIONS:
            raise InputError(f'group_reduction={shown(self.group_reduction)} must be "max" or "mean"')
        # Always a tuple: the configuration is a static argument of the compiled steps and must hash.
        for name in ("dense_layers", "uncorrected_layers"):
            value = getattr(self, name)
            layers = value if isinstance(value, tuple | list) else (value,)
            object.__setattr__(self, name, tuple(require_whole(name, layer, 0) for layer in layers))
        self._check_budget()

    def _check_prefill(self) -> None:
        if self.prefill_sparsity not in PREFILL_SPARSITIES:
            choices = ", ".join(PREFILL_SPARSITIES)
            raise InputError(f"prefill_sparsity={shown(self.prefill_sparsity)} must be one of {choices}")
        threshold = self.prefill_threshold
        if not (isinstance(threshold, Real) and 0 < float(threshold) < math.inf):
            raise InputError(f"prefill_threshold={shown(threshold)} must be a number above 0")
        object.__setattr__(self, "prefill_threshold", float(threshold))
        if self.prefill_sparsity != "none" and self.prefill_block % self.page_size:
            raise InputError(
                f"prefill_block={self.prefill_block} must be a multiple of page_size={self.page_size}: blocks of the "
                "history are whole pages"
            )

    def _check_budget(self) -> None:
        if self.token_budget is None:
            return
        object.__setattr__(self, "token_budget", require_whole("token_budget", self.token_budget, 1))
        needed = self.forced_pages * self.page_size
        if self.token_budget < needed:
            raise InputError(
                f"token_budget={self.token_budget} must be at least {needed}: the {self.forced_pages} pages of "
                f"{self.page_size} tokens with the first and the newest tokens are always read"
            )
        if self.budget_cap is not None:
            object.__setattr__(self, "budget_cap", require_whole("budget_cap", self.budget_cap, self.token_budget))

    def options(self) -> dict[str, Any]:
        """Returns the fields as arguments of `from_preset`: ``from_preset(c.preset, **c.options()) == c``."""
        values = {name: getattr(self, name) for name in settings(type(self))}
        return values | {"token_budget": ALL if self.token_budget is None else self.token_budget}

    @property
    def sink_pages(self) -> int:
        """Returns how many pages at the start are always selected: 1, the page of the attention sinks, or 0.

        Forcing all pages of ``sink`` would take a third of a small budget (4 pages of 16 tokens); the selector finds
        them where they matter.
        """
        return int(self.is_sink_forced and self.sink > 0)

    @property
    def forced_pages(self) -> int:
        """Returns how many pages every selection contains: the first, and those written since the last selection."""
        return self.sink_pages + (self.selector_interval + self.page_size - 2) // self.page_size + 1

    @property
    def prefill_window(self) -> int:
        """Returns the newest tokens whose pages a prefill keeps, including those that the first decode step reads."""
        return max(self.prefill_local, self.local)

    @property
    def num_last(self) -> int:
        """Returns how many tokens at the end of a prompt, of its last chunk at most, read everything."""
        if self.prefill_last is not None:
            return self.prefill_last
        return 1024 if self.prefill_sparsity == "blocks" else 128

    @property
    def num_selected(self) -> int | None:
        """Returns the most pages per selection; None for all.

        Raises:
          InputError: if a share of the context has no limit.
        """
        if self.token_budget is None or not self.budget_share:
            return self.least_selected
        if self.budget_cap is None:
            raise InputError("budget_share needs a budget_cap where the longest context is not known")
        return self.budget_cap // self.page_size

    @property
    def least_selected(self) -> int | None:
        """Returns the pages that every selection may have; None for all."""
        return None if self.token_budget is None else self.token_budget // self.page_size

    def capped(self, longest: int) -> "AttentionConfig":
        """Returns the policy for contexts of at most ``longest`` tokens: with the limit that a share of them needs.

        If no prompt comes to the position from which something is left out, nothing is.
        """
        policy = self if longest > self.prefill_from else replace(self, prefill_sparsity="none")
        if not self.budget_share or self.token_budget is None or self.budget_cap is not None:
            return policy
        needed = math.ceil(self.budget_share * -(-longest // self.page_size)) * self.page_size
        return replace(policy, budget_cap=max(needed, self.token_budget))

    def budgets(self, pages: Any) -> Any:
        """Returns the pages that sequences of so many pages select, an int32 array like ``pages``."""
        assert self.least_selected is not None and self.num_selected is not None
        share = pages.astype(np.float32) * np.float32(self.budget_share)
        whole = share.astype(np.int32)
        is_more = (share > whole.astype(np.float32)).astype(np.int32)
        return (whole + is_more).clip(self.least_selected, self.num_selected)


_NO_SELECTOR: dict[str, Any] = {"token_budget": None}
_NO_STREAMING: dict[str, Any] = {"static_sparsity": 0.0}

PRESETS: dict[str, dict[str, Any]] = {
    "lserve": {},
    "dense": {**_NO_SELECTOR, **_NO_STREAMING},
    "streaming": {**_NO_SELECTOR},
    "quest": {
        **_NO_STREAMING,
        "page_size": 16,
        "sub_page_size": 16,
        "dense_layers": (0, 1),
        "selector_spread": 1.0,
        "selector_memory": 0.0,
    },
    "qserve": {**_NO_SELECTOR, **_NO_STREAMING, "kv_dtype": "int4"},
    "minference": {
        **_NO_SELECTOR,
        **_NO_STREAMING,
        "prefill_sparsity": "blocks",
        "prefill_from": 0,
        "prefill_block": 64,
        "prefill_last": 0,
        "prefill_first_layer": 0,
        "is_prefill_corrected": False,
    },
}
"""The fields of each system that differ from the defaults: LServe, vLLM-like, DuoAttention, Quest, QServe, MInference.

MInference takes vertical and slash lines in most heads; here, all take blocks by mean keys, as some of its heads do.
"""

_SMALL_PAGES: tuple[tuple[int, dict[str, Any]], ...] = (
    (512, {"page_size": 16, "sub_page_size": 2}),
    (2048, {"page_size": 16, "sub_page_size": 4}),
    (4096, {"page_size": 32, "sub_page_size": 8}),
)
"""Token budgets, and the fields that replace the defaults below each: a selection needs many pages."""


def from_preset(preset: str, /, *, of_model: Mapping[str, Any] | None = None, **overrides: Any) -> AttentionConfig:
    """Returns a preset with some fields replaced.

    If neither preset nor overrides name a page size, it follows from the budget: 64 tokens per page; 32 at budgets
    below 4096; 16 at budgets below 2048, with sub-pages of 2 below 512 (docs/accuracy.md).

    Args:
      preset: a key of `PRESETS`.
      of_model: fields that suit the model; they replace the preset's if the preset lets heads stream.
      **overrides: fields by name. A field that is None counts as not named. ``token_budget="all"`` reads all pages,
        whatever the preset's budget is.

    Raises:
      InputError: if the preset or a field is unknown, or a value is out of range.
    """
    if preset not in PRESETS:
        raise InputError(f"attention={preset!r} must be one of {', '.join(PRESETS)}")
    of_preset, given = PRESETS[preset], {name: value for name, value in overrides.items() if value is not None}
    known = {one.name for one in fields(AttentionConfig)} - {"preset"}
    unknown = sorted({*overrides, *(of_model or {})} - known)
    if unknown:
        raise InputError(f"unknown attention option {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    has_streaming = of_preset.get("static_sparsity") != 0
    of_model = {name: value for name, value in (of_model or {}).items() if has_streaming and value is not None}
    chosen = {**of_preset, **of_model, **given}
    budget = chosen.get("token_budget", AttentionConfig.token_budget)
    pages = default_pages(preset, int(budget), {**of_model, **given}) if isinstance(budget, Integral) else {}
    if isinstance(budget, str) and budget == ALL:
        chosen["token_budget"] = None
    return AttentionConfig(preset=preset, **{**pages, **chosen})


def default_pages(preset: str, token_budget: int, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the page fields that suit a budget, empty if the preset or ``chosen`` names a page size."""
    chosen = {**PRESETS[preset], **chosen}
    if chosen.keys() & {"page_size", "sub_page_size"}:
        return {}
    return next((dict(pages) for below, pages in _SMALL_PAGES if token_budget < below), {})
