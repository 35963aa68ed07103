"""`python -m lserve_jax.generate`: generates text from prompts with a model."""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lserve_jax.cli.common import (
    ProgressBars,
    required_tokenizer,
    run_command,
    set_up_logging,
    use_compilation_cache,
)
from lserve_jax.cli.flags import (
    add_attention,
    add_fields,
    add_shared,
    engine_settings,
    given,
    local,
    local_path,
    positive_memory_size,
)
from lserve_jax.cli.parser import OneLineParser
from lserve_jax.cli.prompts import PromptEncoder
from lserve_jax.cli.report import plan_to_json, plan_to_text, summary, to_json
from lserve_jax.cli.streams import to_json_line
from lserve_jax.config.errors import InputError
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.config.sizes import CacheSettings
from lserve_jax.engine.context_file import SavedContext
from lserve_jax.engine.contexts import context_format
from lserve_jax.engine.device import Device, device_elsewhere, this_device
from lserve_jax.engine.inputs import naming_the_prompt, require_ids, with_bad_words_spelled
from lserve_jax.engine.outputs import RequestOutput
from lserve_jax.engine.request import require_room
from lserve_jax.engine.setup import Setup, default_sampling_params, prepare
from lserve_jax.llm import LLM
from lserve_jax.text.chat import ChatOptions
from lserve_jax.text.tokenizer import Tokenizer

logger = logging.getLogger("lserve_jax")

_MAX_NUM_SEQS = 8
_TEMPLATE_ADVICE = "--raw says that this is meant; --chat-template NAME or FILE gives a template"
_CHAT_FLAGS = ("--system-prompt", "--assistant-prefix", "--chat-template", "--chat-template-config", "--tools")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all flags."""
    parser = OneLineParser(prog="python -m lserve_jax.generate", description=__doc__)
    model = parser.add_argument_group("model")
    add_shared(model, "--model", "--tokenizer", "--dtype", "--weight-dtype", "--max-model-len", "--prefill-chunk")
    add_shared(model, "--implementation", "--recall-interval")
    add_fields(model, CacheSettings, ["kv_memory", "prefix_cache"])
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be given several times, for a batch"
    )
    prompt.add_argument(
        "--prompt-file",
        type=local,
        action="append",
        default=[],
        metavar="FILE",
        help="UTF-8 text; - is stdin; as --prompt",
    )
    prompt.add_argument(
        "--context-file",
        type=local_path,
        metavar="FILE",
        help="a saved context (see --save-context), which each prompt continues and which is not read again",
    )
    prompt.add_argument("--system-prompt", metavar="TEXT", help="the conversation's system message (default: none)")
    prompt.add_argument("--assistant-prefix", metavar="TEXT", help="begins the answer; only what follows is printed")
    prompt.add_argument(
        "--chat-template",
        metavar="NAME|FILE",
        help="a chat template of the model by name, or a file (default: the model's own)",
    )
    prompt.add_argument(
        "--chat-template-config", metavar="JSON", help="variables of the template: '{\"enable_thinking\": false}'"
    )
    prompt.add_argument("--tools", metavar="FILE", help="JSON list of functions that the model may call")
    prompt.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat format")
    sampling = parser.add_argument_group("sampling (defaults from the model's generation_config.json, else greedy)")
    add_fields(sampling, SamplingParams)
    attention = parser.add_argument_group(
        "attention (fields of the preset; the head pattern of a model may have its own defaults)"
    )
    add_attention(attention)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="print one JSON object per prompt, one per line, or one for the plan"
    )
    output.add_argument(
        "--save-context",
        type=local_path,
        metavar="FILE",
        help="read the prompt, save what the model keeps of it for --context-file, and stop",
    )
    output.add_argument("--dry-run", action="store_true", help="print the memory plan and stop; loads no weights")
    output.add_argument(
        "--memory",
        type=positive_memory_size,
        metavar="SIZE",
        help="plan for a device of another machine with this much memory, such as 80GiB, of which jax takes three "
        "quarters on a GPU (default: the free memory of this machine's device)",
    )
    add_shared(output, "--quiet")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line on stderr that says what to change."""
    return run_command(lambda: _generate(build_parser().parse_args(argv)))


def _generate(args: argparse.Namespace) -> None:
    set_up_logging(is_quiet=args.quiet)
    texts = _read_prompts(args.prompt, args.prompt_file)
    if not texts and not args.dry_run:
        raise InputError("no prompt: give --prompt TEXT or --prompt-file FILE")
    named = SamplingParams(**given(args, SamplingParams))  # finds wrong values before the model is opened
    if (named.logprobs or named.prompt_logprobs) and not args.json:
        raise InputError("--logprobs and --prompt-logprobs need --json, which has a place for them")
    if args.save_context is not None:
        _check_saving(args, len(texts))
    setup = _prepare(args, len(texts))
    if args.dry_run:
        setup.warn()
        print(to_json_line(plan_to_json(setup)) if args.json else plan_to_text(setup))
        return
    # Find every error of the user before loading weights.
    setup.checkpoint.require_weights()
    tokenizer = required_tokenizer(setup.checkpoint, args.tokenizer)
    encoder = _encoder(tokenizer, args)
    context, prompts = _prompts(setup, encoder, args, texts)
    params = dataclasses.replace(default_sampling_params(setup.checkpoint), **given(args, SamplingParams))
    vocabulary = setup.config.model.vocab_size
    params.require_vocabulary(vocabulary)
    params = with_bad_words_spelled(params, tokenizer, vocabulary)
    for number, prompt in enumerate(prompts, start=1):
        with naming_the_prompt(number, len(prompts)):
            require_ids(prompt, vocabulary)
            require_room(len(prompt), setup.sizes.max_model_len)
    longest = max(map(len, prompts))
    if args.save_context is None:
        _warn_of_limits(args, longest, setup.sizes.max_model_len)
    else:
        context_format(setup, tokenizer).require_savable(longest)
    use_compilation_cache()
    with ProgressBars(is_shown=not args.quiet) as bars:
        llm = LLM.from_setup(setup, tokenizer=tokenizer, on_progress=bars.report, expected_tokens=longest)
        if context is not None:
            llm.load_context(context)
        if args.save_context is not None:
            llm.save_context(prompts[0], args.save_context)
            bars.close()
            if not args.quiet:
                print(f"saved {longest} tokens: {args.save_context}", file=sys.stderr)
            return
        outputs = _run(llm, prompts, params, is_streaming=not args.json, bars=bars)
    _report(args, llm, outputs)


