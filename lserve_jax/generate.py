"""`python -m lserve_jax.generate`: generates text from prompts with a model."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lserve_jax.cli.common import (
    OneLineParser,
    ProgressBars,
    required_tokenizer,
    run_command,
    set_up_logging,
    use_compilation_cache,
)
from lserve_jax.cli.flags import add_attention, add_fields, add_shared, given
from lserve_jax.cli.report import summary, to_json
from lserve_jax.config.attention import AttentionConfig
from lserve_jax.config.errors import InputError
from lserve_jax.engine.outputs import RequestOutput
from lserve_jax.engine.request import require_room
from lserve_jax.engine.setup import Setup, default_sampling_params, prepare
from lserve_jax.llm import LLM
from lserve_jax.runtime.implementations import describe
from lserve_jax.runtime.sampling import SamplingParams
from lserve_jax.text.tokenizer import Tokenizer

_MAX_NUM_SEQS = 8


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all flags."""
    parser = OneLineParser(prog="python -m lserve_jax.generate", description=__doc__)
    model = parser.add_argument_group("model")
    add_shared(model, "--model", "--tokenizer", "--dtype", "--max-model-len", "--prefill-chunk")
    add_shared(model, "--implementation", "--recall-interval")
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be given several times, for a batch"
    )
    prompt.add_argument(
        "--prompt-file", action="append", default=[], metavar="FILE", help="UTF-8 text; - is stdin; as --prompt"
    )
    prompt.add_argument("--system-prompt", metavar="TEXT", help="the conversation's system message (default: none)")
    prompt.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat format")
    sampling = parser.add_argument_group("sampling (defaults from the model's generation_config.json, else greedy)")
    add_fields(sampling, SamplingParams)
    attention = parser.add_argument_group(
        "attention (fields of the preset; the head pattern of a model may have its own defaults)"
    )
    add_attention(attention)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object per prompt, one per line")
    output.add_argument("--dry-run", action="store_true", help="print the memory plan and stop; loads no weights")
    add_shared(output, "--quiet")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line on stderr that says what to change."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: _generate(args))


def _generate(args: argparse.Namespace) -> None:
    set_up_logging(is_quiet=args.quiet)
    texts = _read_prompts(args.prompt, args.prompt_file)
    if not texts and not args.dry_run:
        raise InputError("no prompt: give --prompt TEXT or --prompt-file FILE")
    SamplingParams(**given(args, SamplingParams))  # finds wrong values before the model is opened
    setup = _prepare(args, len(texts))
    if args.dry_run:
        setup.warn()
        print(setup.plan.describe())
        print(f"{'head pattern:':<17} {setup.pattern_origin}\n{'kernels:':<17} {describe(setup.implementations)}")
        return
    # Find every error of the user before loading weights.
    tokenizer = required_tokenizer(setup.checkpoint, args.tokenizer)
    prompts = [_encode(tokenizer, text, args) for text in texts]
    for prompt in prompts:
        require_room(len(prompt), setup.sizes.max_model_len)
    params = dataclasses.replace(default_sampling_params(setup.checkpoint), **given(args, SamplingParams))
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
    return prepare(
        args.model,
        attention=args.attention,
        head_pattern=args.head_pattern,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        recall_interval=args.recall_interval,
        max_num_seqs=min(max(num_prompts, 1), _MAX_NUM_SEQS),
        prefill_chunk=args.prefill_chunk,
        implementation=args.implementation,
        assume_streaming=args.dry_run,
        **given(args, AttentionConfig),
    )


def _read_prompts(texts: list[str], files: list[str]) -> list[str]:
    prompts = [*texts, *(_read_text(name) for name in files)]
    if any(not prompt.strip() for prompt in prompts):
        raise InputError("the prompt is empty: give some text")
    return prompts


def _read_text(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"--prompt-file {name}: {error.strerror}") from None
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt-file {name} is not UTF-8 text (byte {error.start})") from None


def _encode(tokenizer: Tokenizer, text: str, args: argparse.Namespace) -> list[int]:
    if args.raw or not tokenizer.has_chat_template:
        if args.system_prompt:
            raise InputError("--system-prompt needs a chat format: this model has none, or --raw is given")
        return tokenizer.encode(text)
    system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    return tokenizer.apply_chat_template([*system, {"role": "user", "content": text}])


def _run(
    llm: LLM, prompts: list[list[int]], params: SamplingParams, *, is_streaming: bool, bars: ProgressBars
) -> list[RequestOutput]:
    """Returns the outputs and prints their texts: for one prompt during generation, for several at the end."""
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
