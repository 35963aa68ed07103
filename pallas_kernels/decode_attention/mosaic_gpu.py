"""`decode_attention` for Hopper: one launch for all heads with the same storage; `program` is one program of it."""

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.core.hopper import SHARED_MEMORY, Device, refuse_pools, refuse_unless, require_hopper
from pallas_kernels.core.launch import configure
from pallas_kernels.core.mosaic import channel_per_thread, tile
from pallas_kernels.core.paging import (
    LayerKV,
    PagedKV,
    PageTables,
    parts_stored_alike,
    pools,
    slots_of,
    streaming_page_count,
)
from pallas_kernels.core.quantization import QuantizedArray, QuantizedKeys, bits_of
from pallas_kernels.decode_attention.program import Heads, attend


@dataclass(frozen=True)
class Config:
    """A launch.

    Attributes:
      block_keys: keys per block, a multiple of 64 that divides the page size or is a multiple of it.
      stages: blocks in flight, a multiple of ``warpgroups``.
      warpgroups: compute warpgroups; one more copies.
      splits: programs that share the pages of a retrieval head.
    """

    block_keys: int
    stages: int
    warpgroups: int
    splits: int


@partial(jax.jit, static_argnames=("sink", "local", "config"))
def decode_attention(
    q: jax.Array,
    kv: LayerKV,
    tables: PageTables,
    lengths: jax.Array,
    selected: jax.Array | None,
    *,
    sink: int,
    local: int,
    config: Config | None = None,
) -> jax.Array:
    """Returns what `pallas_kernels.decode_attention` defines; ``config`` overrides the tuned launch.

    It is jitted for the cache: layers of one shape share one kernel, which takes seconds to build.

    Raises:
      NotImplementedError: on any device but a Hopper GPU, and for arguments that the kernel does not support.
    """
    device = require_hopper()
    alike = parts_stored_alike(kv, q.shape[1])
    if len(alike) > 1:
        parts = [(q[:, heads], part._replace(tail=kv.tail)) for part, heads in alike]  # no copy of the tail
        run = partial(decode_attention, sink=sink, local=local, config=config)
        return jnp.concatenate([run(*part, tables, lengths, selected) for part in parts], axis=1)
    found = pools(kv, tables)
    batch, num_heads, head_dim = q.shape
    num_kv_heads = sum(pool.num_kv_heads for _, pool, _, _ in found)
    group = num_heads // num_kv_heads
    _refuse(q, kv, [pool for _, pool, _, _ in found], group)
    classes: list[Heads] = []
    for name, pool, table, heads in found:
        window = (sink, local) if name == "streaming" else None
        listed = selected if name == "retrieval" else None
        pages = (
            streaming_page_count(sink, local, pool.page_size)
            if window
            else (table if listed is None else listed).shape[-1]
        )
        config = config or _configure(device, batch, group, pool, pages)
        splits = config.splits if name == "retrieval" else 1  # streaming heads read a handful of pages
        tail_first = 0 if name == "retrieval" else kv.tail.k.shape[1] - pool.num_kv_heads
        classes.append(Heads(name, pool, heads.start, tail_first, group, splits, pages, listed is not None, window))
    assert config is not None
    tables = tables._replace(slots=slots_of(tables, batch))
    queries = q.reshape(batch, num_kv_heads, group, head_dim)
    whole, parts, scale = _launch(queries, kv, tables, lengths, selected, classes, config)
    return (whole if classes[0].splits == 1 else _merge(whole, parts, scale)).reshape(q.shape)


