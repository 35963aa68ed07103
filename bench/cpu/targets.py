"""The targets for a CPU, and how far each of our settings is from them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.cpu.medians import Medians, Point
from bench.text import text_table

TRANSFORMERS = ("transformers bf16",)
LLAMA_F16, LLAMA_Q8 = (tuple(f"llama.cpp {kind}{flash}" for flash in ("", " flash")) for kind in ("F16", "Q8_0"))


class Target(NamedTuple):
    """A row: its text, the value for one of our settings (None if something was not measured), and its bound."""

    text: str
    value: Callable[[Medians, str], float | None]
    bound: float
    is_least: bool


def speed(
    part: str, field: str, length: int, over: Sequence[str], batch: int = 1
) -> Callable[[Medians, str], float | None]:
    """Returns the speedup of one of our settings over the fastest of others, for sequences of that length."""

    def ratio(numbers: Medians, ours: str) -> float | None:
        def at(system: str) -> float | None:
            found = numbers.get(Point(part, system, length, batch, "warm", field))
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
    *(
        Target(f"prefill {name} over transformers bf16", speed("single", PREFILL, length, TRANSFORMERS), bound, True)
        for name, length, bound in (("512", 512, 1.1), ("2K", 2 * K, 1.0), ("8K", 8 * K, 1.3))
    ),
    *(
        Target(f"decode {name} over llama.cpp F16", speed("single", DECODE, length, LLAMA_F16), bound, True)
        for name, length, bound in (("128", 128, 1.05), ("2K", 2 * K, 1.25), ("8K", 8 * K, 2.0))
    ),
    *(
        Target(f"decode {name} over llama.cpp Q8_0", speed("single", DECODE, length, LLAMA_Q8), bound, True)
        for name, length, bound in (("128", 128, 0.85), ("2K", 2 * K, 1.1))
    ),
    Target("a step of 4 at 2K over llama.cpp F16", speed("batch", DECODE, 2 * K, LLAMA_F16, batch=4), 1.6, True),
    Target("decode ms, 8K over 1K", growth("single", DECODE, K, 8 * K), 1.3, False),
    Target("decode 8K over our dense", speed("single", DECODE, 8 * K, ("dense",)), 1.6, True),
    Target("prefill 8K over our dense", speed("single", PREFILL, 8 * K, ("dense",)), 1.3, True),
    Target("first answer of a process, nothing compiled, s", worst("start", "answer_s", "cold"), 20.0, False),
    Target("first token of a process, warm, s", worst("start", "first_token_s"), 2.2, False),
    Target("first token of a process, nothing compiled, s", worst("start", "first_token_s", "cold"), 4.5, False),
    Target("compilations that other prompts add", worst("programs", "grown"), 0.0, False),
    Target("decode ms, 128K over 8K", growth("long", DECODE, 8 * K, 128 * K), 1.3, False),
    Target("peak memory above interpreter and plan, GiB", worst("memory", "extra_gib"), 0.6, False),
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
