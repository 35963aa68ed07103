"""Reports of finished requests: a JSON object for programs, a few lines for people."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lserve_jax.engine.outputs import RequestOutput
from lserve_jax.engine.setup import Setup
from lserve_jax.llm import LLM
from lserve_jax.runtime.implementations import by_op, describe, refusals


def to_json(llm: LLM, output: RequestOutput) -> dict[str, Any]:
    """Returns what ``--json`` prints for one prompt; speeds in tokens per second, without compilation."""
    metrics = output.metrics
    return {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(output.token_ids),
        "finish_reason": output.finish_reason,
        "ttft_s": round(metrics.ttft_s, 4),
        "cached_tokens": metrics.cached_tokens,
        "prefill_tokens_per_s": _rate(len(output.prompt_token_ids) - metrics.cached_tokens, metrics.prefill_s),
        "decode_tokens_per_s": _rate(metrics.decoded_tokens, metrics.decode_s),
        "compile_s": round(llm.compile_seconds, 3),
        "attention": {
            **dataclasses.asdict(llm.config.attention),
            "retrieval_heads": list(llm.config.num_retrieval),
            "implementation": llm.config.implementation or "auto",
        },
        "weights": {"forms": llm.setup.plan.weight_words, "bytes": llm.setup.plan.weight_bytes},
        "kv_cache": {
            "dtype": llm.config.kv_dtype,
            "retrieval_bytes": metrics.retrieval_bytes,
            "streaming_bytes": metrics.streaming_bytes,
            "dense_bf16_bytes": metrics.dense_bf16_bytes,
        },
        "pages_read_ratio": _rounded(metrics.pages_read_ratio),
        "attention_recall": _rounded(metrics.attention_recall),
        "attention_recall_by_layer": [_rounded(x) for x in metrics.attention_recall_by_layer or ()] or None,
        "implementations": by_op(llm.implementations),
        "refusals": refusals(llm.implementations),
        **_logprobs(output),
    }


def _logprobs(output: RequestOutput) -> dict[str, Any]:
    """Returns the log-probabilities that were asked for; the likeliest tokens as pairs of id and log-probability."""
    names = ("logprobs", "top_logprobs", "prompt_logprobs", "prompt_top_logprobs")
    prompt = {} if output.prompt_logprobs is None else {"prompt_token_ids": list(output.prompt_token_ids)}
    return prompt | {name: found for name in names if (found := getattr(output, name)) is not None}


def plan_to_json(setup: Setup) -> dict[str, Any]:
    """Returns what ``--dry-run --json`` prints; None stands for what is not known because the device is not here."""
    plan, config = setup.plan, setup.config
    heads, kept = config.model.num_layers * config.model.num_kv_heads, sum(config.num_retrieval)
    return {
        "max_model_len": plan.sizes.max_model_len,
        "max_num_seqs": plan.sizes.max_num_seqs,
        "prefill_chunk": plan.sizes.prefill_chunk,
        "dtype": config.dtype,
        "kv_dtype": config.kv_dtype,
        "retrieval_heads": kept,
        "streaming_heads": heads - kept,
        "head_pattern": setup.pattern_origin,
        "retrieval_pages": plan.pools.retrieval,
        "streaming_pages": plan.pools.streaming,
        "weight_forms": plan.weight_words,
        "weight_bytes": plan.weight_bytes,
        "retrieval_bytes": plan.retrieval_bytes,
        "streaming_bytes": plan.streaming_bytes,
        "open_page_bytes": plan.tail_bytes,
        "total_bytes": plan.total_bytes,
        "free_bytes": plan.available_bytes,
        "prefix_cache": plan.has_prefix_cache,
        "swap_pages": plan.pools.swap,
        "fits": None if plan.available_bytes is None else plan.fits,
        "largest_context": plan.largest_context,
        "implementations": by_op(setup.implementations) or None,
        "refusals": refusals(setup.implementations) or None,
    }


def plan_to_text(setup: Setup) -> str:
    """Returns what ``--dry-run`` prints for people."""
    kernels = describe(setup.implementations) if setup.device.is_here else "not known: the device is not here"
    rows = (("head pattern:", setup.pattern_origin), ("kernels:", kernels))
    return "\n".join([setup.plan.describe(), *(f"{name:<17} {value}" for name, value in rows)])


def summary(llm: LLM, outputs: Sequence[RequestOutput]) -> str:
    """Returns the closing statistics for people, one fact per line."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    cached = sum(output.metrics.cached_tokens for output in outputs)
    answer = sum(len(output.token_ids) for output in outputs)
    decoded = sum(output.metrics.decoded_tokens for output in outputs)
    first = outputs[0].metrics.ttft_s
    prefill_s = sum(output.metrics.prefill_s for output in outputs)
    decode_s = max(output.metrics.decode_s for output in outputs)
    held = sum(output.metrics.retrieval_bytes + output.metrics.streaming_bytes for output in outputs)
    dense = sum(output.metrics.dense_bf16_bytes for output in outputs)
    ratios = [output.metrics.pages_read_ratio for output in outputs if output.metrics.pages_read_ratio is not None]
    kept, heads = sum(llm.config.num_retrieval), llm.config.model.num_layers * llm.config.model.num_kv_heads
    attention = llm.config.attention
    recalls = [output.metrics.attention_recall for output in outputs if output.metrics.attention_recall is not None]
    lines = [
        f"prompt {prompt} tokens"
        + (f", {cached} of them cached" if cached else "")
        + f", {_rate(prompt - cached, prefill_s)} tokens/s; first token after {first:.2f} s",
        (
            f"answer {answer} tokens, {_rate(decoded, decode_s)} tokens/s; "
            f"compilation {llm.compile_seconds:.1f} s (not counted in speeds)"
        ),
        f"attention {attention.preset}: {kept} retrieval + {heads - kept} streaming KV heads, "
        f"token budget {attention.token_budget or 'all'}"
        + (f", {sum(ratios) / len(ratios):.0%} of the pages read" if ratios else "")
        + (f", which held {sum(recalls) / len(recalls):.1%} of the attention" if recalls else ""),
        f"weights {llm.setup.plan.weight_words}: {llm.setup.plan.weight_bytes / 2**20:.1f} MiB",
        f"KV cache {llm.config.kv_dtype}: {held / 2**20:.1f} MiB, {held / dense:.2f}x of dense bfloat16",
        f"kernels {describe(llm.implementations)}",
    ]
    return "\n".join(lines)


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 4)


def _rate(tokens: int, seconds: float) -> float:
    return round(tokens / seconds, 2) if seconds > 0 else 0.0
