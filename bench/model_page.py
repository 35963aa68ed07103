"""A model's page in docs/models, from committed results: `python -m bench.model_page`.

Reads bench/results (accuracy, cpu, cpu_long), the pattern that ships with the package, and the memory plan of the
checkpoint. Run it again after a measurement; a test compares what it writes with the committed file.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lserve_jax import Setup, prepare
from lserve_jax.weights import embedded

ROOT = Path(__file__).parents[1]
MODEL = embedded.MODEL_NAME
PAGE = ROOT / "docs" / "models" / f"{MODEL}.md"

_RESULTS = ROOT / "bench" / "results"
_PATTERN = ROOT / "lserve_jax" / "data" / "patterns" / MODEL
_MEMORY: tuple[tuple[str, dict[str, Any]], ...] = (
    ("`dense`", {"attention": "dense"}),
    ("`lserve`", {"attention": "lserve"}),
    ("`lserve`, int8", {"attention": "lserve", "kv_dtype": "int8"}),
    ("`lserve`, int4", {"attention": "lserve", "kv_dtype": "int4"}),
    ("`lserve`, budget 1024", {"attention": "lserve", "token_budget": 1024}),
    ("`lserve`, budget 1024, int8", {"attention": "lserve", "token_budget": 1024, "kv_dtype": "int8"}),
)
_LENGTHS = (8192, 32768, 131072)
_SYSTEMS = {
    "dense": "`dense`",
    "lserve": "`lserve`, budget 1024",
    "lserve_int8": "`lserve`, budget 1024, int8",
    "lserve:token_budget=4096": "`lserve`, budget 4096",
}
_FIELDS = {
    "token_budget=25%": "",
    "token_budget=50%": "half of the context",
    "token_budget=100%": "everything read",
    "kv_dtype=int8": "int8",
    "kv_dtype=int4": "int4",
    "static_sparsity=0.75": "75% streaming",
}
"""How the page writes a field of a variant; an empty text for a field that the page takes for granted."""

_HEAD_TEXT = """\
The embedded model: the default of every command. `python -m bench.model_page` writes this page from committed results;
do not edit it by hand."""
_PATTERN_TEXT = """\
The package ships a head pattern for this model (`lserve_jax/data/patterns/{model}`). `calibrate` found it with
the method `{method}` on {num_prompts} prompts of {length:,} tokens. The table shows the negative log-likelihood of the
answers, in nats per token, on prompts that the ranking had not seen."""
_MEMORY_TEXT = """\
The KV cache of one sequence, key statistics included, from the memory plan (`--dry-run`). A smaller budget has smaller
pages and therefore more statistics. The model was made for 8,192 tokens: beyond them only speed and memory mean
anything."""
_ACCURACY_TEXT = """\
From [bench/results/accuracy](../../bench/results/accuracy/summary.json); brackets are 95% intervals of the paired
difference to dense. The budget is a quarter of the prompt; half of the KV heads stream unless the row says otherwise.
`copy` shows the share of right tokens. [Commands and discussion](../accuracy.md)."""
_SPEED_TEXT = """\
One sequence, bfloat16, two CPU cores with AMX. Medians of three interleaved rounds, from
[bench/results/cpu](../../bench/results/cpu/targets.txt):"""
_LONG_TEXT = """\
Long contexts, one round of fresh processes, from
[bench/results/cpu_long](../../bench/results/cpu_long/targets.txt); a dash was not measured:"""


def page() -> str:
    """Returns the text of the page."""
    setup = prepare(MODEL, max_model_len=_LENGTHS[0], max_num_seqs=1, prefill_chunk=512)
    parts = (_head(setup), _pattern(), _memory(), _accuracy(), _speed(), _settings(setup))
    return "\n\n".join(parts) + "\n"


def _head(setup: Setup) -> str:
    model = setup.config.model
    rows = (
        ("model", "SmolLM2-135M-Instruct (Hugging Face), Apache-2.0"),
        ("file", f"`{embedded.FILE_NAME}`, {embedded.SIZE:,} bytes, from the package `{embedded.REQUIREMENT}`"),
        ("SHA-256", f"`{embedded.SHA256}`"),
        ("architecture", f"`{model.architecture}`, {model.num_layers} layers"),
        ("attention", f"{model.num_heads} query heads, {model.num_kv_heads} KV heads of {model.head_dim} channels"),
        ("vocabulary", f"{model.vocab_size:,} tokens"),
        ("context", f"{model.max_context:,} tokens"),
        ("weights in memory", "; ".join(map(_weights, ("bfloat16", "int8", "auto")))),
    )
    return "\n\n".join(
        (
            f"# {MODEL}",
            _HEAD_TEXT,
            "## Checkpoint\n\n" + _table(("", ""), rows),
        )
    )


def _pattern() -> str:
    found = json.loads((_PATTERN / "config.json").read_text(encoding="utf-8"))
    kinds = ("retrieval", "copying", "text")
    rows = [
        (
            f"{row['share']:.0%}" if row["streaming"] else "none (dense)",
            str(row["streaming"]),
            *(f"{row['nll'][kind]:.3f}" for kind in kinds),
        )
        for row in found["expected_loss"]
    ]
    text = _PATTERN_TEXT.format(model=MODEL, **found)
    heads = ("KV heads that stream", "heads", "facts", "copying", "text")
    picture = f"![the pattern, layer by layer](../pattern-{MODEL}.png)"
    return "\n\n".join(
        ("## Head pattern", text, _table(heads, rows), picture, "[How patterns are found](../calibration.md).")
    )


def _weights(weight_dtype: str) -> str:
    """Returns what the weights take in a form."""
    plan = prepare(MODEL, max_model_len=_LENGTHS[0], weight_dtype=weight_dtype).plan
    return f"`{weight_dtype}`: {_mib(plan.weight_bytes)}" + (f" ({plan.weight_words})" * (weight_dtype == "auto"))


def _memory() -> str:
    rows = []
    for name, settings in _MEMORY:
        plans = [
            prepare(MODEL, max_model_len=length, max_num_seqs=1, prefill_chunk=512, **settings).plan
            for length in _LENGTHS
        ]
        rows.append((name, *(_mib(plan.cache_bytes) for plan in plans)))
    return "\n\n".join(("## Memory", _MEMORY_TEXT, _table(("settings", "8K", "32K", "128K"), rows)))


def _accuracy() -> str:
    found = json.loads((_RESULTS / "accuracy" / "summary.json").read_text(encoding="utf-8"))["cells"]
    tasks = [cell for cell in found if "score" in cell]
    tasks.sort(key=lambda cell: (cell["length"], cell["task"]))
    prose = [cell for cell in found if "tail_nll" in cell]
    task_heads = ("task", "length", "settings", "n", "correct", "difference, points", "nll difference", "KV read")
    prose_heads = ("settings", "windows", "perplexity by prefill", "more", "last 128 tokens, decoded", "more")
    return "\n\n".join(
        (
            "## Accuracy",
            _ACCURACY_TEXT,
            _table(task_heads, map(_task_row, tasks)),
            "Perplexity of windows of 2,048 tokens of Python's language reference:",
            _table(prose_heads, map(_prose_row, prose)),
        )
    )


def _task_row(cell: Mapping[str, Any]) -> tuple[str, ...]:
    score = cell["token_accuracy" if cell["task"] == "copy" else "score"]
    return (
        cell["task"],
        f"{cell['length']:,}",
        _setting(cell["variant"]),
        str(cell["n"]),
        f"{100 * score['mean']:.1f}%",
        _interval(score["difference"], 100, 1),
        _interval(cell["nll"]["difference"], 1, 3),
        f"{cell['pages_read_ratio']:.0%}",
    )


def _prose_row(cell: Mapping[str, Any]) -> tuple[str, ...]:
    def more(quantity: Mapping[str, Any]) -> str:
        return (
            "–"
            if quantity["difference"] is None
            else f"{_signed(100 * math.expm1(quantity['difference']['mean']), 1)}%"
        )

    whole, tail = cell["nll"], cell["tail_nll"]
    return (
        _setting(cell["variant"]),
        str(cell["n"]),
        *(f"{math.exp(whole['mean']):.2f}", more(whole)),
        *(f"{math.exp(tail['mean']):.2f}", more(tail)),
    )


def _setting(variant: str) -> str:
    """Returns a variant in words: ``lserve:token_budget=25%+kv_dtype=int8`` is "`lserve`, int8"."""
    preset, _, rest = variant.partition(":")
    words = [_FIELDS.get(field, field) for field in rest.split("+") if field]
    return ", ".join((f"`{preset}`", *(word for word in words if word)))


def _speed() -> str:
    short = _speeds("cpu", "single", (512, 2048, 8192))
    long = _speeds("cpu_long", "long", _LENGTHS)
    return "\n\n".join(
        (
            "## Speed",
            _SPEED_TEXT,
            _table(_speed_heads((512, 2048, 8192)), short),
            _LONG_TEXT,
            _table(_speed_heads(_LENGTHS), long),
            "[Beside other libraries, and how it was measured](../performance.md). No GPU has run it yet.",
        )
    )


def _speed_heads(lengths: Iterable[int]) -> tuple[str, ...]:
    names = [f"{length // 1024}K" if length >= 1024 else str(length) for length in lengths]
    return ("settings", *(f"prefill {n}, tokens/s" for n in names), *(f"decode {n}, ms per token" for n in names))


def _speeds(folder: str, part: str, lengths: Sequence[int]) -> list[tuple[str, ...]]:
    text = (_RESULTS / folder / "medians.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    found = {(row["system"], row["length"], row["field"]): row["median"] for row in rows if row["part"] == part}
    fields = (("prefill_tok_per_s", "{:.0f}"), ("ms_per_token", "{:.1f}"))
    return [
        (
            label,
            *(
                form.format(found[system, length, field]) if (system, length, field) in found else "–"
                for field, form in fields
                for length in lengths
            ),
        )
        for system, label in _SYSTEMS.items()
        if any(key[0] == system for key in found)
    ]


def _settings(setup: Setup) -> str:
    attention = setup.config.attention
    windows = f"sink {attention.sink}, local {attention.local}, prefill local {attention.prefill_local}"
    dense = ", ".join(map(str, attention.dense_layers))
    return f"""## Recommended settings

The pattern's own settings are in force without a flag: {windows}, layer {dense} dense.

- To find facts or passages: `--token-budget` of about a quarter of the prompt, `--kv-dtype int8`.
- For prose: a budget of half of the prompt.
- Not `--kv-dtype int4`: it costs this model half a point of copying and two needles of 100.
- More than half of the heads streaming (`--static-sparsity 0.75`) costs about a point.

```bash
python -m lserve_jax.generate --prompt-file report.txt --token-budget 1024 --kv-dtype int8
```"""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(one: Mapping[str, Any] | None, unit: float, digits: int) -> str:
    if one is None:
        return "–"
    mean, low, high = (_signed(unit * one[name], digits) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _signed(value: float, digits: int) -> str:
    # Not rounded first: −0.000 says that an interval ends below zero.
    return f"{value:+.{digits}f}".replace("-", "−")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAGE, help="(%(default)s)")
    out = parser.parse_args(arguments).out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
