"""`prefill_attention` for Hopper: one launch for all heads with the same storage; `program` is one program of it.

The ranges of key blocks that a program visits are computed before the launch: per head class and query block (`walks`),
or per KV head if the caller gives a walk. The multiprocessors take programs in order: retrieval heads first, and late
queries before early ones. Without a walk, this order is longest first, so that short programs fill the gaps at the end.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.core.hopper import refuse_pools, refuse_unless, require_hopper
from pallas_kernels.core.launch import configure
from pallas_kernels.core.mosaic import tile
from pallas_kernels.core.paging import LayerKV, PagedKV, PageTables, div_up, parts_stored_alike, pools
from pallas_kernels.core.quantization import QuantizedArray, QuantizedKeys, bits_of
from pallas_kernels.prefill_attention.blocks import (
    BlockList,
    BlockRanges,
    KeyRange,
    Walk,
    Window,
    visible_blocks,
)
from pallas_kernels.prefill_attention.own import OwnKeys, own_keys
from pallas_kernels.prefill_attention.program import KEYS, QUERIES, Heads, attend, tile_width

_EVERYTHING = 2**30
"""The local window of retrieval heads."""


@dataclass(frozen=True)
class Config:
    """A launch: the blocks of keys and of values in flight."""

    stages: int


@partial(jax.jit, static_argnames=("sink", "local", "has_history"))
def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv: LayerKV,
    tables: PageTables,
    starts: jax.Array,
    counts: jax.Array,
    *,
    sink: int,
    local: int,
    has_history: bool = True,
    walk: Walk | None = None,
) -> jax.Array:
    """Returns what `pallas_kernels.prefill_attention` defines; rows from ``counts`` on are zeros.

    It is jitted for the cache: layers of one shape share one kernel, which takes seconds to build.

    Raises:
      NotImplementedError: on any device but a Hopper GPU, and for arguments that the kernel does not support.
    """
    device = require_hopper()
    alike = parts_stored_alike(kv, q.shape[2])
    if len(alike) > 1:
        kv_heads = [heads for _, heads in parts_stored_alike(kv, k.shape[2])]
        call = partial(prefill_attention, sink=sink, local=local, has_history=has_history, walk=walk)
        each = [
            call(q[:, :, heads], k[:, :, new], v[:, :, new], part, tables, starts, counts)
            for (part, heads), new in zip(alike, kv_heads, strict=True)
        ]
        return jnp.concatenate(each, axis=2)
    found = pools(kv, tables)
    (_, tokens, _, head_dim), group = q.shape, q.shape[2] // k.shape[2]
    _refuse(q, k, v, [pool for _, pool, _, _ in found], walk)
    pool = found[0][1]
    shape = f"dim{head_dim}_page{pool.page_size}_k{bits_of(pool.k)}v{bits_of(pool.v)}"
    config = configure("prefill_attention", device.kind, shape, heuristic(head_dim))
    classes = [
        Heads(name, heads.start * group, pool.num_kv_heads * group, Window(0, _EVERYTHING))
        if name == "retrieval"
        else Heads(name, heads.start * group, pool.num_kv_heads * group, Window(sink, local))
        for name, pool, _, heads in found
    ]
    starts, counts = jnp.asarray(starts, jnp.int32), jnp.asarray(counts, jnp.int32)
    own = own_keys(k, v, kv, tables, starts, counts) if has_history else OwnKeys(k, v, starts, counts)
    q, k, v = (_whole_blocks(x, size) for x, size in ((q, QUERIES), (own.k, KEYS), (own.v, KEYS)))
    own = own._replace(k=k, v=v)
    return _launch(q, own, kv, tables, starts, counts, classes, config, pool, walk)[:, :tokens]


def _whole_blocks(x: jax.Array, size: int) -> jax.Array:
    """Returns ``x`` [B, tokens, …] with zeros after its tokens, up to whole blocks of ``size``."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))


def heuristic(head_dim: int) -> Config:
    """Returns the launch for a head dimension: at least two stages, in rings of 128 KiB, which leave room for codes."""
    return Config(stages=2 if head_dim == 128 else 4)