def _report(args: argparse.Namespace, llm: LLM, outputs: Sequence[RequestOutput]) -> None:
    for output in outputs:
        if args.json:
            print(to_json_line(to_json(llm, output)), flush=True)
    if not args.quiet:
        print(summary(llm, outputs), file=sys.stderr)


def _check_saving(args: argparse.Namespace, num_prompts: int) -> None:
    """Raises `InputError` for a context that could not be saved after all, before anything is opened."""
    path = args.save_context
    if num_prompts != 1 or args.context_file is not None or args.json or args.assistant_prefix is not None:
        raise InputError(
            "--save-context saves one prompt and generates nothing: give one --prompt or --prompt-file, and neither "
            "--context-file, --assistant-prefix nor --json"
        )
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--save-context {path}: must be a file in a folder that exists")


def _prompts(
    setup: Setup, encoder: PromptEncoder, args: argparse.Namespace, texts: Sequence[str]
) -> tuple[SavedContext | None, list[list[int]]]:
    """Returns the context that --context-file names, and all tokens of each prompt."""
    if args.save_context is not None:
        return None, [encoder.opening(text) for text in texts]
    if args.context_file is None:
        return None, [encoder.whole(text) for text in texts]
    context = context_format(setup, encoder.tokenizer).read(args.context_file)
    return context, [[*context.tokens, *encoder.rest(text, context.tokens, str(args.context_file))] for text in texts]


def _prepare(args: argparse.Namespace, num_prompts: int) -> Setup:
    return prepare(
        args.model,
        recall_interval=args.recall_interval,
        max_num_seqs=min(max(num_prompts, 1), _MAX_NUM_SEQS),
        device=_device(args),
        assume_streaming=args.dry_run,
        has_tails=False,  # compiling them takes longer than they save to a few prompts
        **engine_settings(args),
    )


def _warn_of_limits(args: argparse.Namespace, prompt: int, context: int) -> None:
    room = max(context - prompt, 1)  # a prompt that fills the context still gets a token
    if args.max_tokens is not None and args.max_tokens > room:
        logger.warning(
            f"--max-tokens {args.max_tokens}: after a prompt of {prompt} tokens, the context of {context} "
            f"(--max-model-len) has room for {room} more"
        )


def _device(args: argparse.Namespace) -> Device | None:
    """Returns the device to plan for; None for one that must be here. A plan needs none."""
    if args.memory is not None:
        if not args.dry_run:
            raise InputError("--memory is for a plan: give --dry-run too")
        return device_elsewhere(args.memory)
    if not args.dry_run:
        return None
    try:
        return this_device()
    except InputError as error:
        logger.warning(f"{error}; --memory 80GiB names the memory to plan for")
        return device_elsewhere()


def _read_prompts(texts: list[str], files: list[str]) -> list[str]:
    prompts = [*texts, *(_read_text("--prompt-file", name) for name in files)]
    if any(not prompt.strip() for prompt in prompts):
        raise InputError("the prompt is empty: give some text")
    return prompts


def _read_text(flag: str, name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"{flag} {name}: {error.strerror}") from None
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{flag} {name} is not UTF-8 text (byte {error.start})") from None


def _encoder(tokenizer: Tokenizer, args: argparse.Namespace) -> PromptEncoder:
    """Returns what turns a prompt into token ids: in the chat format, unless --raw is given or the model has none."""
    named = [flag for flag in _CHAT_FLAGS if getattr(args, flag.strip("-").replace("-", "_")) is not None]
    if args.raw and named:
        raise InputError(f"{', '.join(named)} needs the chat format, which --raw leaves out")
    if args.raw or not (named or tokenizer.decide_chat_format(_TEMPLATE_ADVICE)):
        return PromptEncoder(tokenizer=tokenizer)
    options: ChatOptions = {
        "tools": None if args.tools is None else _read_json("--tools", _read_text("--tools", args.tools), list),
        "template_kwargs": _read_json("--chat-template-config", args.chat_template_config or "{}", dict),
        "chat_template": args.chat_template,
        "continue_final_message": args.assistant_prefix is not None,
        "literal_roles": ("system", "user"),  # control tokens in --assistant-prefix are meant
    }
    first = [] if args.system_prompt is None else [{"role": "system", "content": args.system_prompt}]
    last = [] if args.assistant_prefix is None else [{"role": "assistant", "content": args.assistant_prefix}]
    return PromptEncoder(tokenizer=tokenizer, options=options, first=first, last=last)


def _read_json(flag: str, text: str, kind: type[list] | type[dict]) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{flag} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise InputError(f"{flag} must be a JSON {'list' if kind is list else 'object'}, got {text.strip()!r:.60}")
    return value


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
