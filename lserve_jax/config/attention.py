"""The sparsity policy: which tokens streaming heads see, how many pages a decoded token reads, how pages are stored."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from lserve_jax.config.checks import require_whole

KV_DTYPES = ("bfloat16", "float32", "int8", "int4")
_LEAST = {"page_size": 1, "sub_page_size": 1, "selector_interval": 1, "sink": 0, "local": 1, "prefill_local": 1}


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """How attention is thinned out (LServe sections 3.2–3.5). Dense attention is a setting of it.

    Attributes:
      preset: name of the preset that this started from.
      token_budget: tokens whose pages a retrieval head reads for one decoded token; None reads all.
      page_size: tokens a page.
      sub_page_size: tokens that share key statistics (the paper's logical page).
      selector_interval: decode steps of a sequence from one page selection to the next.
      sink: tokens at the start that streaming heads see.
      local: tokens at the end, the current one included, that streaming heads see while decoding.
      prefill_local: the same during prefill.
      static_sparsity: share of the model's KV heads that stream, 0 … 1.
      dense_layers: layers whose retrieval heads always read everything.
      kv_dtype: element type of the pages; "auto" is the model's own. With "int4", pages of streaming heads, which do
        not grow with the context, have 8 bits.
      is_sink_forced: whether the first page is selected whatever its score, if there is a sink.
      selector_spread: how much of the distance between the bounds of a sub-page's keys counts in its score, 0 … 1; 1 is
        the upper bound of Quest and LServe (see `pallas_kernels.page_select`).
      has_lookahead: whether the page after a chosen end of a page is chosen with it: for copying, where sub-pages are
        about as long as the interval.
      group_reduction: how the scores of a KV head's query heads become one, "max" or "mean".
    """

    preset: str = "lserve"
    token_budget: int | None = 4096
    page_size: int = 64
    sub_page_size: int = 16
    selector_interval: int = 4
    sink: int = 128
    local: int = 256
    prefill_local: int = 4096
    static_sparsity: float = 0.5
    dense_layers: tuple[int, ...] = ()
    kv_dtype: str = "auto"
    is_sink_forced: bool = True
    selector_spread: float = 0.5
    has_lookahead: bool = False
    group_reduction: str = "max"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            object.__setattr__(self, name, require_whole(name, getattr(self, name), least))
        if self.page_size % self.sub_page_size:
            raise ValueError(f"page_size={self.page_size} must be a multiple of sub_page_size={self.sub_page_size}")
        for name in ("static_sparsity", "selector_spread"):
            share = getattr(self, name)
            if not (isinstance(share, Real) and 0 <= float(share) <= 1):
                raise ValueError(f"{name}={share!r} must be a number from 0 to 1")
            object.__setattr__(self, name, float(share))
        if self.kv_dtype not in ("auto", *KV_DTYPES):
            raise ValueError(f"kv_dtype={self.kv_dtype!r} must be auto or one of {', '.join(KV_DTYPES)}")
        if self.group_reduction not in ("max", "mean"):
            raise ValueError(f'group_reduction={self.group_reduction!r} must be "max" or "mean"')
        # A tuple, whatever it was: the configuration is a static argument of the compiled steps and must hash.
        layers = (self.dense_layers,) if isinstance(self.dense_layers, Integral) else self.dense_layers
        object.__setattr__(self, "dense_layers", tuple(require_whole("dense_layers", layer, 0) for layer in layers))
        self._check_budget()

    def _check_budget(self) -> None:
        if self.token_budget is None:
            return
        object.__setattr__(self, "token_budget", require_whole("token_budget", self.token_budget, 1))
        needed = self.forced_pages * self.page_size
        if self.token_budget < needed:
            raise ValueError(
                f"token_budget={self.token_budget} must be at least {needed}: the {self.forced_pages} pages of "
                f"{self.page_size} tokens with the first and the newest tokens are always read"
            )

    @property
    def sink_pages(self) -> int:
        """Pages at the start that are always selected: the first, for attention sinks into the first few tokens.

        All pages of ``sink`` would take a third of a small budget (4 pages of 16), and are found where they matter.
        """
        return int(self.is_sink_forced and self.sink > 0)

    @property
    def forced_pages(self) -> int:
        """Pages that every selection holds: the first and those written since the last selection."""
        return self.sink_pages + (self.selector_interval + self.page_size - 2) // self.page_size + 1

    @property
    def prefill_window(self) -> int:
        """Newest tokens whose pages a prefill keeps: also those that the first decode step looks back on."""
        return max(self.prefill_local, self.local)

    @property
    def num_selected(self) -> int | None:
        """Pages a selection; None for all."""
        return None if self.token_budget is None else self.token_budget // self.page_size


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
        "selector_interval": 1,
        "dense_layers": (0, 1),
        "selector_spread": 1.0,
    },
    "qserve": {**_NO_SELECTOR, **_NO_STREAMING, "kv_dtype": "int4"},
}
"""Systems as fields that differ from the defaults: LServe, vLLM-like, DuoAttention, Quest, QServe."""


_SMALL_PAGES: tuple[tuple[int, dict[str, Any]], ...] = (
    (512, {"page_size": 16, "sub_page_size": 2, "has_lookahead": True}),
    (2048, {"page_size": 16, "sub_page_size": 4, "has_lookahead": True}),
    (4096, {"page_size": 32, "sub_page_size": 8}),
)
"""What takes the place of the defaults at budgets below so many tokens: a selection wants many pages."""


def from_preset(preset: str, /, *, of_model: Mapping[str, Any] | None = None, **overrides: Any) -> AttentionConfig:
    """Returns a preset with some fields replaced.

    Where neither preset nor overrides name a page size, it follows from the budget: 64 tokens, 32 at budgets below
    4096, and 16 with lookahead at budgets below 2048, with sub-pages of 2 below 512 (docs/accuracy.md).

    Args:
      preset: a key of `PRESETS`.
      of_model: fields that were found to suit the model; they replace the preset's if it lets heads stream.
      **overrides: fields by name; None keeps what would be without.

    Raises:
      ValueError: if the preset or a field is unknown, or a value is out of range.
    """
    if preset not in PRESETS:
        raise ValueError(f"attention={preset!r} must be one of {', '.join(PRESETS)}")
    of_preset, given = PRESETS[preset], {name: value for name, value in overrides.items() if value is not None}
    known = {field.name for field in fields(AttentionConfig)} - {"preset"}
    unknown = sorted({*overrides, *(of_model or {})} - known)
    if unknown:
        raise ValueError(f"unknown attention option {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    has_streaming = of_preset.get("static_sparsity") != 0
    of_model = {name: value for name, value in (of_model or {}).items() if has_streaming and value is not None}
    chosen = {**of_preset, **of_model, **given}
    budget = chosen.get("token_budget", AttentionConfig.token_budget)
    pages = default_pages(preset, int(budget), {**of_model, **given}) if isinstance(budget, Integral) else {}
    return AttentionConfig(preset=preset, **{**pages, **chosen})


def default_pages(preset: str, token_budget: int, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of pages that suit a budget; nothing where the preset or what is chosen names page sizes."""
    chosen = {**PRESETS[preset], **chosen}
    if chosen.keys() & {"page_size", "sub_page_size"}:
        return {}
    found = next((dict(pages) for below, pages in _SMALL_PAGES if token_budget < below), {})
    if chosen.get("group_reduction") == "mean":
        found.pop("has_lookahead", None)  # of the maximum only, see `pallas_kernels.page_select`
    return found
