"""The Hopper kernel of `decode_attention`: values against the reference, and machine code for an H200.

Values are interpreted on the CPU, or computed on a Hopper GPU where one is.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PageTables, decode_attention
from pallas_kernels.core.hopper import Device
from pallas_kernels.core.workloads import Workload
from pallas_kernels.decode_attention import mosaic_gpu, reference
from tests.pallas_kernels import hopper
from tests.pallas_kernels.cases import (
    Cache,
    abstract,
    abstract_pools,
    assert_close,
    assert_same_bits,
    filled_cache,
    random_tokens,
)

SMALL = Workload(
    batch=3,
    context=300,
    retrieval=1,
    streaming=1,
    group=3,
    head_dim=64,
    page_size=16,
    sub_page_size=4,
    sink=20,
    local=37,
    num_selected=5,
)
"""The embedded model's group and head size; neither sink nor window is a multiple of the page."""
BITS: list[tuple[int | None, int | None]] = [(None, None), (8, 8), (4, 4), (8, 4)]
H200 = Device("NVIDIA H200", 132)


def _selection(workload: Workload, cache: Cache, rng: np.random.Generator) -> jax.Array:
    """Random pages of each sequence, its open one among them; ascending, and -1 where it has not enough."""
    selected = np.full((workload.batch, workload.retrieval, workload.num_selected), -1, np.int32)
    for b, length in enumerate(cache.lengths):
        held = -(-int(length) // workload.page_size)
        for head in range(workload.retrieval if held else 0):
            others = rng.permutation(held - 1)[: workload.num_selected - 1]
            chosen = np.sort(np.append(others, held - 1))
            selected[b, head, : chosen.size] = chosen
    return jnp.asarray(selected)


def _check(
    workload: Workload, lengths: list[int], *, is_sparse: bool, config: Any = None, detect_races: bool = False
) -> jax.Array:
    rng = np.random.default_rng(1)
    cache = filled_cache(workload, rng, lengths)
    q = jnp.asarray(random_tokens(workload, rng, 1, workload.num_heads)[:, 0])
    selected = _selection(workload, cache, rng) if is_sparse else None
    arguments = (q, cache.kv, cache.tables, jnp.asarray(cache.lengths), selected)
    window = {"sink": workload.sink, "local": workload.local}
    out = hopper.evaluate(
        partial(mosaic_gpu.decode_attention, config=config, **window), *arguments, detect_races=detect_races
    )
    assert_close(out, reference.decode_attention(*arguments, **window), "bfloat16")
    return out


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("bits", BITS, ids=str)
def test_storage(bits: tuple[int | None, int | None], is_sparse: bool) -> None:
    _check(replace(SMALL, bits=bits), [300, 0, 129], is_sparse=is_sparse)


@pytest.mark.parametrize(
    "fields",
    [
        {"group": 1, "head_dim": 128, "page_size": 32},
        {"group": 4, "head_dim": 128, "page_size": 64, "bits": (8, 8)},
        {"group": 8, "head_dim": 128, "page_size": 128, "bits": (4, 4)},
        {"group": 16, "retrieval": 1, "streaming": 0},
        {"group": 9, "retrieval": 0, "streaming": 1, "bits": (8, 4)},
        {"group": 2, "retrieval": 3, "streaming": 2, "bits": (4, None)},
    ],
    ids=lambda fields: "-".join(f"{name}{value}" for name, value in fields.items()),
)
def test_shapes(fields: dict[str, Any]) -> None:
    workload = replace(SMALL, batch=2, **fields)
    _check(workload, [257, 40], is_sparse=bool(workload.retrieval % 2))


@pytest.mark.parametrize("bits", [(None, None), (4, 4)], ids=str)
@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
def test_lengths_about_page_and_block_boundaries(is_sparse: bool, bits: tuple[int | None, int | None]) -> None:
    lengths = [1, 15, 16, 17, 37, 57, 58, 127, 128, 129]
    _check(replace(SMALL, batch=len(lengths), context=144, bits=bits), lengths, is_sparse=is_sparse)


@pytest.mark.parametrize(
    ("page_size", "sub_page_size", "bits"),
    [(16, 2, (8, 8)), (16, 8, (4, 4)), (32, 16, (4, 4)), (64, 2, (4, 4)), (16, 16, (8, 4)), (64, 64, (8, 8))],
    ids=str,
)
def test_sub_pages(page_size: int, sub_page_size: int, bits: tuple[int, int]) -> None:
    workload = replace(SMALL, batch=2, page_size=page_size, sub_page_size=sub_page_size, bits=bits)
    _check(workload, [300, 129], is_sparse=page_size == 16)


def test_a_channel_that_is_large_and_constant() -> None:
    """Keys are dequantised within the bounds of their own sub-page, in more than bfloat16's precision."""
    rng = np.random.default_rng(3)
    workload = replace(SMALL, batch=1, bits=(8, 8), streaming=0)
    k = random_tokens(workload, rng, workload.max_pages * workload.page_size)
    k[..., 5] = 200
    cache = filled_cache(workload, rng, [200], k=k)
    q = jnp.asarray(random_tokens(workload, rng, 1, workload.num_heads)[:, 0])
    arguments = (q, cache.kv, cache.tables, jnp.asarray(cache.lengths), None)
    run = partial(mosaic_gpu.decode_attention, sink=workload.sink, local=workload.local)
    expected = reference.decode_attention(*arguments, sink=workload.sink, local=workload.local)
    assert_close(hopper.evaluate(run, *arguments), expected, "bfloat16")


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("length", [1, 128, 129, 192, 193, 256])
def test_a_large_page_is_open(length: int, bits: tuple[int | None, int | None]) -> None:
    """Two warpgroups share the tail, if it has more than a block."""
    workload = replace(SMALL, batch=1, head_dim=128, page_size=128, sub_page_size=16, bits=bits, streaming=0)
    _check(workload, [length], is_sparse=False)


def test_the_open_page_may_be_anywhere_in_a_full_list_and_slots_may_be_missing() -> None:
    rng = np.random.default_rng(4)
    workload = replace(SMALL, batch=1, bits=(4, 4))
    cache = filled_cache(workload, rng, [75])  # pages 0 to 4
    slot = int(np.asarray(cache.tables.slots)[0])
    tables = cache.tables._replace(slots=None)
    kv = cache.kv._replace(tail=jax.tree.map(lambda x: x[slot:], cache.kv.tail))
    q = jnp.asarray(random_tokens(workload, rng, 1, workload.num_heads)[:, 0])
    run = partial(mosaic_gpu.decode_attention, sink=workload.sink, local=workload.local)
    for pages in ([4, -1, -1, -1, -1], [1, 4, 5, 6, -1], [1, 2, 4, 9, 11], [0, 1, 2, 3, 4]):
        arguments = (q, kv, tables, jnp.asarray(cache.lengths), jnp.asarray([[pages]], jnp.int32))
        expected = reference.decode_attention(*arguments, sink=workload.sink, local=workload.local)
        assert_close(hopper.evaluate(run, *arguments), expected, "bfloat16")


def test_what_is_behind_the_newest_token_and_in_the_open_page_of_the_pool_does_not_matter() -> None:
    rng = np.random.default_rng(5)
    workload = replace(SMALL, batch=2, bits=(8, 4))
    cache = filled_cache(workload, rng, [83, 96])
    q = jnp.asarray(random_tokens(workload, rng, 1, workload.num_heads)[:, 0])
    run = partial(mosaic_gpu.decode_attention, sink=workload.sink, local=workload.local)

    def filled(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.isnan(x), jnp.asarray(7, x.dtype), x) if jnp.issubdtype(x.dtype, jnp.floating) else x

    outs = [
        hopper.evaluate(run, q, kv, cache.tables, jnp.asarray(cache.lengths), None)
        for kv in (cache.kv, jax.tree.map(filled, cache.kv))
    ]
    assert_same_bits(*outs)


@pytest.mark.parametrize("bits", [(None, None), (8, 8)], ids=str)
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_splits(splits: int, bits: tuple[int | None, int | None]) -> None:
    config = mosaic_gpu.Config(block_keys=64, stages=4, warpgroups=2, splits=splits)
    _check(replace(SMALL, batch=2, bits=bits), [300, 65], is_sparse=False, config=config)


@pytest.mark.parametrize("bits", [(None, None), (8, 8)], ids=str)
def test_a_sequence_is_the_same_in_any_batch(bits: tuple[int | None, int | None]) -> None:
    rng = np.random.default_rng(2)
    cache = filled_cache(replace(SMALL, bits=bits), rng, [300, 77, 130])
    q = jnp.asarray(random_tokens(SMALL, rng, 1, SMALL.num_heads)[:, 0])
    config = mosaic_gpu.Config(block_keys=128, stages=2, warpgroups=2, splits=2)
    run = partial(mosaic_gpu.decode_attention, sink=SMALL.sink, local=SMALL.local, config=config)
    together = hopper.evaluate(run, q, cache.kv, cache.tables, jnp.asarray(cache.lengths), None)
    one = cache.alone(1)
    alone = hopper.evaluate(run, q[1:2], one.kv, one.tables, jnp.asarray(one.lengths), None)
    assert_same_bits(together[1:2], alone)


@pytest.mark.parametrize("bits", BITS[:3], ids=str)
def test_races(bits: tuple[int | None, int | None]) -> None:
    config = mosaic_gpu.Config(block_keys=64, stages=4, warpgroups=2, splits=2)
    workload = replace(SMALL, batch=1, bits=bits)
    _check(workload, [300], is_sparse=False, config=config, detect_races=True)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": "float32"}, "queries must be bfloat16, not float32"),
        ({"head_dim": 32}, "head_dim must be 64 or 128, not 32"),
        ({"group": 17}, "at most 16 query heads may share a KV head, not 17"),
        ({"page_size": 48}, "page_size must be 16, 32, 64 or 128, not 48"),
    ],
)
def test_refusals(fields: dict[str, Any], reason: str) -> None:
    workload = replace(SMALL, **fields)
    with hopper.on_h200(), pytest.raises(NotImplementedError, match=reason):
        _trace(workload, implementation="mosaic_gpu")


