"""Saved contexts of a server: all files of a folder at the start, and one more for each ``POST /contexts/{name}``."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyio import Lock, to_thread
from starlette.requests import Request
from starlette.responses import Response

from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.engine.context_file import SavedContext
from lserve_jax.engine.contexts import require_prefix_cache
from lserve_jax.engine.inputs import require_ids
from lserve_jax.llm import LLM
from lserve_jax.serve.body import parse_body, read_body
from lserve_jax.serve.errors import ApiError, bad_request
from lserve_jax.serve.events import CLIENT_LEFT, Json, outputs_of, unless_disconnected
from lserve_jax.serve.protocol import DetokenizeRequest
from lserve_jax.serve.routes import tokenize
from lserve_jax.serve.service import Service
from lserve_jax.serve.ticket import Ticket

logger = logging.getLogger("lserve_jax")

SUFFIX = ".safetensors"
_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,64}")


def load_contexts(llm: LLM, folder: Path) -> list[str]:
    """Returns the names of the contexts of a folder that are in the prefix cache, in alphabetical order.

    One that does not fit the model or its settings is left out with a warning: a server must start after its model
    was replaced.

    Raises:
      InputError: if the model has no prefix cache.
    """
    require_prefix_cache(llm.engine)
    tokens = {}
    for path in sorted(path for path in folder.glob(f"*{SUFFIX}") if path.is_file()):
        try:
            tokens[path.name.removesuffix(SUFFIX)] = llm.load_context(path)
        except InputError as error:
            logger.warning(f"this context is left out: {error}")
    kept = [name for name, ids in tokens.items() if llm.has_context(ids)]
    if len(kept) < len(tokens):
        logger.warning(f"the cache has room for {len(kept)} of {len(tokens)} contexts: give it more with --kv-memory")
    return kept


class Contexts:
    """Saves contexts into a folder, one at a time: each takes host memory while it is written."""

    def __init__(self, service: Service, folder: Path) -> None:
        self._service = service
        self._folder = folder
        self._lock = Lock()

    async def save(self, request: Request) -> Response:
        """Answers ``POST /contexts/{name}``: reads a prompt and saves it.

        The body has ``tokens``, or ``prompt`` or ``messages`` as for ``/tokenize``.

        Raises:
          ApiError: if the name or the body is wrong, the prompt too short or too long, or the file cannot be written.
        """
        name = request.path_params["name"]
        if not _NAME.fullmatch(name):
            raise bad_request(
                f"the name of a context has 1 to 64 letters, digits, '.', '_' and '-', and does not begin with '.'; "
                f"got {shown(name)}",
                "name",
            )
        body = await read_body(request, self._service.options.max_body_bytes)
        ids = await to_thread.run_sync(lambda: _tokens(self._service, parse_body(body)))
        async with self._lock:
            found = await unless_disconnected(request.receive, self._read(ids))
            if found is None:
                return Response(status_code=CLIENT_LEFT)
            size = await to_thread.run_sync(self._write, name, found)
        boundary = self._service.llm.contexts.boundary(len(ids))
        return Json({"object": "context", "id": name, "tokens": len(ids), "saved_tokens": boundary, "bytes": size})

    async def _read(self, ids: tuple[int, ...]) -> SavedContext:
        """Returns the pages of a prompt, after the engine thread has read it."""
        llm, thread, found = self._service.llm, self._service.thread, []
        generation = await to_thread.run_sync(
            lambda: llm.request(llm.context_prompt(ids), SamplingParams(max_tokens=1), is_context=True)  # takes time
        )
        ticket = Ticket(generation=generation, on_finish=lambda: found.append(llm.read_context(ids)))
        thread.submit([ticket])
        try:
            await outputs_of([ticket])
        finally:
            thread.cancel([ticket])
        return found[0]

    def _write(self, name: str, context: SavedContext) -> int:
        try:
            return self._service.llm.contexts.write(self._folder / f"{name}{SUFFIX}", context)
        except InputError as error:
            logger.error(str(error))
            raise ApiError(507, "not_saved", "the server cannot write the context; its log says why") from None


def _tokens(service: Service, body: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the tokens of a prompt that may become a context; takes its time, for a thread of its own.

    Raises:
      ApiError: if there is none, or it cannot become one; ``param`` is its field.
    """
    named = [field for field in ("tokens", "prompt", "messages") if body.get(field) is not None]
    if len(named) != 1:
        raise bad_request("give one of tokens, prompt and messages", "prompt", "missing_required_parameter")
    is_ids = named == ["tokens"]
    found = DetokenizeRequest.model_validate(body).tokens if is_ids else tokenize(service, body)["tokens"]
    try:
        ids = require_ids(found, service.llm.config.model.vocab_size)
        service.llm.context_prompt(ids)
    except InputError as error:
        raise bad_request(str(error), named[0]) from None
    return ids
