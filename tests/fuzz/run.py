"""`python -m tests.fuzz`: gives many damaged inputs to the product, in processes whose memory and time are bounded.

The outcome of each must be success or one line of our own. A finding is printed with its kind and its seed.
"""

import argparse
import collections
import logging
import multiprocessing
import resource
import tempfile
import time
import traceback
from pathlib import Path

from tests.fuzz.kinds import KINDS, outcome

MEMORY = 3 * 2**30
SECONDS = 30


def _work(kind: str, seeds: list[int], results: "multiprocessing.Queue[tuple[int, str, str, float]]") -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    logging.disable(logging.WARNING)  # they would hide the findings
    for seed in seeds:
        begin = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found, detail = ("taken" if outcome(kind, seed, Path(folder)) == "taken" else "refused"), ""
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is a finding
                found, detail = f"{type(error).__name__}: {str(error)[:200]}", traceback.format_exc()
        results.put((seed, found, detail, time.process_time() - begin))


def run(kind: str, seeds: list[int]) -> tuple[collections.Counter[str], list[str]]:
    """Returns how many inputs were taken and refused, and the findings of one kind."""
    context = multiprocessing.get_context("spawn")
    counts: collections.Counter[str] = collections.Counter()
    findings = []
    slowest = (0.0, -1)
    while seeds:
        results: multiprocessing.Queue[tuple[int, str, str, float]] = context.Queue()
        process = context.Process(target=_work, args=(kind, seeds, results))
        process.start()
        while seeds:
            try:
                seed, found, detail, seconds = results.get(timeout=20 * SECONDS)
            except Exception:  # noqa: BLE001 - the queue is empty: the process hangs or has died
                findings.append(f"{kind} {seeds[0]}: no answer (exit code {process.exitcode})")
                seeds = seeds[1:]
                break
            seeds = seeds[1:]
            slowest = max(slowest, (seconds, seed))
            is_fine = found in ("taken", "refused")
            counts[found if is_fine else "finding"] += 1
            if not is_fine:
                findings.append(f"{kind} {seed}: {found}\n{detail}")
            elif seconds > SECONDS:
                findings.append(f"{kind} {seed}: took {seconds:.0f} s")
        process.kill()
        process.join()
    print(f"{kind}: {dict(counts)}, slowest {slowest[0]:.1f} s (seed {slowest[1]})", flush=True)
    return counts, findings


def main() -> int:
    """Returns 1 if there is a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000, help="inputs of each kind (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="first seed (default: %(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="default: %(default)s")
    args = parser.parse_args()
    findings = []
    for kind in args.kinds.split(","):
        findings += run(kind, list(range(args.first, args.first + args.inputs)))[1]
    lines = (line[:300] for finding in findings for line in finding.splitlines())
    print("\n".join(lines) or "no findings")
    return bool(findings)
