"""What goes wrong, as a status and a body in OpenAI's shape: clients decide by its ``code``."""

import logging
import math
from collections.abc import Mapping
from functools import singledispatch
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException

from lserve_jax.config.errors import InputError, shown

logger = logging.getLogger("lserve_jax")

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
"""OpenAI's kinds of errors; others are "invalid_request_error", and from status 500 "server_error"."""
_CODES = {404: "not_found", 405: "method_not_allowed"}
_NO_RETRY = {"x-should-retry": "false"}
"""What keeps OpenAI's client from asking again by itself."""


class QueueFull(Exception):  # noqa: N818 - nothing is wrong
    """More requests or prompt tokens wait than the server's limits allow.

    Attributes:
      retry_after_s: seconds after which another try makes sense.
    """

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"too many requests wait: try again in {max(1, math.ceil(retry_after_s))} s")
        self.retry_after_s = retry_after_s


class DeadlinePassed(Exception):  # noqa: N818 - nothing is wrong
    """The request has taken all the time that it had."""


class EngineFailed(Exception):  # noqa: N818 - the name says it
    """A device call or what it brought is at fault, not the client. The log says why, once for all requests."""


class NotReady(Exception):  # noqa: N818 - nothing is wrong
    """The engine takes no requests.

    Attributes:
      status: "loading", "draining", "stuck" or "dead".
      detail: one line for a person.
    """

    def __init__(self, status: str, detail: str = "") -> None:
        super().__init__(f"the server is {status}" + (f": {detail}" if detail else ""))
        self.status = status
        self.detail = detail


class ApiError(Exception):
    """An error as a client sees it.

    Attributes:
      status: of the response.
      code: one word for programs.
      param: the field of the request that is wrong, if there is one.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Returns the body of the response, which is also that of an event in a stream."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Returns the error of a request that its sender can correct."""
    return ApiError(400, code, message, param=param)


@singledispatch
def api_error(error: BaseException) -> ApiError:
    """Returns what a client is told of any error; a fault of ours is logged, and the client gets no details."""
    logger.error("a request failed", exc_info=error)
    return _internal()


def _internal() -> ApiError:
    return ApiError(500, "internal_error", "the server failed at this request; its log says why", headers=_NO_RETRY)


@api_error.register
def _(error: ApiError) -> ApiError:
    return error


@api_error.register
def _(error: InputError) -> ApiError:
    return bad_request(str(error))


@api_error.register
def _(error: QueueFull) -> ApiError:
    headers = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    return ApiError(429, "queue_full", str(error), headers=headers)


@api_error.register
def _(error: NotReady) -> ApiError:
    return ApiError(503, error.status, str(error), headers={"Retry-After": "1"})


@api_error.register
def _(_: EngineFailed) -> ApiError:
    return _internal()


@api_error.register
def _(_: DeadlinePassed) -> ApiError:
    message = "the request's time is over (its timeout_s, or the server's --request-timeout)"
    return ApiError(504, "timeout", message, headers=_NO_RETRY)


@api_error.register
def _(error: HTTPException) -> ApiError:
    code = _CODES.get(error.status_code, "http_error")
    return ApiError(error.status_code, code, error.detail, headers=error.headers)


@api_error.register
def _(error: ValidationError) -> ApiError:
    """Returns the first problem that pydantic found, in one line that names the field."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) if str(part).isprintable() else repr(part) for part in first["loc"])[:100]
    if first["type"] == "missing":
        return bad_request(f"{param} is missing", param, "missing_required_parameter")
    if first["type"] == "too_short":
        return bad_request(f"{param} must not be empty", param)
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return bad_request(f"{param or 'the body'}: {message}, got {shown(first['input'])}", param or None, code)