def heuristic(
    device: Device,
    batch: int,
    heads: int,
    group: int,
    head_dim: int,
    page_size: int,
    sub_page_size: int,
    bits: tuple[int, int],
    pages: int,
) -> Config:
    """Returns the launch for a shape: one program per multiprocessor, with nearly all of its shared memory.

    Splits do not depend on load. There are as many as make one wave of programs, limited so that each warpgroup has a
    turn and the parts are few enough to join.
    """
    block_keys = 64 * 128 // head_dim
    stage = _stage_bytes(block_keys, head_dim, sub_page_size, bits)

    def depth(warpgroups: int) -> int:
        room = SHARED_MEMORY - 6 * 1024 - _fixed_bytes(block_keys, head_dim, page_size, _padded(group), warpgroups)
        return max(1, min(4, room // (stage * warpgroups)))

    # Codes are more work, but wide groups take more registers, and the bounds of small sub-pages more memory.
    warpgroups = 2 if bits == (16, 16) or group > 8 or depth(3) == 1 else 3
    wave = device.multiprocessors // (batch * heads)
    turns = -(-pages * page_size // (block_keys * warpgroups))
    return Config(
        block_keys=block_keys,
        stages=depth(warpgroups) * warpgroups,
        warpgroups=warpgroups,
        splits=max(1, min(wave, turns, 32)),
    )


def _configure(device: Device, batch: int, group: int, pool: PagedKV, pages: int) -> Config:
    heads, size, head_dim, bits = pool.num_kv_heads, pool.page_size, pool.k.shape[-1], _bits(pool)
    sub = pool.sub_page_size if isinstance(pool.k, QuantizedKeys) else size
    page = f"page{size}" if sub == size else f"page{size}_sub{sub}"
    shape = f"batch{batch}_heads{heads}_group{group}_dim{head_dim}_{page}_k{bits[0]}v{bits[1]}_pages{pages}"
    default = heuristic(device, batch, heads, group, head_dim, size, sub, bits, pages)
    return configure("decode_attention", device.kind, shape, default)


def _stage_bytes(block_keys: int, head_dim: int, sub_page_size: int, bits: tuple[int, int]) -> int:
    """Returns the shared memory of one block: its keys and values, bounds of quantised keys, scales of values."""
    bounds = 4 * _bound_rows(block_keys, head_dim, sub_page_size) * head_dim if bits[0] < 16 else 0
    return block_keys * head_dim * sum(bits) // 8 + bounds + (4 * block_keys if bits[1] < 16 else 0)


def _fixed_bytes(block_keys: int, head_dim: int, page_size: int, padded: int, warpgroups: int) -> int:
    """Returns the shared memory that does not depend on the stages, but for a few vectors and barriers."""
    own = block_keys * head_dim * 2 + padded * (head_dim + block_keys) * 2  # wide values, queries and weights
    results = warpgroups * padded * head_dim * 4  # one fewer to join, and a part
    tail = max(page_size, block_keys) * head_dim * 2
    return warpgroups * own + results + padded * head_dim * (2 + 2) + tail


def _bound_rows(block_keys: int, head_dim: int, sub_page_size: int) -> int:
    """Returns the sub-pages of a block; at least as many as give each thread of a warpgroup a number."""
    return max(block_keys // sub_page_size, 128 // head_dim)


def _bits(pool: PagedKV) -> tuple[int, int]:
    return bits_of(pool.k), bits_of(pool.v)


def _refuse(q: jax.Array, kv: LayerKV, found: list[PagedKV], group: int) -> None:
    """Refuses arguments that the kernel does not support."""
    refuse_unless(q.dtype == jnp.bfloat16, f"queries must be bfloat16, not {q.dtype}")
    refuse_unless(q.shape[-1] in (64, 128), f"head_dim must be 64 or 128, not {q.shape[-1]}")
    refuse_unless(group <= 16, f"at most 16 query heads may share a KV head, not {group}")
    refuse_unless(kv.tail.k.dtype == jnp.bfloat16, f"the tail must be bfloat16, not {kv.tail.k.dtype}")
    refuse_pools(found)
    for pool in found:
        if isinstance(pool.k, QuantizedKeys):
            assert pool.k_min is not None
            dtype = pool.k_min.dtype
            refuse_unless(dtype == jnp.bfloat16, f"bounds of quantised keys must be bfloat16, not {dtype}")


def _launch(
    queries: jax.Array,
    kv: LayerKV,
    tables: PageTables,
    lengths: jax.Array,
    selected: jax.Array | None,
    classes: list[Heads],
    config: Config,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the kernel's results for queries [B, K, G, H].

    Returns:
      Outputs [B, K, G, H] bfloat16 of the heads that are not split; those of split heads are not written.
      Parts [B, K of the first class, splits, G, H] float32 of the split heads.
      The base-2 logarithm [B, K of the first class, splits, G padded] float32 of each part's sum of exponentials.
    """
    batch, _, group, head_dim = queries.shape
    programs = [batch * heads.pool.num_kv_heads * heads.splits for heads in classes]
    parts = (batch, classes[0].pool.num_kv_heads, classes[0].splits, group, head_dim)

    def decode_attention(*refs: Any) -> None:
        *arrays, scratch = refs
        program = jax.lax.axis_index("program")
        start = 0
        for heads, count in zip(classes, programs, strict=True):
            run = partial(attend, heads, config.stages, program - start, *arrays, scratch)
            pl.when((program >= start) & (program < start + count))(run)
            start += count

    kernel = plgpu.kernel(
        decode_attention,
        out_type=(
            jax.ShapeDtypeStruct(queries.shape, jnp.bfloat16),
            jax.ShapeDtypeStruct(parts, jnp.float32),
            jax.ShapeDtypeStruct((*parts[:3], _padded(group)), jnp.float32),
        ),
        grid=(sum(programs),),
        grid_names=("program",),
        num_threads=config.warpgroups + 1,
        thread_name="role",
        scratch_types=[_scratch(config, classes[0].pool, group, head_dim)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    listed = jnp.zeros((1, 1, 1), jnp.int32) if selected is None else selected
    return kernel(queries, kv, tables, lengths, listed)


def _scratch(config: Config, pool: PagedKV, group: int, head_dim: int) -> dict[str, Any]:
    """Returns the shared memory of a program."""
    padded = _padded(group)
    keys, warpgroups, bits = config.block_keys, config.warpgroups, _bits(pool)
    k_columns, v_columns = (head_dim // 2 if bit == 4 else None for bit in bits)  # 4-bit codes have two parts
    runs = max(pool.page_size // keys, 1)
    return {
        **_ring(config, pool, head_dim),
        "q": plgpu.SMEM((padded, head_dim), jnp.bfloat16),
        "q_ready": plgpu.Barrier(),
        # The open page; its values are in ``v_wide``:
        "tail_k": tile((runs, keys, head_dim), jnp.bfloat16, k_columns),
        "tail_ready": plgpu.Barrier(num_arrivals=2, num_barriers=runs),
        # For each warpgroup:
        "q_tile": tile((warpgroups, padded, head_dim), jnp.bfloat16 if bits[0] == 16 else jnp.float16, k_columns),
        "v_wide": tile((warpgroups, keys, head_dim), jnp.bfloat16, v_columns),
        "p": tile((warpgroups, padded, keys), jnp.bfloat16, v_columns and min(v_columns, 64)),
        # To join warpgroups, and for the result:
        "values": plgpu.SMEM((warpgroups - 1, padded, head_dim), jnp.float32),
        "vectors": plgpu.SMEM((warpgroups - 1, 4, padded), jnp.float32),
        "joined": plgpu.Barrier(num_arrivals=warpgroups - 1),
        "out": plgpu.SMEM((padded, head_dim), jnp.bfloat16),
        "part": plgpu.SMEM((padded, head_dim), jnp.float32),
        "scale": plgpu.SMEM((padded,), jnp.float32),
    }


def _ring(config: Config, pool: PagedKV, head_dim: int) -> dict[str, Any]:
    """Returns the shared memory of the blocks in flight: keys, their bounds if they are quantised, and values."""
    keys, stages, bits = config.block_keys, config.stages, _bits(pool)
    runs = max(keys // pool.page_size, 1)

    def memory(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return plgpu.SMEM((stages, *shape), dtype)

    def codes(bit: int, columns: int | None = None) -> Any:
        return tile((stages, keys, head_dim * bit // 8), jnp.uint8, columns)

    k = v = tile((stages, keys, head_dim), jnp.bfloat16)
    bounds = ()
    if isinstance(pool.k, QuantizedKeys):
        k = QuantizedKeys(codes=codes(bits[0], min(pool.k.codes.shape[-1], 64)), bits=bits[0])
        bounds = (memory(_bound_rows(keys, head_dim, pool.sub_page_size), head_dim),) * 2
    if isinstance(pool.v, QuantizedArray):
        vector = memory(keys, dtype=jnp.float16)
        v = QuantizedArray(codes=codes(bits[1]), scale=vector, low=vector, bits=bits[1])
    return {
        "k": k,
        "bounds": bounds,
        "v": v,
        "k_ready": plgpu.Barrier(num_arrivals=runs * (1 + len(bounds)), num_barriers=stages),
        "v_ready": plgpu.Barrier(num_arrivals=runs * len(jax.tree.leaves(pool.v)), num_barriers=stages),
        "free": plgpu.Barrier(num_barriers=stages),
    }


def _padded(group: int) -> int:
    """Returns the wgmma columns of a query group."""
    return -(-group // 8) * 8


def _merge(whole: jax.Array, parts: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns outputs [B, K, G, H] after joining the parts of split heads in place, by a softmax over their scales.

    It is a separate kernel with one program per query head; XLA would make three kernels of it.
    """
    batch, num_heads, splits, group, head_dim = parts.shape
    out = jax.new_ref(whole)

    def decode_attention_merge(parts_gmem: Any, scale_gmem: Any) -> None:
        b, head, g = (jax.lax.axis_index(axis) for axis in ("b", "head", "g"))
        scales = [scale_gmem[b, head, split, g] for split in range(splits)]
        layout = channel_per_thread(head_dim)
        values = [
            plgpu.load(parts_gmem.at[b, head, split, g], layout=layout, optimized=False) for split in range(splits)
        ]
        weights = [jnp.exp2(x - reduce(jnp.maximum, scales)) for x in scales]
        joined = reduce(jnp.add, [x * weight for x, weight in zip(values, weights, strict=True)])
        out[b, head, g] = (joined / reduce(jnp.add, weights)).astype(out.dtype)

    plgpu.kernel(decode_attention_merge, grid=(batch, num_heads, group), grid_names=("b", "head", "g"))(parts, scale)
    return jax.freeze(out)
