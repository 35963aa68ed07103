"""Attention of a prompt chunk over lists of history blocks, beside attention over the whole history, interleaved.

    python -m bench.blocks --out bench/results/blocks

It writes DIR/blocks.jsonl, one line per density: milliseconds of the attention, of the choice of the blocks, and their
shares of the time of dense attention. The lists are random; what a model lists, `LLM.prefill_density` tells.
"""

import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.command_line import command_parser
from bench.kernels.arrays import layer, normal
from bench.measure import timed
from bench.provenance import provenance
from bench.text import text_table
from pallas_kernels import BlockList, BlockMeans, Walk, block_select, prefill_attention
from pallas_kernels.core.workloads import PREFILL, Workload

DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
QUERIES = KEYS = 128


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the bench."""
    args = _arguments(arguments)
    workload = replace(PREFILL["smollm2_135m_8k_chunk2k_int8"], streaming=0, context=args.context, chunk=args.chunk)
    calls = _calls(workload)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        timed(call)
    for _ in range(args.rounds):
        for name, call in calls.items():
            seconds[name].append(timed(call)[0])
    medians = {name: float(np.median(found)) for name, found in seconds.items()}
    lines = [_line(args, name, medians) for name in calls]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "blocks.jsonl").write_text("".join(json.dumps(line | provenance()) + "\n" for line in lines))
    print(
        text_table([["call", "ms", "of dense"], *[[x["call"], f"{x['ms']:.2f}", f"{x['share']:.3f}"] for x in lines]])
    )


def _arguments(arguments: Sequence[str] | None) -> Namespace:
    parser = command_parser("bench.blocks", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--context", type=int, default=32768, help="tokens up to the chunk's end (default: 32768)")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of the chunk (default: 512)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default: 9)")
    return parser.parse_args(arguments)


def _calls(w: Workload) -> Mapping[str, Callable[[], Any]]:
    """Returns what is timed, by name: dense attention, the choice of blocks, and attention over lists."""
    rng, start = np.random.default_rng(0), w.context - w.chunk
    kv, [tables] = layer(w, 1, 0)
    q = normal(w, 3, w.batch, w.chunk, w.num_heads, w.head_dim)
    k, v = (normal(w, seed, w.batch, w.chunk, w.num_kv_heads, w.head_dim) for seed in (4, 5))
    starts, counts, ends = (jnp.full(w.batch, x, jnp.int32) for x in (start, w.chunk, 2**30))
    attend = jax.jit(partial(prefill_attention, sink=w.sink, local=w.prefill_local))
    dense = partial(attend, q, k, v, kv, tables, starts, counts)
    assert kv.retrieval is not None
    means = (normal(w, seed, kv.retrieval.k.shape[0], w.retrieval, w.head_dim) for seed in (6, 7))
    pool = kv.retrieval._replace(**dict(zip(("k_mean", "v_mean"), means, strict=True)))
    rule = {"threshold": 0.1, "sink": w.sink, "local": 512, "last": 0, "least": 0}
    select = jax.jit(partial(block_select, queries=QUERIES, keys=KEYS, **rule))
    calls: dict[str, Callable[[], Any]] = {
        "dense": dense,
        "select": partial(select, q, pool, tables.retrieval, starts, counts, ends),
    }
    for density in DENSITIES:
        calls[f"{density:.0%} of the blocks"] = partial(dense, walk=Walk(retrieval=_lists(w, rng, density)))
    return calls


def _lists(w: Workload, rng: np.random.Generator, density: float) -> BlockList:
    """Returns random lists with means."""
    blocks = (w.context - w.chunk) // KEYS
    lists = np.full((w.batch, w.retrieval, -(-w.chunk // QUERIES), -(-w.context // KEYS)), -1, np.int32)
    for at in np.ndindex(*lists.shape[:-1]):
        chosen = np.sort(rng.choice(blocks, max(round(density * blocks), 1), replace=False))
        lists[at][: chosen.size] = chosen
    means = (normal(w, seed, w.batch, w.retrieval, lists.shape[-1], w.head_dim) for seed in (8, 9))
    return BlockList(blocks=jnp.asarray(lists), means=BlockMeans(*means), queries=QUERIES, keys=KEYS)


def _line(args: Namespace, name: str, medians: Mapping[str, float]) -> dict[str, Any]:
    return {
        "call": name,
        "context": args.context,
        "chunk": args.chunk,
        "rounds": args.rounds,
        "ms": round(1e3 * medians[name], 3),
        "share": round(medians[name] / medians["dense"], 4),
    }


if __name__ == "__main__":
    main()
