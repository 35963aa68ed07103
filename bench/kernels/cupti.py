"""Each kernel's time as the GPU reports it."""

from collections.abc import Callable
from typing import Any

import jax


def kernel_times(run: Callable[[], Any], calls: int) -> dict[str, float]:
    """Returns the microseconds per call of each GPU kernel that ``run`` launches, by name, as CUPTI sees them.

    No gap between kernels counts, which is what differs from the timings. Uses what Mosaic's profiler is made of
    (`jax.experimental.mosaic.gpu.profiler`), which would run a donating program twice on the same arrays.

    Raises:
      RuntimeError: if CUPTI cannot be used, or saw nothing.
    """
    from jax._src.lib import mosaic_gpu as library

    extension = getattr(library, "_mosaic_gpu_ext", None)
    if extension is None:
        raise RuntimeError("this jaxlib has no CUPTI")
    jax.block_until_ready(run())
    extension._cupti_init()
    try:
        jax.block_until_ready(run())
    finally:
        launches = extension._cupti_get_timings(True)
    if not launches:
        raise RuntimeError("CUPTI saw no kernel")
    times: dict[str, float] = {}
    for name, milliseconds in launches:
        times[name] = times.get(name, 0.0) + milliseconds * 1e3 / calls
    return {name: round(time, 3) for name, time in times.items()}
