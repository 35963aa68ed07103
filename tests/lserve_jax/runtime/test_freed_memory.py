"""Freed memory goes back to the system."""

import sys
from pathlib import Path

import numpy as np
import pytest

from lserve_jax.runtime.freed_memory import give_back_freed_memory


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's C library has the function")
def test_freed_blocks_between_held_ones_are_given_back():
    """Blocks too small for mappings of their own, each second one freed: the C library alone would keep them."""
    blocks = [np.ones(100_000, np.uint8) for _ in range(2000)]
    held = blocks[::2]
    del blocks
    before = resident_bytes()
    give_back_freed_memory()
    assert before - resident_bytes() > 50_000_000
    assert all((block == 1).all() for block in held)


def test_it_may_be_called_at_any_time():
    give_back_freed_memory()
    give_back_freed_memory()
