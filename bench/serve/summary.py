"""The numbers of a run: what became of each request, and of all of them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from bench.serve.load import Request
from bench.serve.workloads import ALONE, BOTH, STREAM
from bench.text import rounded

type Line = dict[str, Any]


class Limits(NamedTuple):
    """What a request must keep to count as good: seconds to its first text, and the 99th percentile of its gaps."""

    ttft_s: float
    gap_s: float


def request_line(request: Request, begin: float) -> Line:
    """Returns what became of a request, as a line of requests.jsonl.

    Args:
      request: the request.
      begin: start of the run, by `time.perf_counter`.
    """
    answer = request.answer
    return {
        "stage": request.stage,
        "script": request.script,
        "turn": request.turn,
        "sent_s": round(answer.sent - begin, 4),
        "end_s": round(answer.end, 4),
        "times_s": [round(at, 4) for at in answer.times],
        "prompt_tokens": answer.usage.get("prompt_tokens"),
        "completion_tokens": answer.usage.get("completion_tokens"),
        "cached_tokens": answer.cached_tokens,
        "finish_reason": answer.finish_reason,
        "error": answer.error,
    }


def gaps(line: Line) -> list[float]:
    """Returns the seconds between a request's texts."""
    return np.diff(line["times_s"]).tolist()


def tokens(line: Line) -> int:
    """Returns the tokens of an answer: as the server says, or else the number of its texts."""
    return len(line["times_s"]) if line["completion_tokens"] is None else line["completion_tokens"]


def is_good(line: Line, limits: Limits) -> bool:
    """Whether a request was answered within the limits."""
    if line["error"] is not None or not line["times_s"] or line["times_s"][0] > limits.ttft_s:
        return False
    between = gaps(line)
    return not between or float(np.percentile(between, 99)) <= limits.gap_s


def summary(lines: Sequence[Line], limits: Limits) -> Line:
    """Returns the numbers of all requests of a run; throughput is that of the time in which any request was open."""
    answered = [line for line in lines if line["error"] is None and line["times_s"]]
    seconds = max(line["sent_s"] + line["end_s"] for line in lines) - min(line["sent_s"] for line in lines)
    first = [line["times_s"][0] for line in answered]
    good = [line for line in lines if is_good(line, limits)]
    generated = sum(map(tokens, answered))
    return {
        "requests": len(lines),
        "errors": len(lines) - len(answered),
        "seconds": rounded(seconds),
        "prompt_tokens": _total(answered, "prompt_tokens"),
        "cached_tokens": _total(answered, "cached_tokens"),
        "completion_tokens": generated,
        "is_usage_reported": all(line["completion_tokens"] is not None for line in answered),
        "tok_per_s": rounded(generated / seconds),
        "good_tok_per_s": rounded(sum(map(tokens, good)) / seconds),
        "good_share": rounded(len(good) / len(lines)),
        **_spread("ttft", first),
        **_spread("first_turn_ttft", [line["times_s"][0] for line in answered if line["turn"] == 0]),
        **_spread("later_turn_ttft", [line["times_s"][0] for line in answered if line["turn"] > 0]),
        **_spread("gap", [gap for line in answered for gap in gaps(line)]),
        **_spread("whole", [line["end_s"] for line in answered]),
    }


def arrival(lines: Sequence[Line], chunk: int) -> Line:
    """Returns how a stream fared while a long prompt arrived; empty if a request of the workload failed.

    Args:
      lines: the requests of `long_arrival`.
      chunk: prompt tokens per prefill call.
    """
    stages = {(line["stage"], line["script"]): line for line in lines if line["error"] is None and line["times_s"]}
    wanted = ((ALONE, 0), (STREAM, 0), (BOTH, 0), (BOTH, 1))
    if not all(key in stages for key in wanted):
        return {}
    alone, stream, beside, long = (stages[key] for key in wanted)
    begin, first = long["sent_s"], long["sent_s"] + long["times_s"][0]
    at = [beside["sent_s"] + seconds for seconds in beside["times_s"]]
    during = [late - early for early, late in pairwise(at) if late > begin and early < first]
    if not during:
        return {}
    prompt = alone["prompt_tokens"]
    return {
        "longest_gap_s": rounded(max(during)),
        "burst_s": rounded(max(gaps(stream))),
        "chunks": None if prompt is None else -(-prompt // chunk),
        "chunk_s": None if prompt is None else rounded(alone["times_s"][0] / -(-prompt // chunk)),
        "long_ttft_alone_s": alone["times_s"][0],
        "long_ttft_s": long["times_s"][0],
        "has_ended_before": at[-1] < first,
    }


def _total(lines: Sequence[Line], field: str) -> int | None:
    """Returns the sum of a field; None if a server did not say it each time."""
    found = [line[field] for line in lines]
    return None if None in found or not found else sum(found)


def _spread(name: str, seconds: Sequence[float]) -> Line:
    """Returns the median, the 99th percentile and the longest of some seconds; nothing of none."""
    if not len(seconds):
        return {}
    half, most = np.percentile(seconds, [50, 99])
    return {
        f"{name}_p50_s": rounded(float(half)),
        f"{name}_p99_s": rounded(float(most)),
        f"{name}_max_s": rounded(max(seconds)),
    }
