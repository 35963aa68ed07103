"""HTTP on bare sockets, for tests that send what no client library would, or leave when no library would."""

import http.client
import json
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

PATIENCE = 600.0
"""Seconds after which an answer counts as one that never comes."""
JSON = {"Content-Type": "application/json"}

type Address = tuple[str, int]


def request_bytes(
    path: str, body: bytes = b"", headers: Mapping[str, str] = JSON, *, method: str = "POST", length: int | None = None
) -> bytes:
    """Returns a request as it goes over the wire.

    Args:
      path: what stands after the method.
      body: sent as it is.
      headers: besides the host and the length.
      method: any word.
      length: what Content-Length says; None takes the body's, -1 sends none.
    """
    named = {"Host": "localhost", **headers}
    if length != -1:
        named["Content-Length"] = str(len(body) if length is None else length)
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1", "replace") + body


class Exchange:
    """A connection on which something has been sent.

    Attributes:
      socket: the connection.
    """

    def __init__(self, address: Address, data: bytes) -> None:
        self.socket = socket.create_connection(address, timeout=PATIENCE)
        self._is_head = data.startswith(b"HEAD ")
        with suppress(ConnectionError):  # the server has answered already, and reads no more
            self.socket.sendall(data)

    def answer(self) -> http.client.HTTPResponse:
        """Returns the answer, of which only the head has been read."""
        response = http.client.HTTPResponse(self.socket, method="HEAD" if self._is_head else None)
        response.begin()
        return response

    def reset(self) -> None:
        """Makes `close` end the connection as a process that is killed does, without a word."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(self) -> None:
        """Leaves."""
        self.socket.close()


@contextmanager
def exchange(address: Address, data: bytes) -> Iterator[Exchange]:
    """Sends data, and leaves at the end."""
    one = Exchange(address, data)
    try:
        yield one
    finally:
        one.close()


def event_data(response: http.client.HTTPResponse) -> Iterator[str]:
    """Yields the data of server-sent events; comments are left out."""
    while line := response.readline():
        if line.startswith(b"data: "):
            yield line.decode().removeprefix("data: ").strip()


def get_json(address: Address, path: str) -> Any:
    """Returns the JSON at a path."""
    with exchange(address, request_bytes(path, method="GET")) as one:
        return json.loads(one.answer().read())
