"""Launch configurations that are faster here than the heuristics': `python -m bench.tune [--op OP] [--out FILE]`.

For each op and workload the neighbours of the heuristic's configuration are checked and timed. A shape's entry goes
into the device's table (`pallas_kernels.core.launch`, ``pallas_kernels/tuned/<device>.json``) only where it beats the
heuristic by more than the noise. All lines go to ``--out``; what is there already is not measured again.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bench.command_line import command_parser
from bench.kernels.ops import OPS, WORKLOADS, inapplicable
from bench.kernels.tasks import show
from bench.kernels.timing import measure
from bench.log import Log
from bench.measure import Limits, device_limits, result
from bench.text import one_line
from pallas_kernels.core.launch import TABLES

type Fields = dict[str, int]

_LEAST_GAIN = 0.02
"""Least share of the time that a tuned configuration must gain, in addition to the noise."""


def _decode_neighbours(config: Fields) -> list[Fields]:
    splits, warpgroups = config["splits"], config["warpgroups"]
    depth = config["stages"] // warpgroups
    found = [{"splits": n} for n in (splits // 2, splits * 3 // 4, splits * 3 // 2, splits * 2) if n >= 1]
    found += [{"stages": warpgroups * n} for n in (depth - 1, depth + 1) if n >= 1]
    other = {2: 3, 3: 2}.get(warpgroups, 2)
    return [*found, {"warpgroups": other, "stages": other * depth}]


NEIGHBOURS: dict[str, Callable[[Fields], list[Fields]]] = {
    "decode_attention": _decode_neighbours,
    "kv_write": lambda config: [{"rows": n} for n in (16, 32, 64, 128)],
    "page_select": lambda config: [
        *({"splits": n} for n in (config["splits"] // 2, config["splits"] * 2, config["splits"] * 3 // 2) if n >= 1),
        *({"stages": n} for n in (config["stages"] // 2, config["stages"] * 2) if n >= 1),
    ],
    "prefill_attention": lambda config: [{"stages": n} for n in (2, 3, 4)],
    "quantized_matmul": lambda config: [
        *({"splits": n} for n in (config["splits"] // 2, config["splits"] * 2) if n >= 1),
        *({"stages": n} for n in (config["stages"] - 1, config["stages"] + 1) if n >= 1),
        {"warpgroups": 3 - config["warpgroups"]},
    ],
}
"""Fields to replace, by the op of the kernel. A configuration that does not compile gives a line that says so."""

KERNEL_OF = {op: op.removesuffix("_decode").removesuffix("_prefill") for op in OPS} | {
    "decode_dense": "decode_attention",
    "prefill_dense": "prefill_attention",
}

_PAIRS = (
    *(("decode_attention", f"llama3_8b_128k_b8{bits}") for bits in ("_int8", "", "_int4")),
    ("decode_attention", "llama3_8b_128k_int8"),
    *(("decode_dense", f"llama3_8b_32k_b8{bits}") for bits in ("_int8", "")),
    ("page_select", "llama3_8b_128k"),
    ("page_select", "llama3_8b_128k_b8"),
    ("prefill_dense", "llama3_8b_32k_whole"),
    ("prefill_attention", "llama3_8b_128k_chunk8k_int8"),
    ("kv_write_prefill", "llama3_8b_128k_chunk8k_int8"),
    ("decode_attention", "smollm2_135m_8k"),
    *(("quantized_matmul", f"llama3_8b_gate_up_b1_{weights}") for weights in ("w4g128", "w8")),
)
WORKLOAD_SETS = {"targets": _PAIRS, "full": _PAIRS, "tiny": (("decode_attention", "tiny_mixed"),)}


class _Tried(NamedTuple):
    """One configuration on one workload: its changed fields as JSON, its time, and half the distance of quartiles."""

    change: str
    median: float
    noise: float


def choose(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, Fields]]:
    """Returns the fields, by op and shape, of configurations that beat the heuristic's by more than the noise.

    Where several workloads share a shape, the configuration must have been measured on all of them, gain in the
    geometric mean, and cost none of them more than the noise.

    Args:
      lines: a log's, of kind "tune".
    """
    tried: dict[tuple[str, str], dict[str, dict[str, _Tried]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        if line["kind"] == "tune":
            low, high = line["quartiles_ms"]
            one = _Tried(json.dumps(line["change"]), line["median_ms"], (high - low) / 2)
            tried[line["kernel"], line["shape"]][line["workload"]][one.change] = one
    table: dict[str, dict[str, Fields]] = {}
    for (op, shape), workloads in sorted(tried.items()):
        if best := _best(list(workloads.values())):
            table.setdefault(op, {})[shape] = best
    return table


def _best(workloads: list[dict[str, _Tried]]) -> Fields | None:
    gains = {}
    for change in set.intersection(*(set(tried) for tried in workloads)) - {"{}"}:
        if not all("{}" in tried for tried in workloads):
            return None
        pairs = [(tried["{}"], tried[change]) for tried in workloads]
        logs = [math.log(default.median / mine.median) for default, mine in pairs]
        noises = [(default.noise + mine.noise) / default.median for default, mine in pairs]
        gain, noise = sum(logs) / len(logs), max(noises)
        if gain > _LEAST_GAIN + noise and min(logs) > -noise:
            gains[change] = gain
    return json.loads(max(gains, key=lambda change: gains[change])) if gains else None


def merge(table: dict[str, dict[str, Fields]], file: Path) -> None:
    """Writes entries into a device's table and keeps the others."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for op, shapes in table.items():
        known.setdefault(op, {}).update(shapes)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def table_file(folder: Path = TABLES) -> Path:
    """Returns the file of this device's table, as `pallas_kernels.core.launch` names it."""
    return folder / (jax.devices()[0].device_kind.lower().replace(" ", "_") + ".json")


