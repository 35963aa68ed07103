"""What the clients of a soak do: they ask, leave at any moment, send half of a request, or damaged ones."""

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.fuzz.requests import answer_to, damaged_request
from tests.raw_http import Address, Exchange, event_data, exchange, request_bytes
from tests.soak.questions import Choice, Question, choices_of

_WITHOUT_FAULT = frozenset({"queue_full", "timeout"})
"""Codes of errors that a good request may get, if others ask for much or if it has little time."""
_PATIENT_S = 0.2
"""How long clients wait at most before they ask again after "queue_full", or leave before the first byte."""
_HURRIED = 0.03
"""Share of the requests that get little time, and how much at most."""
_LITTLE_S = 0.1


@dataclass
class Findings:
    """What the clients have seen, from all threads.

    Attributes:
      outcomes: how requests ended.
      refusals: how often one was refused because the queue was full, and asked again.
      answers: the answers to each question by its number.
      problems: what should never happen, one line each.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    refusals: int = 0
    answers: dict[int, set[tuple[Choice, ...]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, outcome: str) -> None:
        """Counts the end of a request."""
        with self.lock:
            self.outcomes[outcome] += 1

    def note_refusal(self) -> None:
        """Counts an answer of status 429."""
        with self.lock:
            self.refusals += 1

    def note_answer(self, number: int, choices: tuple[Choice, ...]) -> None:
        """Keeps an answer, if it is not the one that is known."""
        with self.lock:
            self.answers.setdefault(number, set()).add(choices)

    def note_problem(self, line: str) -> None:
        """Keeps what should never happen."""
        with self.lock:
            self.problems.append(line[:500])


class Client:
    """Makes requests by their number, which alone decides what each does.

    Args:
      address: of the server.
      questions: what may be asked.
      seed: of the soak.
      findings: where to note what comes.
    """

    def __init__(self, address: Address, questions: Sequence[Question], seed: int, findings: Findings) -> None:
        self._address = address
        self._questions = questions
        self._seed = seed
        self._findings = findings

    def make(self, number: int) -> None:
        """Makes a request and notes how it ended."""
        rng = random.Random(f"{self._seed} {number}")
        act = rng.choices([self._ask, self._leave, self._send_half, self._send_damaged], [64, 20, 4, 12])[0]
        try:
            outcome = act(rng)
        except Exception as error:  # noqa: BLE001 - the other requests go on, and the soak fails
            self._findings.note_problem(f"request {number} ({act.__name__}): {type(error).__name__}: {error}")
            outcome = "problem"
        self._findings.note(outcome)

    def _ask(self, rng: random.Random) -> str:
        """Asks until the request is accepted, as clients do."""
        number, data = self._request(rng)
        while (outcome := self._ask_once(number, data)) == "queue_full":
            self._findings.note_refusal()
            time.sleep(rng.random() * _PATIENT_S)
        return outcome

    def _ask_once(self, number: int, data: bytes) -> str:
        with exchange(self._address, data) as one:
            response = one.answer()
            if response.getheader("Content-Type", "").startswith("text/event-stream"):
                return self._read_stream(number, response)
            found = json.loads(response.read())
        if response.status == 200:
            self._findings.note_answer(number, choices_of(self._questions[number], [found]))
            return "answered"
        return self._refused(response, found["error"])

    def _read_stream(self, number: int, response: http.client.HTTPResponse) -> str:
        *lines, last = event_data(response)
        if last == "[DONE]":
            self._findings.note_answer(number, choices_of(self._questions[number], map(json.loads, lines)))
            return "streamed"
        code = json.loads(last)["error"]["code"]
        assert code == "timeout", f"the stream ended with {last}"
        return "timeout"

    def _refused(self, response: http.client.HTTPResponse, error: dict[str, Any]) -> str:
        code, status = error["code"], response.status
        assert (code, status) in (("queue_full", 429), ("timeout", 504)), f"status {status}: {error}"
        assert code == "timeout" or int(response.getheader("Retry-After", "")) >= 1
        return code

    def _leave(self, rng: random.Random) -> str:
        """Asks, and leaves before the first byte or after any line of the answer."""
        _, data = self._request(rng)
        one = Exchange(self._address, data)
        try:
            lines = rng.choice([0, 0, 1, 2, 4, 8])
            if lines == 0:
                time.sleep(rng.random() * _PATIENT_S)
            else:
                response = one.answer()
                for _ in range(lines):
                    response.readline()
            if rng.random() < 0.5:
                one.reset()
        finally:
            one.close()
        return "left"

    def _send_half(self, rng: random.Random) -> str:
        _, data = self._request(rng)
        one = Exchange(self._address, data[: rng.randrange(len(data))])
        if rng.random() < 0.5:
            one.reset()
        one.close()
        return "half sent"

    def _send_damaged(self, rng: random.Random) -> str:
        message = answer_to(self._address, damaged_request(rng), allowed=_WITHOUT_FAULT)
        return "damaged, answered" if message is None else "damaged, refused"

    def _request(self, rng: random.Random) -> tuple[int, bytes]:
        """Returns the number of a question, and a request for it; what is drawn here does not change the answer."""
        number = rng.randrange(len(self._questions))
        question = self._questions[number]
        body = question.body
        if rng.random() < 0.5 and not question.has_prompt_scores:
            body |= {"stream": True, "return_progress": rng.random() < 0.2}
        if rng.random() < 0.2:
            body["priority"] = rng.randrange(-2, 3)
        if rng.random() < _HURRIED:
            body["timeout_s"] = _LITTLE_S * (1.0 - rng.random())  # never 0
        if rng.random() < 0.2:
            body["cache_salt"] = rng.choice(["one", "two"])
        return number, request_bytes(question.path, json.dumps(body).encode())
