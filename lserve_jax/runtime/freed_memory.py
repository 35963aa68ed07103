"""Memory that was freed, but that the C library keeps."""

import ctypes
import sys


def give_back_freed_memory() -> None:
    """Gives the system what the C library keeps of freed memory; only Linux's has a function for it.

    Loading weights and compiling programs leave it 150 MiB and more. This takes up to 10 ms, in any thread.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
