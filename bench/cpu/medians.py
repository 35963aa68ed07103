"""Medians and quartiles of everything that `bench.cpu` measured."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from bench.spread import Spread, spread

type Line = dict[str, Any]

FIELDS = (
    "prefill_tok_per_s",
    "ms_per_token",
    "first_token_s",
    "answer_s",
    "compile_s",
    "peak_bytes",
    "plan_ratio",
    "extra_gib",
    "num_compilations",
    "grown",
)


class Point(NamedTuple):
    """What a number is of."""

    part: str
    system: str
    length: int
    batch: int
    cache: str
    field: str


type Medians = Mapping[Point, Spread]


def samples(lines: Iterable[Line]) -> list[Line]:
    """Returns the measurements of the newest sources."""
    found = [line for line in lines if line["kind"] == "sample"]
    return [line for line in found if line["sources"] == found[-1]["sources"]]


def medians(lines: Iterable[Line]) -> dict[Point, Spread]:
    """Returns the median and spread of every number in the measurements."""
    values: dict[Point, list[float]] = {}
    for line in samples(lines):
        numbers: Line = {**line, **beside_plan(line)}
        for field in FIELDS:
            if numbers.get(field) is not None:
                point = Point(line["part"], line["system"], line["length"], line["batch"], line["cache"], field)
                values.setdefault(point, []).append(numbers[field])
    return {point: spread(found) for point, found in values.items()}


def beside_plan(line: Line) -> dict[str, float]:
    """Returns a process's peak memory, less what it had before it loaded anything, beside the plan's figure.

    ``plan_ratio`` is the one over the other, ``extra_gib`` their difference.
    """
    facts = line.get("facts", {})
    if "plan_bytes" not in facts or line["part"] not in ("memory", "long"):
        return {}
    used, planned = line["peak_bytes"] - facts["base_bytes"], facts["plan_bytes"]
    return {"plan_ratio": used / planned, "extra_gib": (used - planned) / 2**30}
