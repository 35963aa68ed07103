"""Summarises rows as cells: means of a task, length and variant, and paired differences to the reference."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lserve_jax.evaluation.statistics import agreement, average, difference, proportion

type Row = Mapping[str, Any]
type Cell = dict[str, Any]

SCORES = ("score", "token_accuracy", "agreement")
"""Quantities between 0 and 1."""
LIKELIHOODS = ("nll", "tail_nll")
"""Negative log-likelihoods per token, in nats."""
CLOSENESS = {"kl": average, "same_token": agreement}
"""How near a variant's distributions are to the reference's, whose own rows have none, and their intervals."""
_MEANS = ("streaming_share", "pages_read_ratio", "attention_recall", "prefill_density", "prompt_tokens", "seconds")
_CURVES = ("nll_by_position", "agreement_by_position")


def summarise(rows: Iterable[Row], reference: str) -> list[Cell]:
    """Returns the cells in the order of tasks, lengths and variants as the rows first name them.

    A quantity of a cell is ``{"mean", "low", "high", "difference": {"mean", "low", "high", "n"}}``, with 95% intervals.
    The difference is to the reference on the ``n`` prompts that both have results for; None if there is none.
    ``kl`` and ``same_token``, themselves comparisons, have the mean and interval of the ``n`` prompts that have one.
    """
    cells: dict[tuple[str, int, str], dict[int, Row]] = {}
    orders: tuple[dict[Any, None], ...] = ({}, {})
    for row in rows:
        cells.setdefault((row["task"], row["length"], row["variant"]), {})[row["index"]] = row
        for order, name in zip(orders, (row["task"], row["variant"]), strict=True):
            order.setdefault(name)
    tasks, variants = (list(order) for order in orders)
    keys = sorted(cells, key=lambda key: (tasks.index(key[0]), key[1], variants.index(key[2])))
    return [_cell(*key, cells, reference) for key in keys]


def _cell(
    task: str, length: int, variant: str, cells: Mapping[tuple[str, int, str], Mapping[int, Row]], reference: str
) -> Cell:
    is_reference = variant == reference
    rows, others = cells[task, length, variant], {} if is_reference else cells.get((task, length, reference), {})
    cell: Cell = {"task": task, "length": length, "variant": variant, "is_reference": is_reference, "n": len(rows)}
    for name in _MEANS:
        values = [row[name] for row in rows.values() if row.get(name) is not None]
        cell[name] = round(float(np.mean(values)), 6) if values else None
    for name in (*SCORES, *LIKELIHOODS):
        own, other = _values(rows, name), _values(others, name)
        if own:
            cell[name] = _quantity(own, other, is_score=name in SCORES)
    for name, estimate in CLOSENESS.items():
        if values := list(_values(rows, name).values()):
            cell[name] = asdict(estimate(values)) | {"n": len(values)}
    for name in _CURVES:
        curves = [row[name] for row in rows.values() if row.get(name) is not None]
        if curves:
            cell[name] = np.mean(curves, axis=0).round(6).tolist()
    return cell


def _values(rows: Mapping[int, Row], name: str) -> dict[int, float]:
    return {index: row[name] for index, row in rows.items() if row.get(name) is not None}


def _quantity(own: Mapping[int, float], reference: Mapping[int, float], *, is_score: bool) -> dict[str, Any]:
    values = list(own.values())
    found: dict[str, Any] = asdict(proportion(values)) if is_score else {"mean": float(np.mean(values))}
    pairs = [(value, reference[index]) for index, value in own.items() if index in reference]
    found["difference"] = None
    if pairs:
        ours, theirs = zip(*pairs, strict=True)
        found["difference"] = asdict(difference(ours, theirs, is_score=is_score)) | {"n": len(pairs)}
    return found


def select(cells: Sequence[Cell], **wanted: Any) -> list[Cell]:
    """Returns the cells whose fields have the given values."""
    return [cell for cell in cells if all(cell[name] == value for name, value in wanted.items())]