def test_refuses_a_tail_and_bounds_of_other_dtypes() -> None:
    q, kv, tables, lengths, _ = _arguments(replace(SMALL, bits=(8, 8)))
    wide = jax.tree.map(lambda x: abstract(*x.shape, dtype=np.float32), kv.tail)
    bounds = dict.fromkeys(("k_min", "k_max"), wide.k)
    for broken, reason in (
        (kv._replace(tail=wide), "the tail must be bfloat16, not float32"),
        (kv._replace(streaming=kv.streaming._replace(**bounds)), "bounds of quantised keys must be bfloat16"),
    ):
        run = partial(decode_attention, sink=SMALL.sink, local=SMALL.local, implementation="mosaic_gpu")
        with hopper.on_h200(), pytest.raises(NotImplementedError, match=reason):
            jax.make_jaxpr(run)(q, broken, tables, lengths, None)


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
def test_pools_that_store_differently(is_sparse: bool) -> None:
    workload = replace(SMALL, retrieval=3, streaming=1, group=2, bits=(4, 4), streaming_bits=(8, 8))
    _check(workload, [300, 0, 129], is_sparse=is_sparse)


@pytest.mark.skipif(hopper.has_hopper(), reason="a Hopper GPU is here")
def test_refuses_other_devices() -> None:
    with pytest.raises(NotImplementedError, match=r"need a Hopper GPU \(H100, H200\); this device is 'cpu'"):
        _trace(SMALL, implementation="mosaic_gpu")


