"""The body of a request: read up to a limit, and parsed as JSON that means the same to every program."""

import re
from typing import Any

from starlette.requests import Request

from lserve_jax.config.errors import InputError
from lserve_jax.config.json_file import parse_json
from lserve_jax.serve.errors import ApiError, bad_request
from lserve_jax.text.errors import is_text


async def read_body(request: Request, limit: int) -> bytes:
    """Returns the body of a request.

    Raises:
      ApiError: if it is longer than ``limit`` bytes (it is not read further then), or does not claim to be JSON. A form
        of a foreign web page cannot claim that without asking first, which this server refuses.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "unsupported_media_type", "the body must be JSON, with Content-Type: application/json")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > limit):
        raise _too_large(limit)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "body_too_large", f"the body has more than {limit} bytes (--max-body-bytes)")


def parse_body(data: bytes) -> dict[str, Any]:
    """Returns the object in a body.

    Raises:
      ApiError: if it is no object of JSON in UTF-8, is nested too deeply, has a key twice with different values, NaN or
        Infinity, or half of a surrogate pair.
    """
    try:
        value = parse_json(data, "the body", allows_constants=False)
    except InputError as error:
        raise bad_request(str(error), code="invalid_json") from None
    if re.search(rb"\\u[dD][89a-fA-F]", data) and not _is_unicode(value):
        raise bad_request("the body: a text has half of a surrogate pair", code="invalid_json")
    return value


def _is_unicode(value: Any) -> bool:
    """Returns whether all texts in a parsed value are Unicode."""
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            todo += [*one, *one.values()]
        elif isinstance(one, list):
            todo += one
        elif isinstance(one, str) and not is_text(one):
            return False
    return True
