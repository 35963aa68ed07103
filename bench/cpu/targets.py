"""The targets for a CPU, and how far each of our settings is from them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.cpu.medians import Medians, Point
from bench.text import text_table

TRANSFORMERS, LLAMA_CPP = ("transformers bf16",), ("llama.cpp F16", "llama.cpp F16 flash")


class Target(NamedTuple):
    """A row: its text, the value for one of our settings (None if something was not measured), and its bound."""

    text: str
    value: Callable[[Medians, str], float | None]
    bound: float
    is_least: bool


def speed(part: str, field: str, length: int, over: Sequence[str]) -> Callable[[Medians, str], float | None]:
    """Returns the speedup of one of our settings over the fastest of others, for one sequence of that length."""

    def ratio(numbers: Medians, ours: str) -> float | None:
        def at(system: str) -> float | None:
            found = numbers.get(Point(part, system, length, 1, "warm", field))
            return None if found is None else found.median if field == "prefill_tok_per_s" else 1 / found.median

        mine, theirs = at(ours), [other for name in over if (other := at(name)) is not None]
        return mine / max(theirs) if mine is not None and theirs else None

    return ratio


def growth(part: str, field: str, short: int, long: int) -> Callable[[Medians, str], float | None]:
    """Returns a number at one length over that at a shorter one."""

    def ratio(numbers: Medians, ours: str) -> float | None:
        found = [numbers.get(Point(part, ours, length, 1, "warm", field)) for length in (long, short)]
        return found[0].median / found[1].median if found[0] and found[1] else None

    return ratio


def worst(part: str, field: str, cache: str = "warm") -> Callable[[Medians, str], float | None]:
    """Returns the largest median of a field over all lengths."""

    def value(numbers: Medians, ours: str) -> float | None:
        wanted = (part, ours, cache, field)
        found = [
            number.median
            for point, number in numbers.items()
            if (point.part, point.system, point.cache, point.field) == wanted
        ]
        return max(found, default=None)

    return value


K = 1024
PREFILL, DECODE = "prefill_tok_per_s", "ms_per_token"
TARGETS = (
    Target("prefill 2K over transformers bf16", speed("single", PREFILL, 2 * K, TRANSFORMERS), 1.0, True),
    Target("prefill 8K over transformers bf16", speed("single", PREFILL, 8 * K, TRANSFORMERS), 1.5, True),
    Target("decode 2K over llama.cpp F16", speed("single", DECODE, 2 * K, LLAMA_CPP), 1.0, True),
    Target("decode 8K over llama.cpp F16", speed("single", DECODE, 8 * K, LLAMA_CPP), 1.5, True),
    Target("decode ms, 8K over 1K", growth("single", DECODE, K, 8 * K), 1.3, False),
    Target("decode 8K over our dense", speed("single", DECODE, 8 * K, ("dense",)), 1.6, True),
    Target("prefill 8K over our dense", speed("single", PREFILL, 8 * K, ("dense",)), 1.3, True),
    Target("first answer of a process, nothing compiled, s", worst("start", "answer_s", "cold"), 20.0, False),
    Target("first token of a process, warm, s", worst("start", "first_token_s"), 3.0, False),
    Target("compilations that other prompts add", worst("programs", "grown"), 0.0, False),
    Target("decode ms, 128K over 8K", growth("long", DECODE, 8 * K, 128 * K), 1.3, False),
    Target("peak memory over the plan, largest", worst("long", "plan_ratio"), 1.05, False),
)
"""The targets for speed, compilation and long contexts; llama.cpp counts with its faster setting."""


def verdict(target: Target, value: float | None) -> str:
    """Returns the value with PASS, or with the relative amount by which it misses the target."""
    if value is None:
        return "not measured"
    if value >= target.bound if target.is_least else value <= target.bound:
        return f"{value:.2f} PASS"
    away = abs(value - target.bound) / (target.bound or 1.0)
    return f"{value:.2f} {'short' if target.is_least else 'over'} by {away:.0%}"


def targets_table(numbers: Medians) -> str:
    """Returns the targets, with a column for each of our sparse settings that was measured."""
    columns = [name for name in dict.fromkeys(point.system for point in numbers) if name.startswith("lserve")]
    rows = [
        [target.text, f"{'≥' if target.is_least else '≤'} {target.bound:g}"]
        + [verdict(target, target.value(numbers, name)) for name in columns]
        for target in TARGETS
    ]
    return text_table([["target", "", *columns], *rows])
