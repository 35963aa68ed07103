"""The summary as tables for people."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lserve_jax.evaluation.summary import Cell

_NONE = "–"


@dataclass(frozen=True)
class Column:
    """A column: its head, and the text that it shows for a cell."""

    head: str
    text: Callable[[Cell], str]
    is_left: bool = False


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def _interval(show: Callable[[float], str], one: dict[str, Any] | None) -> str:
    if one is None:
        return _NONE
    if one["low"] is None:
        return show(one["mean"])
    return f"{show(one['mean'])} [{show(one['low'])}, {show(one['high'])}]"


def _mean(head: str, name: str, show: Callable[[float], str]) -> Column:
    return Column(head, lambda cell: show(cell[name]["mean"]) if name in cell else _NONE)


def _difference(head: str, name: str, show: Callable[[float], str]) -> Column:
    return Column(head, lambda cell: _interval(show, cell[name]["difference"]) if name in cell else _NONE)


def _estimate(head: str, name: str, show: Callable[[float], str]) -> Column:
    return Column(head, lambda cell: _interval(show, cell.get(name)))


def _share(head: str, name: str) -> Column:
    return Column(head, lambda cell: _NONE if cell[name] is None else _percent(cell[name]))


def _points(value: float) -> str:
    return _signed(100 * value, 1)


def _nats(value: float) -> str:
    return _signed(value, 3)


def _ratio(nats: float) -> str:
    """Returns the difference of a perplexity in percent."""
    return _signed(100 * math.expm1(nats), 2)


_KEY = (
    Column("task", lambda cell: cell["task"], is_left=True),
    Column("length", lambda cell: str(cell["length"])),
    Column("variant", lambda cell: cell["variant"], is_left=True),
    Column("n", lambda cell: str(cell["n"])),
)
_CLOSENESS = (
    _estimate("KL [95%]", "kl", lambda nats: f"{nats:.5f}".replace("-", "−")),
    _estimate("same % [95%]", "same_token", _percent),
)
_SPARSITY = (
    _share("streams %", "streaming_share"),
    _share("pages %", "pages_read_ratio"),
    _share("recall %", "attention_recall"),
    _share("prefill %", "prefill_density"),
)
_TASKS = (
    *_KEY,
    _mean("score %", "score", _percent),
    _difference("difference [95%]", "score", _points),
    _mean("nll", "nll", "{:.3f}".format),
    _difference("difference [95%]", "nll", _nats),
    _mean("tokens %", "token_accuracy", _percent),
    _difference("difference [95%]", "token_accuracy", _points),
    *_CLOSENESS,
    *_SPARSITY,
)
_PERPLEXITY = (
    *_KEY,
    _mean("perplexity", "nll", lambda nats: f"{math.exp(nats):.3f}"),
    _difference("% more [95%]", "nll", _ratio),
    _mean("decoded", "tail_nll", lambda nats: f"{math.exp(nats):.3f}"),
    _difference("% more [95%]", "tail_nll", _ratio),
    *_CLOSENESS,
    *_SPARSITY,
)
_DRIFT = (
    *_KEY,
    _mean("agrees %", "agreement", _percent),
    _mean("nll", "nll", "{:.3f}".format),
    _difference("difference [95%]", "nll", _nats),
    *_SPARSITY,
)


def format_tables(cells: Sequence[Cell]) -> str:
    """Returns tables of tasks, perplexities and drift, for those that have cells."""
    kinds = (
        (_TASKS, [cell for cell in cells if "score" in cell]),
        (_PERPLEXITY, [cell for cell in cells if "tail_nll" in cell]),
        (_DRIFT, [cell for cell in cells if "agreement" in cell]),
    )
    return "\n\n".join(format_table(columns, members) for columns, members in kinds if members)


def format_table(columns: Iterable[Column], cells: Iterable[Cell]) -> str:
    """Returns aligned lines, the heads first."""
    columns = tuple(columns)
    lines = [[column.head for column in columns], *([column.text(cell) for column in columns] for cell in cells)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    texts = [
        "  ".join(
            text.ljust(width) if column.is_left else text.rjust(width)
            for column, text, width in zip(columns, line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join(texts)
