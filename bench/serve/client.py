"""One request to an OpenAI-compatible server: a streamed chat completion, and when each text of it came.

aiohttp and not httpx, because the load generator runs on the cores of the server that it measures: it parses HTTP in C.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp

type Messages = Sequence[Mapping[str, str]]

_SHOWN = 200
"""Most characters of a server's error."""


@dataclass
class Answer:
    """What came of one request. Times are seconds after it was sent.

    Attributes:
      sent: when, by `time.perf_counter`.
      text: the whole answer.
      times: of each event that had text.
      end: of the last byte, or of the error.
      usage: numbers of tokens, as the server gave them; empty if it gave none.
      finish_reason: why the answer ended, as the server says.
      error: why there is no whole answer, in one line.
    """

    sent: float
    text: str = ""
    times: list[float] = field(default_factory=list)
    end: float = 0.0
    usage: Mapping[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    error: str | None = None

    @property
    def cached_tokens(self) -> int | None:
        """Returns the prompt tokens that the server took from its cache; None if it does not say."""
        return (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens")


class Client:
    """Connections to one server.

    Args:
      url: its address, such as http://127.0.0.1:8000.
      body: (messages, tokens of the answer) → the request, as this server wants it.
      timeout: seconds that a request may take.
    """

    def __init__(self, url: str, body: Callable[[Messages, int], Mapping[str, Any]], timeout: float) -> None:
        self._url = url.rstrip("/") + "/v1/chat/completions"
        self._body = body
        # A new connection per request: a server may close a kept one just when a request is sent through it.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=aiohttp.ClientTimeout(total=timeout)
        )

    async def ask(self, messages: Messages, max_tokens: int, on_text: Callable[[], None] = lambda: None) -> Answer:
        """Returns the answer to a conversation; ``on_text`` is called at each text of it. Errors are in the answer."""
        body = dict(self._body(messages, max_tokens))
        answer = Answer(sent=time.perf_counter())
        try:
            async with self._session.post(self._url, json=body) as response:
                if response.status != 200:
                    said = " ".join((await response.text()).split())
                    answer.error = f"status {response.status}: {said[:_SHOWN]}"
                else:
                    await _read(response, answer, on_text)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            answer.error = ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split())[:_SHOWN])))
        answer.end = time.perf_counter() - answer.sent
        if answer.error is None and answer.finish_reason is None:
            answer.error = "the stream ended without a finish reason"
        return answer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()


async def _read(response: aiohttp.ClientResponse, answer: Answer, on_text: Callable[[], None]) -> None:
    """Reads a stream to its end; all events of one read came at the same time."""
    rest = b""
    async for some in response.content.iter_any():
        now = time.perf_counter() - answer.sent
        *lines, rest = (rest + some).split(b"\n")
        for line in lines:
            if take_line(line, answer, now):
                on_text()
        await asyncio.sleep(0)  # a server that writes without pause must not keep the other clients waiting


def take_line(line: bytes, answer: Answer, now: float) -> bool:
    """Takes one line of an event stream; returns whether it had text. Comments and other fields have no effect."""
    if not line.startswith(b"data:"):
        return False
    data = line[len(b"data:") :].strip()
    if data == b"[DONE]":
        return False
    try:
        event = json.loads(data)
    except ValueError:
        answer.error = f"an event that is no JSON: {data[:_SHOWN].decode(errors='replace')}"
        return False
    if (error := event.get("error")) is not None:
        answer.error = str(error.get("message", error) if isinstance(error, dict) else error)[:_SHOWN]
        return False
    answer.usage = event.get("usage") or answer.usage
    text = ""
    for choice in event.get("choices", []):
        text += (choice.get("delta") or {}).get("content") or ""
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    if not text:
        return False
    answer.text += text
    answer.times.append(now)
    return True
