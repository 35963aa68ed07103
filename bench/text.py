"""Short texts of numbers, lengths, errors and tables."""

from collections.abc import Sequence

K = 1024


def rounded(x: float) -> float:
    """Returns a number with five significant digits."""
    return float(f"{x:.5g}")


def one_line(error: BaseException) -> str:
    """Returns an exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def length_name(tokens: int) -> str:
    """Returns 131072 as 128K."""
    return f"{tokens // K}K" if tokens % K == 0 else str(tokens)


def length_of(text: str) -> int:
    """Returns the tokens that ``128``, ``8k`` or ``1m`` stand for."""
    unit = {"k": K, "m": K**2}.get(text[-1:].lower(), 1)
    return int(text if unit == 1 else text[:-1]) * unit


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of cells as lines of text; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0].ljust(sum(widths))), *lines[1:]])
