"""`prefill_attention` for Hopper: one launch for all heads with the same storage; `program` is one program of it.

The key blocks that a program visits are computed before the launch: as ranges per head class and query block (`walks`),
or per KV head if the caller gives a walk, and as lists of steps if that has a list (`_listed`). The multiprocessors
take programs in order: retrieval heads first, and late queries before early ones. Without a walk, this order is longest
first, so that short programs fill the gaps at the end.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.core.hopper import refuse_pools, refuse_unless, require_hopper
from pallas_kernels.core.launch import configure
from pallas_kernels.core.mosaic import tile
from pallas_kernels.core.online_softmax import HIDDEN
from pallas_kernels.core.paging import LayerKV, PagedKV, PageTables, div_up, parts_stored_alike, pools
from pallas_kernels.core.quantization import QuantizedArray, QuantizedKeys, bits_of
from pallas_kernels.prefill_attention.blocks import (
    BlockList,
    BlockMeans,
    KeyRange,
    Ranges,
    Walk,
    Window,
    visible_blocks,
)
from pallas_kernels.prefill_attention.own import OwnKeys, own_keys
from pallas_kernels.prefill_attention.program import KEYS, QUERIES, Heads, Source, Walks, attend, tile_width

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

    Of a list, they are ranges of its entries.

    Args:
      ranges: `walks` of the classes.
      walk: the layer's walk.
      classes: the heads.
      group: query heads per KV head.
      own_starts: [B] int32 position at which the history ends.
    """
    is_empty = jnp.all(ranges == 0, axis=-1, keepdims=True)
    end = div_up(own_starts, KEYS)[:, None, None]
    found = []
    for index, heads in enumerate(classes):
        shape = (ranges.shape[0], heads.count // group, *ranges.shape[2:])
        every = jnp.broadcast_to(ranges[:, index, None], shape)
        visited = getattr(walk, heads.name)
        if visited is not None:
            nothing = jnp.zeros(shape[:3], jnp.int32)
            is_list = isinstance(visited, BlockList)
            history = Ranges(nothing, nothing, visited.count(end)) if is_list else visited.within(end)
            history = jnp.where(is_empty[:, index, None], 0, jnp.stack(history, axis=-1))
            every = jnp.concatenate([history, every[..., 3:]], axis=-1)
        found.append(every)
    return jnp.concatenate(found, axis=1)


def _listed(
    ranges: jax.Array, walk: Walk, kv: LayerKV, tables: PageTables, own_starts: jax.Array, own_blocks: int
) -> Walks:
    """Returns the lists of steps of each KV head, and the means among them.

    Args:
      ranges: `_walks_per_head`.
      walk: the layer's walk, with a list for one class at least.
      kv: the layer.
      tables: its page tables.
      own_starts: [B] int32 position at which the history ends.
      own_blocks: blocks of own keys.
    """
    history, own = (Ranges(*(ranges[..., i, None] for i in range(first, first + 3))) for first in (0, 3))
    lists = []
    for name, pool, table, heads in pools(kv, tables):
        visited = getattr(walk, name)
        if isinstance(visited, BlockList):
            lists.append(visited.blocks)
        else:
            blocks = jnp.arange(-(-table.shape[1] * pool.page_size // KEYS), dtype=jnp.int32)
            lists.append(Ranges(*(x[:, heads] for x in history)).block(blocks))
    means, bias, mean_counts = _means(jnp.any(ranges != 0, axis=-1), walk, kv, tables, own_starts)
    mean_blocks = 0 if bias is None else bias.shape[-1] // KEYS
    step = jnp.arange(max(x.shape[-1] for x in lists) + own_blocks + mean_blocks + 1, dtype=jnp.int32)
    after, mean = step - history.count, step - history.count - own.count
    entries = jnp.where(mean < mean_counts[..., None], 4 * mean + Source.MEANS, -1)
    entries = jnp.where(mean < 0, 4 * own.block(after) + Source.OWN, entries)
    old = jnp.concatenate([_padded(x, step.size) for x in lists], axis=1)
    entries = jnp.where(after < 0, 4 * old + Source.HISTORY, entries)
    counts = (history.count + own.count)[..., 0] + mean_counts
    return Walks(counts=counts, steps=entries, means=means, bias=bias)


def _means(
    has_rows: jax.Array, walk: Walk, kv: LayerKV, tables: PageTables, own_starts: jax.Array
) -> tuple[dict[str, BlockMeans] | None, jax.Array | None, jax.Array]:
    """Returns the means and the bias of `Walks`, and how many blocks of means each query block visits.

    Args:
      has_rows: [B, K, query blocks] bool, which query blocks have queries.
      walk: the layer's walk.
      kv: the layer.
      tables: its page tables.
      own_starts: [B] int32 position at which the history ends.
    """
    found = {name: getattr(getattr(walk, name), "means", None) for name, *_ in pools(kv, tables)}
    found = {name: means for name, means in found.items() if means is not None}
    if not found:
        return None, None, jnp.zeros(has_rows.shape, jnp.int32)
    width, stands_in = -(-max(x.k.shape[2] for x in found.values()) // KEYS) * KEYS, []
    for name, pool, table, heads in pools(kv, tables):
        if name not in found:
            stands_in.append(jnp.zeros((*has_rows[:, heads].shape, width), jnp.bool_))
            continue
        here = _stands_in(getattr(walk, name), own_starts, table, pool.page_size) & has_rows[:, heads, :, None]
        # Means that stand in nowhere have weight zero, but zero times NaN is NaN.
        is_read, rest = jnp.any(here, axis=2)[..., None], width - here.shape[-1]
        means = (jnp.where(is_read, x, jnp.zeros((), x.dtype)) for x in found[name])
        found[name] = BlockMeans(*(jnp.pad(x, ((0, 0), (0, 0), (0, rest), (0, 0))) for x in means))
        stands_in.append(_padded(here, width))
    every = jnp.concatenate(stands_in, axis=1)
    counts = div_up(jnp.max(jnp.where(every, 1 + jnp.arange(width, dtype=jnp.int32), 0), axis=-1), KEYS)
    weight = math.log(KEYS) * math.sqrt(kv.tail.k.shape[-1])  # in the unit of products
    return found, jnp.where(every, jnp.float32(weight), HIDDEN), counts


def _stands_in(visited: BlockList, own_starts: jax.Array, table: jax.Array, page_size: int) -> jax.Array:
    """Returns whether the mean of each block of the history stands in for it, [B, K, query blocks, n] bool."""
    assert visited.means is not None
    blocks, pages = visited.means.k.shape[2], KEYS // page_size
    held = _padded(table >= 0, max(blocks * pages, table.shape[1]))[:, : blocks * pages]
    is_whole = (1 + jnp.arange(blocks, dtype=jnp.int32)) * KEYS <= own_starts[:, None]
    stands_in = is_whole & jnp.all(held.reshape(-1, blocks, pages), axis=-1)
    return stands_in[:, None, None] & ~visited.is_visited(blocks)


def _padded(x: jax.Array, width: int) -> jax.Array:
    """Returns ``x`` [..., n] with zeros after its last axis, up to a width."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


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
        for mean in getattr(visited, "means", None) or ():
            refuse_unless(mean.dtype == jnp.bfloat16, f"means of blocks must be bfloat16, not {mean.dtype}")
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
    visits = Walks(ranges)
    if any(isinstance(getattr(walk, heads.name, None), BlockList) for heads in classes):
        assert walk is not None
        visits = _listed(ranges, walk, kv, tables, own.starts, own.k.shape[1] // KEYS)
    return kernel(q, own, kv, tables, starts, counts, visits)


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
