"""`python -m lserve_jax.generate`: text from a model on the command line."""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lserve_jax.cli.common import OneLineParser, ProgressBars, layer_numbers, run_command, use_compilation_cache
from lserve_jax.cli.report import summary, to_json
from lserve_jax.config.attention import KV_DTYPES, PRESETS
from lserve_jax.config.inference import DTYPES
from lserve_jax.engine.outputs import RequestOutput
from lserve_jax.engine.request import require_room
from lserve_jax.engine.setup import DEFAULT_MODEL, IMPLEMENTATIONS, Setup, default_sampling_params, prepare
from lserve_jax.llm import LLM
from lserve_jax.runtime.implementations import describe
from lserve_jax.runtime.sampling import SamplingParams
from lserve_jax.text.tokenizer import Tokenizer, open_tokenizer

_MAX_BATCH = 8

_SAMPLING_FLAGS: dict[str, dict[str, Any]] = {
    "--max-tokens": {"type": int, "default": 256, "help": "tokens to generate at most"},
    "--temperature": {"type": float, "help": "0 takes the likeliest token (default: the model's own, else 0)"},
    "--top-p": {"type": float, "help": "sample from the likeliest tokens that hold this probability"},
    "--top-k": {"type": int, "help": "sample from this many likeliest tokens"},
    "--min-p": {"type": float, "help": "drop tokens less likely than this times the likeliest"},
    "--seed": {"type": int, "help": "makes sampling repeat itself"},
    "--stop": {"action": "append", "metavar": "TEXT", "help": "end before this text; may be given several times"},
    "--ignore-eos": {"action": "store_true", "help": "go on after an end-of-sequence token"},
}

