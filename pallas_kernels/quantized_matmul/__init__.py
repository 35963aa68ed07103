"""Products of rows with weights in 8 or 4 bits."""

from pallas_kernels.quantized_matmul.api import quantized_matmul

__all__ = ["quantized_matmul"]