def test_is_chosen_on_hopper() -> None:
    with hopper.on_h200():
        assert "mpmd_map" in str(_trace(SMALL, implementation=None))
    if not hopper.has_hopper():
        assert "mpmd_map" not in str(_trace(SMALL, implementation=None))


def _arguments(workload: Workload) -> tuple[Any, ...]:
    pools = abstract_pools(workload, workload.batch * workload.max_pages)
    kv = pools._replace(
        retrieval=pools.retrieval if workload.retrieval else None,
        streaming=pools.streaming if workload.streaming else None,
    )
    table = abstract(workload.batch, workload.max_pages)
    q = abstract(workload.batch, workload.num_heads, workload.head_dim, dtype=jnp.dtype(workload.dtype))
    return q, kv, PageTables(table, table, abstract(workload.batch)), abstract(workload.batch), None


def _trace(workload: Workload, **options: Any) -> Any:
    run = partial(decode_attention, sink=workload.sink, local=workload.local, **options)
    return jax.make_jaxpr(run)(*_arguments(workload))


@pytest.mark.parametrize(
    "is_split", [pytest.param(False, id="whole", marks=pytest.mark.sweep), pytest.param(True, id="split")]
)
@pytest.mark.parametrize(
    ("head_dim", "group", "page_size", "sub_page_size", "bits"),
    [
        *((head_dim, 4, 64, 16, bits) for head_dim in (64, 128) for bits in BITS),
        *((128, 4, *sizes, (8, 8)) for sizes in ((16, 2), (16, 4), (32, 8), (64, 64), (128, 16))),
        *((128, 4, *sizes, (4, 4)) for sizes in ((16, 2), (16, 4), (32, 8))),
        *((64, 16, page_size, 16, (None, None)) for page_size in (16, 32, 128)),
        *((128, 16, 64, 16, bits) for bits in BITS),
        (64, 3, 16, 16, (8, 8)),
        (64, 4, 128, 128, (8, 8)),
    ],
    ids=str,
)
def test_machine_code(
    head_dim: int, group: int, page_size: int, sub_page_size: int, bits: tuple[int | None, int | None], is_split: bool
) -> None:
    workload = replace(
        SMALL,
        batch=1 if is_split else 128,
        context=8192,
        head_dim=head_dim,
        group=group,
        page_size=page_size,
        sub_page_size=sub_page_size,
        bits=bits,
    )
    run = partial(mosaic_gpu.decode_attention, sink=workload.sink, local=workload.local)
    _, kernels = hopper.compiled(run, *_arguments(workload))
    hopper.assert_fits(kernels, count=2 if is_split else 1)