def _perform(op: str, workload: str, change: Fields, limits: Limits, repeats: int) -> dict[str, Any]:
    """Returns the line of one configuration: the heuristic's with some fields changed."""
    labels: dict[str, Any] = {"op": op, "implementation": "mosaic_gpu", "workload": workload, "change": change}
    w, kernel = WORKLOADS[workload], KERNEL_OF[op]
    if reason := inapplicable(op, w):
        return {"kind": "skip", **labels, "reason": reason}
    try:
        found = measure(op, w, "mosaic_gpu", repeats=repeats, overrides={kernel: change})
        asked = next(launch for launch in found.found if launch.op == kernel)
    except StopIteration:
        return {"kind": "skip", **labels, "reason": "the kernel has no configuration on this workload"}
    except NotImplementedError as error:
        return {"kind": "refusal", **labels, "reason": str(error)}
    except Exception as error:  # noqa: BLE001  a configuration that does not compile must not cost the others
        return {"kind": "rejected", **labels, "reason": one_line(error)}
    sizes = OPS[op].sizes(w)
    labels |= {"kernel": kernel, "shape": asked.shape, "heuristic": asdict(asked.default)}
    return {
        "kind": "tune",
        **result(found.seconds, limits, bytes_moved=sizes.moved, flops=sizes.flops, **labels, **found.labels),
    }


def tune(pairs: Iterable[tuple[str, str]], log: Log, repeats: int) -> None:
    """Measures the heuristic's configuration and its neighbours on ops and workloads."""
    limits = device_limits(log.lines())
    for op, workload in pairs:
        default = _once(op, workload, {}, log, limits, repeats)
        if default is None or default["kind"] != "tune":
            continue
        heuristic: Fields = default["heuristic"]
        for change in NEIGHBOURS[KERNEL_OF[op]](heuristic):
            if {**heuristic, **change} != heuristic:
                _once(op, workload, change, log, limits, repeats)


def _once(op: str, workload: str, change: Fields, log: Log, limits: Limits, repeats: int) -> dict[str, Any] | None:
    """Returns the line of one configuration, from the log if it is there; None if the process died of it before."""
    key = ["tune", op, workload, json.dumps(change)]
    if log.begin(key):
        line = _perform(op, workload, change, limits, repeats)
        log.end(key, line)
        show({**line, "workload": f"{workload} {json.dumps(change)}"})
        return line
    return next((line for line in reversed(log.lines()) if line.get("key") == key and "workload" in line), None)


def main(arguments: list[str] | None = None) -> None:
    """Tunes the selected ops and workloads and writes the table."""
    parser = command_parser("bench.tune", __doc__)
    parser.add_argument("--op", choices=tuple(OPS), action="append", help="instead of a set; repeatable")
    parser.add_argument("--workload", choices=tuple(WORKLOADS), action="append", metavar="NAME", help="repeatable")
    parser.add_argument("--workload-set", choices=tuple(WORKLOAD_SETS), default="targets")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    parser.add_argument("--table", type=Path, help="the table to write; that of the package unless given")
    args = parser.parse_args(arguments)
    pairs = WORKLOAD_SETS[args.workload_set]
    if args.op or args.workload:
        pairs = tuple((op, name) for name in args.workload or dict(_PAIRS).values() for op in args.op or OPS)
    log = Log(args.out)
    tune(pairs, log, args.repeats)
    table = choose(log.lines())
    file = args.table or table_file()
    if table:
        merge(table, file)
    print(f"{sum(map(len, table.values()))} shapes are faster with another configuration: {file}", flush=True)


if __name__ == "__main__":
    main()
