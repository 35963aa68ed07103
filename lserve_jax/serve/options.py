"""The settings of the server itself; those of the model and its engine are the same as everywhere."""

import math
import re
from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from lserve_jax.config.checks import require_whole
from lserve_jax.config.errors import InputError, shown


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How the server listens, limits and ends. The "help" of a field says what it does.

    Raises:
      InputError: if values are out of range; the message lists all of them.
    """

    host: str = field(default="127.0.0.1", metadata={"help": "address to listen at; 0.0.0.0 is every one"})
    port: int = field(default=8000, metadata={"help": "port to listen at; 0 takes a free one"})
    api_key: str | None = field(
        default=None,
        repr=False,
        metadata={
            "help": "what every request but /health must bring as its bearer token; better set as LSERVE_API_KEY, "
            "which other users of this machine cannot see",
            "default": "none",
        },
    )
    served_model_name: str | None = field(
        default=None, metadata={"help": "the name by which requests ask for the model", "default": "the model's own"}
    )
    max_queued_requests: int = field(
        default=256, metadata={"help": "requests that may wait for a slot; further ones get status 429", "least": 0}
    )
    max_queued_tokens: int | None = field(
        default=None,
        metadata={
            "help": "prompt tokens that may wait; further requests get status 429",
            "default": "no limit",
            "least": 0,
        },
    )
    max_body_bytes: int = field(
        default=16 * 2**20, metadata={"help": "bytes of a request's body; a longer one gets status 413", "least": 1}
    )
    request_timeout: float = field(
        default=0.0, metadata={"help": "seconds after which a request is ended; 0 lets it take any time"}
    )
    default_max_tokens: int | None = field(
        default=None,
        metadata={
            "help": "tokens of an answer if the request names no number",
            "default": "the rest of the context",
            "least": 1,
        },
    )
    ping_interval: float = field(
        default=1.0, metadata={"help": "seconds of silence after which a stream gets a comment"}
    )
    stuck_after: float = field(
        default=600.0,
        metadata={"help": "seconds that a device call may take before /health says 503; 0 is any time"},
    )
    drain_timeout: float = field(
        default=30.0, metadata={"help": "seconds that requests may take to finish after SIGTERM"}
    )
    contexts: str | None = field(
        default=None,
        metadata={
            "help": "folder of saved contexts: all are loaded at the start, and POST /contexts/NAME saves one more",
            "default": "none",
            "metavar": "FOLDER",
        },
    )
    metrics_prefix: str = field(default="lserve_", metadata={"help": "what the names of metrics begin with"})

    def __post_init__(self) -> None:
        problems = []
        for one in fields(self):
            value: Any = getattr(self, one.name)
            try:
                if "least" in one.metadata and value is not None:
                    require_whole(one.name, value, one.metadata["least"])
            except InputError as error:
                problems.append(str(error))
            if one.type is float and not (isinstance(value, int | float) and 0 <= value < math.inf):
                problems.append(f"{one.name}={value} must be a number of seconds, not below 0")
        if type(self.port) is not int or not 0 <= self.port < 2**16:
            problems.append(f"port={self.port} must be 0 to {2**16 - 1}")
        if self.api_key is not None and not re.fullmatch("[!-~]+", self.api_key):
            problems.append("api_key must be of letters, digits and signs of ASCII, without spaces, and not empty")
        if self.contexts is not None and not (self.contexts and Path(self.contexts).is_dir()):
            problems.append(f"contexts={shown(self.contexts)} must be a folder")
        if problems:
            raise InputError("; ".join(problems))

    @property
    def is_local(self) -> bool:
        """Returns whether only programs on this machine can reach the server."""
        return self.host == "localhost" or (is_address(self.host) and ip_address(self.host).is_loopback)


def is_address(host: str) -> bool:
    """Returns whether a host is given as a number and not by name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