_ATTENTION_FLAGS: dict[str, dict[str, Any]] = {
    "--token-budget": {"type": int, "help": "tokens whose pages a retrieval head reads for one token"},
    "--page-size": {"type": int, "help": "tokens a page of the KV cache (default: what suits the budget)"},
    "--sub-page-size": {"type": int, "help": "tokens that share key statistics"},
    "--selector-interval": {"type": int, "help": "decode steps from one page selection to the next"},
    "--selector-spread": {"type": float, "help": "share of the distance between key bounds in a page's score, 0 to 1"},
    "--has-lookahead": {
        "action": argparse.BooleanOptionalAction,
        "help": "choose the page after a chosen end of a page with it",
    },
    "--sink": {"type": int, "help": "first tokens that streaming heads see"},
    "--local": {"type": int, "help": "newest tokens that streaming heads see while decoding"},
    "--prefill-local": {"type": int, "help": "the same during prefill"},
    "--static-sparsity": {"type": float, "help": "share of KV heads that stream, 0 to 1"},
    "--dense-layers": {"type": str, "metavar": "I,J", "help": "layers whose retrieval heads read everything"},
    "--kv-dtype": {
        "choices": ("auto", *KV_DTYPES),
        "help": "element type of the KV cache (int4: of what grows with the context)",
    },
}


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all flags."""
    parser = OneLineParser(prog="python -m lserve_jax.generate", description=__doc__)
    model = parser.add_argument_group("model")
    model.add_argument("--model", default=DEFAULT_MODEL, help="folder, .gguf file, hub id or name (%(default)s)")
    model.add_argument("--tokenizer", help="folder or .gguf file to take the tokenizer from instead")
    model.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of weights and activations")
    model.add_argument("--max-model-len", type=int, help="tokens of prompt and answer (default: the model's own)")
    model.add_argument("--prefill-chunk", type=int, help="prompt tokens a prefill call")
    model.add_argument("--implementation", choices=IMPLEMENTATIONS, default="auto", help="kernels (%(default)s)")
    model.add_argument("--recall-interval", type=int, help="measure page selection's recall at every so many steps")
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="several make a batch")
    prompt.add_argument("--prompt-file", action="append", default=[], metavar="FILE", help="UTF-8 text; - is stdin")
    prompt.add_argument("--system-prompt", metavar="TEXT", help="the conversation's system message")
    prompt.add_argument("--raw", action="store_true", help="continue the prompt as it stands, without chat format")
    sampling = parser.add_argument_group("sampling (defaults from the model's generation_config.json, else greedy)")
    for flag, options in _SAMPLING_FLAGS.items():
        sampling.add_argument(flag, **options)
    attention = parser.add_argument_group("attention")
    attention.add_argument("--attention", choices=tuple(PRESETS), default="lserve", help="preset (%(default)s)")
    attention.add_argument("--head-pattern", metavar="DIR", help="head gates in DuoAttention's format")
    for flag, options in _ATTENTION_FLAGS.items():
        attention.add_argument(flag, **options)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object a prompt, a line each")
    output.add_argument("--dry-run", action="store_true", help="print the memory plan and stop; loads no weights")
    output.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line on stderr that says what to change."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: _generate(args))


def _generate(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.ERROR if args.quiet else logging.WARNING, format="%(message)s", force=True)
    texts = _read_prompts(args.prompt, args.prompt_file)
    if not texts and not args.dry_run:
        raise ValueError("no prompt: give --prompt TEXT or --prompt-file FILE")
    _sampling_params(args, SamplingParams())
    setup = _prepare(args, len(texts))
    if args.dry_run:
        setup.warn()
        print(f"{setup.plan.describe()}\n{'kernels:':<17} {describe(setup.implementations)}")
        return
    # All that can be wrong is found before the weights are loaded.
    tokenizer = open_tokenizer(setup.checkpoint.tokenizer_source, args.tokenizer)
    prompts = [_encode(tokenizer, text, args) for text in texts]
    for prompt in prompts:
        require_room(len(prompt), setup.sizes.max_model_len)
    params = _sampling_params(args, default_sampling_params(setup.checkpoint))
    use_compilation_cache()
    with ProgressBars(is_shown=not args.quiet) as bars:
        llm = LLM.from_setup(
            setup, tokenizer=tokenizer, on_progress=bars.report, expected_tokens=max(map(len, prompts))
        )
        outputs = _run(llm, prompts, params, is_streaming=not args.json, bars=bars)
    for output in outputs:
        if args.json:
            print(json.dumps(to_json(llm, output), ensure_ascii=False), flush=True)
    if not args.quiet:
        print(summary(llm, outputs), file=sys.stderr)


def _prepare(args: argparse.Namespace, num_prompts: int) -> Setup:
    options = {name: getattr(args, name) for name in (flag[2:].replace("-", "_") for flag in _ATTENTION_FLAGS)}
    if options["dense_layers"] is not None:
        options["dense_layers"] = layer_numbers(options["dense_layers"])
    return prepare(
        args.model,
        attention=args.attention,
        head_pattern=args.head_pattern,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        recall_interval=args.recall_interval,
        max_num_seqs=min(max(num_prompts, 1), _MAX_BATCH),
        prefill_chunk=args.prefill_chunk,
        implementation=args.implementation,
        assume_streaming=args.dry_run and args.static_sparsity is not None,
        **options,
    )


def _read_prompts(texts: list[str], files: list[str]) -> list[str]:
    prompts = [*texts, *(_read_text(name) for name in files)]
    if any(not prompt.strip() for prompt in prompts):
        raise ValueError("the prompt is empty: give some text")
    return prompts


def _read_text(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ValueError(f"--prompt-file {name}: {error.strerror}") from None
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {name} is not UTF-8 text (byte {error.start})") from None


def _encode(tokenizer: Tokenizer | None, text: str, args: argparse.Namespace) -> list[int]:
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer: give one with --tokenizer")
    if args.raw or not tokenizer.has_chat_template:
        if args.system_prompt:
            raise ValueError("--system-prompt needs a chat format: this model has none, or --raw is given")
        return tokenizer.encode(text)
    system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    return tokenizer.apply_chat_template([*system, {"role": "user", "content": text}])


def _sampling_params(args: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    given = {name: getattr(args, name) for name in (flag[2:].replace("-", "_") for flag in _SAMPLING_FLAGS)}
    return dataclasses.replace(defaults, **{name: value for name, value in given.items() if value is not None})


def _run(
    llm: LLM, prompts: list[list[int]], params: SamplingParams, *, is_streaming: bool, bars: ProgressBars
) -> list[RequestOutput]:
    """Returns the outputs, their text written to stdout: as it comes for one prompt, at the end for several."""
    if len(prompts) > 1 or not is_streaming:
        outputs = llm.generate(prompts, params)
        bars.close()
        for number, output in enumerate(outputs, start=1):
            if is_streaming:
                print(f"=== {number}/{len(outputs)}\n{output.text}", flush=True)
        return outputs
    finished = None
    for chunk, output in llm.stream_output(prompts[0], params):
        if chunk:
            bars.close()
            sys.stdout.write(chunk)
            sys.stdout.flush()
        finished = output
    print(flush=True)
    assert finished is not None
    return [finished]


if __name__ == "__main__":
    sys.exit(main())
