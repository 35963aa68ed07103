"""Write new keys and values into pages, quantised, with key statistics."""

from pallas_kernels.kv_write.api import kv_write

__all__ = ["kv_write"]
