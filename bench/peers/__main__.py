"""Times of other libraries at the same work: `python -m bench.peers [--peer NAME] [--workload-set SET] [--out FILE]`.

Dense attention in bfloat16 over the same heads and tokens: of one new token per sequence (`decode_dense`), of a
prompt's last chunk or of a whole prompt (`prefill_dense`). A missing peer is a line that says why. Peers of torch are
timed as CUDA graphs, those of JAX like our own kernels (`bench.kernels.chain`).
"""

from pathlib import Path

from bench.command_line import command_parser
from bench.kernels.tasks import run_tasks
from bench.log import Log
from bench.measure import device_limits
from bench.peers.tasks import PEERS, WORKLOAD_SETS, perform, tasks


def main(arguments: list[str] | None = None) -> None:
    """Times the selected peers."""
    parser = command_parser("bench.peers", __doc__)
    parser.add_argument("--peer", choices=tuple(PEERS), action="append", help="repeatable; all unless given")
    parser.add_argument("--workload-set", choices=tuple(WORKLOAD_SETS), default="tiny")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    args = parser.parse_args(arguments)
    log = Log(args.out)
    limits = device_limits(log.lines())
    chosen = tasks(args.workload_set, args.peer)
    run_tasks("peer", chosen, log, lambda task: perform(task, limits, args.repeats))


if __name__ == "__main__":
    main()
