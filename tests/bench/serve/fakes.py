"""A server of chat completions whose bytes are scripted, and lines as `bench.serve` writes them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from bench.serve.client import Messages

type Reply = Callable[[dict[str, Any], asyncio.StreamWriter], Any]

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@asynccontextmanager
async def fake_server(reply: Reply) -> AsyncIterator[str]:
    """Yields the address of a server that leaves each request's answer, status line included, to ``reply``."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length"))
            await reply(json.loads(await reader.readexactly(length)), writer)
            await writer.drain()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(content: str, **fields: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": content}, **fields}])


ROLE = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
END = event(choices=[{"index": 0, "delta": {}, "finish_reason": "length"}])
USAGE = event(
    choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
)
DONE = b"data: [DONE]\n\n"


def body(messages: Messages, max_tokens: int) -> dict[str, Any]:
    return {"messages": list(messages), "max_tokens": max_tokens, "stream": True}


def request(sent: float, times: Sequence[float], **changes: Any) -> dict[str, Any]:
    """A line of requests.jsonl."""
    labels = {"run": "r", "system": "s", "name": "short", "stage": "", "script": 0, "turn": 0}
    times_s = list(times)
    numbers = {"prompt_tokens": 10, "completion_tokens": len(times_s), "cached_tokens": 0}
    end = times_s[-1] if times_s else 0.0
    ended = {"end_s": end, "finish_reason": "length", "error": None}
    return {**labels, "sent_s": sent, "times_s": times_s, **numbers, **ended, **changes}


# A process that answers as many requests at once as come: the role, as many texts as asked for, usage, the end.
FAKE_PROGRAM = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(os.environ["FAKE_LOG"], "a") as log:
            log.write(json.dumps(asked) + "\\n")
        words = asked["messages"][-1]["content"]
        if os.environ.get("FAKE_REFUSES") and "Continue" in words:
            self.send_error(429)
            return
        self.send_response(200)
        self.end_headers()
        def say(**fields):
            self.wfile.write(b"data: " + json.dumps(fields).encode() + b"\\n\\n")
        for number in range(asked["max_tokens"]):
            say(choices=[{"delta": {"content": f"{number} "}}])
        say(choices=[{"delta": {}, "finish_reason": "length"}])
        say(choices=[], usage={"prompt_tokens": len(words.split()), "completion_tokens": asked["max_tokens"]})
        self.wfile.write(b"data: [DONE]\\n\\n")

ThreadingHTTPServer.request_queue_size = 64
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
