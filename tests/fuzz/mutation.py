"""Changes of valid input at random: of JSON values, of bytes, of text."""

import copy
import json
import random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 255, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, -(2**63)),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 32.0, 1e-45, 1e30, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", " ", "a", "0", "1e5", "None", "true", "\x00", "\n", "é", "\U0001f600", "\ud800", "<s>", "</s>", "a" * 5000),
    *([], {}, [[]], [None], [0], [1, 2, 3], ["a"], [{}], {"": None}, {"a": {"b": []}}, [[1, "a"], [2.5]], [-1, 2**40]),
)
ODD_TEXTS = (
    *("", " ", "\x00", "\x7f", "\ufeff", "\u2028", "\u202e", "e\u0301", "\U0001f468\u200d\U0001f469", "\ud800"),
    *("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "<|", "{{", "{%", "%s", "\\", "\r\n", "\t" * 50),
    *("\uffff", "a" * 3000),
)


def odd_value(rng: random.Random) -> Any:
    """A value that hardly anyone expects; sometimes nested deeply."""
    if rng.random() < 0.02:
        value: Any = rng.choice(ODD_VALUES)
        for _ in range(rng.choice([3, 50, 2000])):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return copy.deepcopy(rng.choice(ODD_VALUES))


def mutated_json(value: Any, rng: random.Random, changes: int | None = None) -> Any:
    """The value with some of its parts replaced, removed, doubled, renamed or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8]) if changes is None else changes):
        places = list(_places(value))
        if not places:
            return odd_value(rng)
        holder, key = rng.choice(places)
        _change(holder, key, rng)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo and len(found) < 5000:
        one = todo.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        found += [(one, key) for key in keys]
        todo += [one[key] for key in keys]
    return found


def _change(holder: Any, key: Any, rng: random.Random) -> None:
    kind = rng.randrange(6)
    value = holder[key]
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["", "a", f"{key}_", str(key).upper(), "\ud800"])] = holder.pop(key)
    elif kind == 2 and isinstance(value, int | float) and not isinstance(value, bool):
        holder[key] = rng.choice([value + 1, -value, value * 2, value * 1000, float(value), str(value), value // 2])
    elif kind == 3 and isinstance(value, str):
        holder[key] = mutated_text(value, rng)
    elif kind == 4 and isinstance(value, list):
        holder[key] = rng.choice([value * 2, value[::-1], value[:-1], [*value, odd_value(rng)]])
    else:
        holder[key] = odd_value(rng)


def mutated_text(text: str, rng: random.Random) -> str:
    """The text with pieces removed, doubled, exchanged or inserted."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        to = min(to, at + rng.choice([1, 3, 20, 200]))
        piece = rng.choice(
            [text[at:to] * 2, "", rng.choice(ODD_TEXTS), text[at:to][::-1], chr(rng.randrange(1, 0xD800))]
        )
        text = text[:at] + piece + text[to:]
    return text


def mutated_bytes(data: bytes, rng: random.Random, header: int) -> bytes:
    """The bytes with some flipped, removed, doubled or overwritten, most often among the first ``header``."""
    held = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if not held:
            break
        limit = len(held) if rng.random() < 0.2 else min(header, len(held))
        at = rng.randrange(limit)
        kind = rng.randrange(6)
        if kind == 0:
            held[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            held[at : at + 8] = rng.choice([b"\xff" * 8, b"\x00" * 8, (2**62).to_bytes(8, "little"), b"\x7f" * 8])
        elif kind == 2:
            del held[at : at + rng.choice([1, 4, 8, 100])]
        elif kind == 3:
            held[at:at] = held[at : at + rng.choice([1, 8, 64])]
        elif kind == 4:
            del held[at:]
        else:
            held[at : at + 4] = rng.randbytes(4)
    return bytes(held)


def as_json(value: Any, rng: random.Random, *, is_damaged: bool = True) -> bytes:
    """The value as JSON, sometimes damaged as a text if ``is_damaged``."""
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    except (RecursionError, ValueError):
        text = "[" * 100_000
    data = text.encode("utf-8", "surrogatepass")
    return mutated_bytes(data, rng, len(data)) if is_damaged and rng.random() < 0.1 else data