def walks(starts: jax.Array, counts: jax.Array, own_starts: jax.Array, tokens: int, windows: list[Window]) -> jax.Array:
    """Returns the key blocks that each query block visits, as ranges [B, classes, query blocks, 6] int32.

    The ranges are (s, low, high) of the history, then of the own keys: blocks ``0 … s − 1`` and ``low … high − 1`` of
    `KEYS` keys, counted from the first key of the source. Each of them contains a key that one of the queries sees, and
    no other block does. A query block after ``counts`` visits nothing.

    Args:
      starts: [B] int32 position of each sequence's first query.
      counts: [B] int32 queries of each sequence.
      own_starts: [B] int32 position of the first own key, where the history ends.
      tokens: T, rows of the chunk.
      windows: what each class sees.
    """
    row = jnp.arange(-(-tokens // QUERIES), dtype=jnp.int32) * QUERIES
    starts, counts, own_starts = (x[:, None] for x in (starts, counts, own_starts))
    sources = (KeyRange(0, own_starts, KEYS), KeyRange(own_starts, starts + counts, KEYS))
    ranges = [
        jnp.stack([jnp.broadcast_to(x, (starts.shape[0], row.size)) for source in sources for x in found(source)], -1)
        for window in windows
        for found in [partial(visible_blocks, starts + row, QUERIES, window=window)]
    ]
    return jnp.where((row < counts)[:, None, :, None], jnp.stack(ranges, axis=1), 0)


def _walks_per_head(
    ranges: jax.Array, walk: Walk, classes: list[Heads], group: int, own_starts: jax.Array
) -> jax.Array:
    """Returns the ranges [B, K, query blocks, 6] of each KV head: `walks`, with the history's ranges from a walk.

    Args:
      ranges: `walks` of the classes.
      walk: the layer's walk.
      classes: the heads.
      group: query heads per KV head.
      own_starts: [B] int32 position at which the history ends.
    """
    batch, _, blocks, _ = ranges.shape
    is_empty = jnp.all(ranges == 0, axis=-1, keepdims=True)
    found = []
    for index, heads in enumerate(classes):
        every = jnp.broadcast_to(ranges[:, index, None], (batch, heads.count // group, blocks, 6))
        visited = getattr(walk, heads.name)
        if isinstance(visited, BlockRanges):
            history = jnp.stack(visited.within(div_up(own_starts, KEYS)[:, None, None]), axis=-1)
            history = jnp.where(is_empty[:, index, None], 0, history)
            every = jnp.concatenate([history, every[..., 3:]], axis=-1)
        found.append(every)
    return jnp.concatenate(found, axis=1)


def _refuse(q: jax.Array, k: jax.Array, v: jax.Array, found: list[PagedKV], walk: Walk | None) -> None:
    """Refuses arguments that the kernel does not support."""
    for x in (q, k, v):
        refuse_unless(x.dtype == jnp.bfloat16, f"queries, keys and values must be bfloat16, not {x.dtype}")
    refuse_unless(q.shape[-1] in (64, 128), f"head_dim must be 64 or 128, not {q.shape[-1]}")
    refuse_pools(found)
    for pool in found:
        if isinstance(pool.k, QuantizedKeys):
            assert pool.k_min is not None
            refuse_unless(pool.k_min.dtype == jnp.bfloat16, f"bounds of keys must be bfloat16, not {pool.k_min.dtype}")
            # Shared memory holds the bounds of a block beside its codes.
            least = 4 if (q.shape[-1], bits_of(pool.k), bits_of(pool.v)) == (128, 8, 8) else 2
            refuse_unless(
                pool.sub_page_size >= least,
                f"sub-pages of quantised keys must have {least} tokens or more, not {pool.sub_page_size}",
            )
    for visited in walk or ():
        refuse_unless(not isinstance(visited, BlockList), "the walk must be ranges, not block lists")
        sizes = None if visited is None else (visited.queries, visited.keys)
        refuse_unless(
            sizes in (None, (QUERIES, KEYS)),
            f"blocks of the walk must be {QUERIES} queries and {KEYS} keys, not {sizes}",
        )


def _launch(
    q: jax.Array,
    own: OwnKeys,
    kv: LayerKV,
    tables: PageTables,
    starts: jax.Array,
    counts: jax.Array,
    classes: list[Heads],
    config: Config,
    pool: PagedKV,
    walk: Walk | None,
) -> jax.Array:
    """Runs the kernel on a chunk of whole query blocks, and on whole blocks of own keys."""
    batch, tokens, num_heads, head_dim = q.shape

    def prefill_attention(*refs: Any) -> None:
        *arrays, scratch = refs
        attend(classes, walk is not None, config.stages, *arrays, scratch=scratch)

    kernel = plgpu.kernel(
        prefill_attention,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(batch * num_heads * (tokens // QUERIES),),
        grid_names=("program",),
        num_threads=3,
        thread_name="role",
        scratch_types=[_scratch(config, pool, head_dim)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    ranges = walks(starts, counts, own.starts, tokens, [heads.window for heads in classes])
    if walk is not None:
        ranges = _walks_per_head(ranges, walk, classes, num_heads // own.k.shape[2], own.starts)
    return kernel(q, own, kv, tables, starts, counts, ranges)


def _scratch(config: Config, pool: PagedKV, head_dim: int) -> dict[str, Any]:
    """Returns the shared memory of a program: queries, rings of keys and values, and codes before their conversion."""
    columns = tile_width(pool, head_dim)  # for all operands: those of a product need the same swizzle
    parts = KEYS // pool.page_size
    scratch = {
        "q": tile((2, QUERIES // 2, head_dim), jnp.bfloat16, columns),
        "q_ready": plgpu.Barrier(num_barriers=2),
        "turn": plgpu.Barrier(num_barriers=2),
    }
    bounds: Any = plgpu.SMEM((KEYS // pool.sub_page_size, head_dim), jnp.bfloat16)
    # The copy engine writes to multiples of 128 bytes, so that a page's 16 or 32 numbers have a row of their own.
    vectors: Any = plgpu.SMEM((parts, max(pool.page_size, 64)), jnp.float16)
    for name, stored, numbers in (("k", pool.k, bounds), ("v", pool.v, vectors)):
        scratch[name] = tile((config.stages, KEYS, head_dim), jnp.bfloat16, columns)
        scratch[f"{name}_ready"] = plgpu.Barrier(num_arrivals=parts, num_barriers=config.stages)
        scratch[f"{name}_free"] = plgpu.Barrier(num_arrivals=2, num_barriers=config.stages)
        if isinstance(stored, QuantizedKeys | QuantizedArray):
            codes: Any = plgpu.SMEM((KEYS, head_dim * bits_of(stored) // 8), jnp.uint8)
            scratch[f"{name}_codes"] = (codes, numbers, numbers)
            scratch[f"{name}_landed"] = plgpu.Barrier(num_arrivals=parts * 3)
    return scratch
