"""Times of the ops: `python -m bench.kernels [--op OP] [--implementation NAME] [--workload NAME] [--out FILE]`.

Values are checked before anything is timed. A chain is timed: one program that calls the op many times, one after the
other, on different arguments. There is one line per result. JSON lines go to ``--out``; a result that is already there
is not measured again. bench/README.md explains the fields.
"""

import json
from pathlib import Path

from bench.command_line import command_parser
from bench.kernels.ops import OPS, WORKLOADS, inapplicable
from bench.kernels.tasks import WORKLOAD_SETS, Task, perform, run_tasks, tasks
from bench.log import Log
from bench.measure import device_limits
from pallas_kernels import BACKENDS
from pallas_kernels.core.workloads import SERVING


def main(arguments: list[str] | None = None) -> None:
    """Checks and times the selected ops."""
    parser = command_parser("bench.kernels", __doc__)
    parser.add_argument("--op", choices=tuple(OPS), action="append", help="instead of a set; repeatable")
    parser.add_argument("--workload", choices=tuple(WORKLOADS), action="append", metavar="NAME", help="repeatable")
    parser.add_argument("--implementation", choices=BACKENDS, action="append", help="repeatable")
    parser.add_argument("--workload-set", choices=tuple(WORKLOAD_SETS), default="tiny")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--kernel-times", action="store_true", help="also what CUPTI says of each kernel")
    parser.add_argument("--list", action="store_true", help="print the tasks and what limits them, and run nothing")
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    args = parser.parse_args(arguments)
    if args.op or args.workload:
        pairs = [(op, workload) for workload in args.workload or SERVING for op in args.op or OPS]
        chosen = [Task(op, name, workload) for name in args.implementation or ["xla"] for op, workload in pairs]
    else:
        chosen = tasks(args.workload_set, args.implementation)
    if args.list:
        for task in (task for task in chosen if inapplicable(task.op, WORKLOADS[task.workload]) is None):
            sizes = OPS[task.op].sizes(WORKLOADS[task.workload])
            print(json.dumps({**task._asdict(), "bytes": sizes.moved, "flops": sizes.flops}))
        return
    log = Log(args.out)
    limits = device_limits(log.lines())
    run_tasks(
        "kernel",
        chosen,
        log,
        lambda task: perform(task, limits, args.repeats, has_kernels=args.kernel_times),
    )


if __name__ == "__main__":
    main()
