"""`transformers` with SDPA in a separate process: two frameworks do not share a GPU's memory."""

import argparse
import importlib
import importlib.util
import subprocess
import sys
import time
from typing import Any

import numpy as np

from bench.e2e.journal import Journal
from bench.e2e.models import GPU_MODEL
from bench.provenance import ROOT, commit
from bench.text import one_line, rounded
from lserve_jax.models.known import known_configs

TRANSFORMERS = "transformers SDPA"
PEER_CONTEXTS = (8192, 32768, 131072)
PEER_SHARE = 0.25
"""The peer's share of the minutes."""


def peer(args: argparse.Namespace) -> None:
    """Measures `transformers` with SDPA, or says in one line why not. It uses no JAX device."""
    name = args.model or GPU_MODEL
    try:
        torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
        facts = known_configs()[name]
        device = torch.cuda.get_device_name()
    except KeyError:
        return print(f"peer: left out: the configuration of {name} is not known by name")
    except (ImportError, RuntimeError, AssertionError) as error:
        return print(f"peer: left out: {one_line(error)}")
    versions = {
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }
    journal = Journal(args.out, versions, is_retrying=args.retry)
    settings = [{"part": "peer", "peer": TRANSFORMERS, "model": name, "context": n, "batch": 1} for n in PEER_CONTEXTS]
    missing = [one for one in settings if not journal.has(one)]
    if not missing:
        return None
    unused = ("torch_dtype", "architectures", "rope_scaling", "model_type")
    shapes = {name: value for name, value in facts.items() if name not in unused}
    config = transformers.AutoConfig.for_model(facts["model_type"], **shapes)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    for one in missing:
        try:
            with torch.inference_mode():
                result = _peer_times(torch, model, one["context"])
        except RuntimeError as error:  # torch's out of memory is one
            result = {"error": one_line(error)}
        torch.cuda.empty_cache()
        journal.add(one, result)
        print("peer:", one["context"], result, flush=True)
    return None


def _peer_times(torch: Any, model: Any, context: int) -> dict[str, Any]:
    def timed(ids: Any, past: Any) -> tuple[float, Any]:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        out = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        return time.perf_counter() - begin, out.past_key_values

    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, model.config.vocab_size, (1, context), device="cuda")
    timed(ids[:, :1024], None)
    prefill_s, past = timed(ids, None)
    steps = []
    for _ in range(10):
        seconds, past = timed(ids[:, :1], past)
        steps.append(seconds)
    return {
        "measured": "whole",
        "prefill_s": rounded(prefill_s),
        "ms_per_token": rounded(float(np.median(steps[2:])) * 1e3),
        "peak_bytes_of_process": torch.cuda.max_memory_allocated(),
    }


def peer_process(args: argparse.Namespace) -> None:
    """Runs the part ``peer`` alone in another process, before JAX takes the GPU's memory."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        return print(f"peer: left out: {' and '.join(absent)} not installed", flush=True)
    command = [sys.executable, "-m", "bench.e2e", "--out", str(args.out.resolve()), "--parts", "peer"]
    command += (["--model", args.model] if args.model else []) + (["--retry"] if args.retry else [])
    seconds = args.minutes * 60 * PEER_SHARE
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return print(f"peer: stopped after {seconds:.0f} s", flush=True)
    return print(f"peer: ended with status {code}", flush=True) if code else None
