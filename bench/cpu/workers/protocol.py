"""How a worker is spoken to: JSON lines over stdin and stdout. The standard library alone, Python 3.11 and newer.

A worker is started with its settings as one argument, says what it is, then answers one request a line:

    → {"prompt": [ids], "batch": B, "steps": N}
    ← {"prefill_s": …, "prefilled": tokens, "decode_s": …, "steps": N, "tokens": [the first ones], …}
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHOWN_TOKENS = 8


def serve(open_system: Callable[[dict[str, Any]], Any]) -> None:
    """Opens a system, says its ``facts``, and passes requests to its ``measure`` until stdin ends.

    Every answer has the memory of the process. What libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps({**answer, **memory()}) + "\n")
        answers.flush()

    system = open_system(json.loads(sys.argv[1]))
    say({"facts": system.facts})
    for line in sys.stdin:
        say(system.measure(**json.loads(line)))


def times(prompt: list[int], prefill_s: float, decode_s: float, steps: int, tokens: list[int]) -> dict[str, Any]:
    """Returns a peer's answer: a prefill of one sequence and ``steps`` steps after it, and the tokens that it chose."""
    return {
        "prefill_s": prefill_s,
        "prefilled": len(prompt),
        "decode_s": decode_s,
        "steps": steps,
        "tokens": tokens[:SHOWN_TOKENS],
    }


def memory() -> dict[str, int]:
    """Returns this process's resident bytes, now and at the peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"rss_bytes": peak, "peak_bytes": peak}
    # Not ru_maxrss: that one remembers the process that this one was forked from.
    fields = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
    return {
        name: int(fields[field].split()[0]) * 1024 for name, field in (("rss_bytes", "VmRSS"), ("peak_bytes", "VmHWM"))
    }