def test_streaming_heads_that_store_differently_have_one_launch_more() -> None:
    workload = replace(SMALL, batch=1, context=8192, bits=(4, 4), streaming_bits=(8, 8))
    run = partial(mosaic_gpu.decode_attention, sink=workload.sink, local=workload.local)
    _, kernels = hopper.compiled(run, *_arguments(workload))
    hopper.assert_fits(kernels, count=3)  # retrieval heads are split, and joined


@pytest.mark.parametrize("pages", [1, 64, 2048, 16384])
@pytest.mark.parametrize("batch", [1, 8, 32, 256])
def test_heuristic(batch: int, pages: int) -> None:
    for head_dim in (64, 128):
        for page_size in (16, 32, 64, 128):
            for bits in ((16, 16), (8, 8), (4, 4), (8, 4), (16, 4)):
                for sub in (2, 16, page_size):
                    config = mosaic_gpu.heuristic(H200, batch, 4, 4, head_dim, page_size, sub, bits, pages)
                    assert config.stages % config.warpgroups == 0 and config.stages >= config.warpgroups
                    assert (
                        config.block_keys % 64 == 0
                        and (config.block_keys % page_size) * (page_size % config.block_keys) == 0
                    )
                    assert config.splits == 1 or config.splits * batch * 4 <= H200.multiprocessors
