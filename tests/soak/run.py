"""`python -m tests.soak`: many clients of a server with too little memory, for as long or as often as asked.

Each request must end: in an answer, which must be that of a model that does nothing else, in an error that it deserves,
or because its client has left. At the end nothing may be held, and SIGTERM must end open streams in order.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.raw_http import PATIENCE, Address, Exchange, event_data, exchange, get_json, request_bytes
from tests.soak.client import Client, Findings
from tests.soak.questions import CONTEXT, Question, random_questions
from tests.soak.server import plain_llm

ROOT = Path(__file__).parents[2]
QUESTIONS = 300
OPEN_STREAMS = 12
"""Streams that are open at SIGTERM, more than the server has slots."""
_SAMPLES = 60
"""Of memory, over the whole soak."""


@dataclass
class Soak:
    """What is known at the end of a soak.

    Attributes:
      findings: what the clients have seen.
      requests, seconds: how many were made, in what time.
      held: what the server held when the last had ended, and what it has done.
      rss: bytes of the server's memory over time, as pairs of requests made and bytes.
      fresh_ms: the median times of a request to a server with nothing else to do, before and after.
      compared: how many different answers were compared with those of the lone model.
    """

    findings: Findings = field(default_factory=Findings)
    requests: int = 0
    seconds: float = 0.0
    held: dict[str, Any] = field(default_factory=dict)
    rss: list[tuple[int, int]] = field(default_factory=list)
    fresh_ms: list[float] = field(default_factory=list)
    compared: int = 0

    @property
    def growth(self) -> int:
        """Returns by how many bytes the server has grown since a quarter of the requests."""
        early = [size for made, size in self.rss if 4 * made <= self.requests]
        return self.rss[-1][1] - max(early, default=self.rss[0][1])

    def summary(self) -> dict[str, Any]:
        """Returns what is written to the file."""
        return {
            "requests": self.requests,
            "seconds": round(self.seconds, 1),
            "outcomes": dict(self.findings.outcomes.most_common()),
            "asked_again_when_the_queue_was_full": self.findings.refusals,
            "different_answers_compared": self.compared,
            "server": self.held,
            "rss_growth_mib": round(self.growth / 2**20, 1),
            "rss_mib": [[made, round(size / 2**20, 1)] for made, size in self.rss],
            "fresh_request_ms": [round(one, 2) for one in self.fresh_ms],
            "problems": self.findings.problems,
        }


@contextmanager
def started_server() -> Iterator[tuple[subprocess.Popen[str], Address]]:
    """Yields the process and the address of a server that is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.soak.server"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        url = urlsplit(process.stdout.readline().strip())
        assert url.hostname and url.port, "the server has not started"
        yield process, (url.hostname, url.port)
    finally:
        process.kill()
        process.communicate()


def soak(*, requests: int, seconds: float | None, clients: int, seed: int) -> Soak:
    """Returns what a soak has shown.

    Args:
      requests: how many to make at most.
      seconds: after which no more are begun; None for no limit.
      clients: how many make requests at the same time.
      seed: of all that is drawn.
    """
    found = Soak()
    questions = random_questions(random.Random(seed), QUESTIONS)
    with started_server() as (process, address):
        found.fresh_ms.append(_fresh_ms(address))
        _make_requests(found, Client(address, questions, seed, found.findings), address, requests, seconds, clients)
        _check_idle(found, address)
        found.fresh_ms.append(_fresh_ms(address))
        _check_end(found.findings, process, address)
    _check_answers(found, questions)
    return found


def _make_requests(
    found: Soak, client: Client, address: Address, requests: int, seconds: float | None, clients: int
) -> None:
    numbers, begin = count(), time.monotonic()
    every = max(1, requests // _SAMPLES)

    def work() -> None:
        while (number := next(numbers)) < requests and (seconds is None or time.monotonic() - begin < seconds):
            client.make(number)
            if number % every == 0:
                found.rss.append((number, get_json(address, "/soak")["rss"]))

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.rss.sort()
    found.seconds = time.monotonic() - begin
    found.requests = found.findings.outcomes.total()


def _check_idle(found: Soak, address: Address) -> None:
    """Notes what the server holds for requests although all of them have ended."""
    limit = time.monotonic() + PATIENCE
    while (held := get_json(address, "/soak"))["open"] or not held["is_idle"]:  # those whose clients have just left
        if time.monotonic() > limit:
            found.findings.note_problem("requests are still open")
            break
        time.sleep(0.02)
    found.held = held
    found.rss.append((found.requests, held["rss"]))
    for name in ("open", "held_pages", "swapped"):
        if held[name]:
            found.findings.note_problem(f"{name} is {held[name]} when nothing is asked")
    for line in _gauges(address):
        if float(line.split()[-1]):
            found.findings.note_problem(f"{line} when nothing is asked")


def _gauges(address: Address) -> list[str]:
    """Returns the lines of the gauges that must be 0 when nothing is asked."""
    # The gauges follow the engine, which sets them after its last answer has gone.
    limit = time.monotonic() + PATIENCE
    while True:
        with exchange(address, request_bytes("/metrics", method="GET")) as one:
            lines = one.answer().read().decode().splitlines()
        found = [line for line in lines if line.startswith("lserve_num_requests_")]
        if time.monotonic() > limit or not any(float(line.split()[-1]) for line in found):
            assert found, "there are no gauges of requests"
            return found
        time.sleep(0.02)


def _fresh_ms(address: Address) -> float:
    """Returns the median milliseconds of a request that has the server for itself."""
    data = _request({"prompt": [7] * 40, "max_tokens": 9, "ignore_eos": True})
    found = []
    for _ in range(20):
        begin = time.perf_counter()
        with exchange(address, data) as one:
            one.answer().read()
        found.append(1000 * (time.perf_counter() - begin))
    return statistics.median(found)


def _request(body: dict[str, Any]) -> bytes:
    return request_bytes("/v1/completions", json.dumps(body).encode())


def _check_end(findings: Findings, process: subprocess.Popen[str], address: Address) -> None:
    """Ends the server in the middle of streams, and notes those that do not end as they should."""
    body = {"prompt": [9, 8, 7], "max_tokens": CONTEXT - 3, "ignore_eos": True, "stream": True}
    streams = [Exchange(address, _request(body)) for _ in range(OPEN_STREAMS)]
    responses = [stream.answer() for stream in streams]
    process.send_signal(signal.SIGTERM)
    for stream, response in zip(streams, responses, strict=True):
        *_, last = event_data(response)
        if last != "[DONE]" and "error" not in json.loads(last):
            findings.note_problem(f"a stream at SIGTERM ended with {last}")
        stream.close()
    if (status := process.wait(PATIENCE)) != 0:
        findings.note_problem(f"SIGTERM: exit status {status}")


def _check_answers(found: Soak, questions: Sequence[Question]) -> None:
    """Notes each answer that is not that of a model which does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        llm = plain_llm(Path(folder))
        for number, answers in sorted(found.findings.answers.items()):
            expected = questions[number].alone(llm)
            found.compared += 1
            for choices in answers - {expected}:
                found.findings.note_problem(f"question {number}: {choices} instead of {expected}")


def main() -> int:
    """Returns 1 if there was a problem."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="at most (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="after which no more are begun (default: no limit)")
    parser.add_argument("--clients", type=int, default=24, help="at the same time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where to write the summary, as JSON (default: to stdout alone)")
    args = parser.parse_args()
    found = soak(requests=args.requests, seconds=args.seconds, clients=args.clients, seed=args.seed)
    text = json.dumps(found.summary(), indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    return bool(found.findings.problems)
