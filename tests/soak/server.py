"""`python -m tests.soak.server`: the server of a soak, with too little memory for what is asked of it.

It is the product's: LLM, engine thread, routes and signals. It has one route more, /soak, which tells what is held.
All attention is at work: selected pages, streaming heads, int4 pages, small pages.
"""

import resource
import tempfile
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from lserve_jax import LLM, prepare
from lserve_jax.cli.common import set_up_logging
from lserve_jax.engine import room
from lserve_jax.serve.app import build_app
from lserve_jax.serve.engine_thread import EngineThread
from lserve_jax.serve.events import Json
from lserve_jax.serve.options import ServeOptions
from lserve_jax.serve.server import address_of, serve, take_port
from tests.soak.questions import CONTEXT

_MODEL = Path(__file__).parents[1] / "golden" / "tiny" / "llama3"
_GATES = "1\t0\n0\t1\n"
_SETTINGS: dict[str, Any] = {
    "attention": "lserve",
    "dtype": "float32",
    "kv_dtype": "int4",
    "max_model_len": CONTEXT,
    "max_num_seqs": 4,
    "page_size": 8,
    "sub_page_size": 4,
    "token_budget": 56,
    "selector_interval": 3,
    "sink": 12,
    "local": 21,
    "prefill_local": 50,
    "prefill_chunk": 64,
    "steps_per_call": 4,
}


def small_llm(folder: Path) -> LLM:
    """Returns the model with pages for a third of its slots, and room for the others in host memory."""
    settings = _settings(folder)
    settings["prefix_windows"] = 2
    plan = prepare(**settings).plan
    kv_memory = plan.streaming_bytes + plan.tail_bytes + plan.retrieval_bytes // 3
    return LLM(**settings, kv_memory=kv_memory, swap_memory=4 * plan.total_bytes)


def plain_llm(folder: Path) -> LLM:
    """Returns the same model with all the memory that it needs, and no prefix cache."""
    return LLM(**_settings(folder), prefix_cache=False)


def _settings(folder: Path) -> dict[str, Any]:
    (folder / "full_attention_heads.tsv").write_text(_GATES)
    return {"model": str(_MODEL), "head_pattern": folder, **_SETTINGS}


def held(thread: EngineThread) -> dict[str, Any]:
    """Returns what requests hold, and what has happened; true once no request is open."""
    scheduler, cache = thread.llm.engine.scheduler, thread.llm.engine.scheduler.cache
    pools = [pool for _, pool in scheduler.allocator.pools]
    assert cache is not None
    return {
        "open": len(thread._open),
        "is_idle": thread.llm.session.is_idle and scheduler.is_idle,
        "held_pages": sum(pool.num_pages - pool.num_free - pool.num_evictable for pool in pools),
        "pages": sum(pool.num_pages for pool in pools),
        "free_slots": scheduler.num_free_slots,
        "swapped": len(scheduler.swapped),
        "swaps": scheduler.num_swaps,
        "hit_tokens": cache.counts.hits,
        "evicted": cache.counts.evicted_entries + cache.counts.evicted_windows,
        "rss": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
    }


def main() -> None:
    """Serves until SIGTERM."""
    room.MARGIN = 16  # contexts are shorter than the product's margin: with it, nobody would ever have to leave
    set_up_logging(is_quiet=True)
    with tempfile.TemporaryDirectory() as folder, take_port("127.0.0.1", 0) as taken:
        options = ServeOptions(
            served_model_name="tiny", max_queued_requests=24, max_body_bytes=100_000, contexts=folder
        )
        thread = EngineThread(small_llm(Path(folder)), options)
        app = build_app(thread, options)

        async def soak(_: Request) -> Json:
            return Json(held(thread))

        app.router.routes.append(Route("/soak", soak))
        serve(app, thread, taken, drain_timeout=600, on_ready=lambda: print(address_of(taken), flush=True))


if __name__ == "__main__":
    main()
