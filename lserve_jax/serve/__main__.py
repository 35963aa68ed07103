"""`python -m lserve_jax.serve`: serves a model to many requests at once, in OpenAI's API."""

import argparse
import json
import logging
import os
import socket
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from lserve_jax.cli.common import ProgressBars, run_command, set_up_logging, use_compilation_cache
from lserve_jax.cli.flags import add_attention, add_fields, add_shared, engine_settings, given
from lserve_jax.cli.parser import OneLineParser
from lserve_jax.config.errors import InputError
from lserve_jax.config.sizes import CacheSettings
from lserve_jax.engine.device import Device, this_device
from lserve_jax.engine.host import host_memory
from lserve_jax.engine.setup import Setup, default_sampling_params, prepare
from lserve_jax.llm import LLM
from lserve_jax.serve.options import ServeOptions
from lserve_jax.text.tokenizer import Tokenizer

logger = logging.getLogger("lserve_jax")

KEY_VARIABLE = "LSERVE_API_KEY"
_MAX_NUM_SEQS = 8
_CACHE: dict[str, dict[str, Any]] = {
    "kv_memory": {"default": "fit", "words": "fit"},
    "swap_memory": {"words": "half of the host's free memory on a GPU, 0 on a CPU, whose memory is the host's"},
    "prefix_windows": {"words": "two for each request that is processed, and 8"},
}
"""What a server does otherwise than `CacheSettings`: it fits into the memory that is there, and keeps more prefixes."""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all flags."""
    parser = OneLineParser(prog="python -m lserve_jax.serve", description=__doc__)
    server = parser.add_argument_group("server")
    add_fields(server, ServeOptions)
    add_shared(server, "--quiet")
    model = parser.add_argument_group("model")
    add_shared(model, "--model", "--tokenizer", "--dtype", "--weight-dtype", "--max-model-len")
    add_shared(
        model,
        "--max-num-seqs",
        default=_MAX_NUM_SEQS,
        help="requests that are processed together (default: %(default)s)",
    )
    add_shared(model, "--prefill-chunk", "--implementation")
    add_fields(model, CacheSettings, own=_CACHE)
    attention = parser.add_argument_group(
        "attention (fields of the preset; the head pattern of a model may have its own defaults)"
    )
    add_attention(attention)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 after a signal, or 2 after one line on stderr that says what to change."""
    return run_command(lambda: _serve(build_parser().parse_args(argv)))


def _serve(args: argparse.Namespace) -> None:
    set_up_logging(is_quiet=args.quiet)
    if not args.quiet:
        logger.setLevel(logging.INFO)
    options = _options(args)
    try:
        from lserve_jax.serve.app import build_app
        from lserve_jax.serve.contexts import load_contexts
        from lserve_jax.serve.engine_thread import EngineThread
        from lserve_jax.serve.metrics import Metrics
        from lserve_jax.serve.server import address_of, serve, take_port
    except ImportError as error:
        raise InputError(f"the server needs its extra: pip install 'lserve_jax[serve]' ({error})") from None
    metrics = Metrics(options.metrics_prefix)
    with take_port(options.host, options.port) as taken:
        _warn_of_strangers(taken, options)
        llm = _load(args)
        if options.contexts is not None:
            logger.info("contexts: %s", ", ".join(load_contexts(llm, Path(options.contexts))) or "none")
        thread = EngineThread(llm, options, metrics)
        app = build_app(thread, options)
        address = address_of(taken)
        serve(
            app,
            thread,
            taken,
            drain_timeout=options.drain_timeout,
            on_ready=lambda: print(_welcome(llm, address, has_key=options.api_key is not None), flush=True),
        )


def _options(args: argparse.Namespace) -> ServeOptions:
    named = given(args, ServeOptions)
    if (key := os.environ.get(KEY_VARIABLE)) is not None:
        if not key:
            raise InputError(f"{KEY_VARIABLE} is set but empty: unset it, or give it a key")
        named.setdefault("api_key", key)
    return ServeOptions(**named)


def _warn_of_strangers(taken: socket.socket, options: ServeOptions) -> None:
    if options.api_key is None and not ip_address(taken.getsockname()[0]).is_loopback:
        logger.warning(f"whoever reaches {options.host} can use this model: set {KEY_VARIABLE} to ask for a key")


def _load(args: argparse.Namespace) -> LLM:
    """Returns the loaded model; finds every error of the user before loading weights."""
    setup = _prepare(args)
    setup.checkpoint.require_weights()
    default_sampling_params(setup.checkpoint)
    use_compilation_cache()
    with ProgressBars(is_shown=not args.quiet) as bars:
        return LLM.from_setup(setup, tokenizer=args.tokenizer, on_progress=bars.report)


def _prepare(args: argparse.Namespace) -> Setup:
    return prepare(
        args.model,
        max_num_seqs=args.max_num_seqs,
        device=(device := this_device()),
        **_cache_settings(device, args.max_num_seqs) | engine_settings(args),
    )


def _cache_settings(device: Device, max_num_seqs: int) -> dict[str, Any]:
    """Returns the defaults of a server."""
    swap = host_memory() // 2 if device.platform == "gpu" else 0
    return {"swap_memory": swap, "prefix_windows": 2 * max_num_seqs + 8}


def _welcome(llm: LLM, address: str, *, has_key: bool) -> str:
    """Returns what is said when the server can answer: where it is, and a line to try."""
    name, sizes = llm.setup.checkpoint.name, llm.setup.sizes
    route, body = _example(llm.tokenizer)
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if has_key else ""
    return (
        f"serving {name} at {address} ({sizes.max_num_seqs} requests at once, {sizes.max_model_len} tokens each)\n"
        f"curl -sN {address}{route} -H 'Content-Type: application/json'{key} "
        f"-d '{json.dumps({**body, 'max_tokens': 64, 'stream': True})}'"
    )


def _example(tokenizer: Tokenizer | None) -> tuple[str, dict[str, Any]]:
    """Returns a route that suits the model, and a request for it."""
    if tokenizer is not None and tokenizer.chat_template is not None:
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    return "/v1/completions", {"prompt": [1, 2, 3] if tokenizer is None else "The sky is blue because"}


if __name__ == "__main__":
    sys.exit(main())
