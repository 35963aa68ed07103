"""Flags: those that commands have had stay as they were, and every field of a dataclass of settings is one."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from lserve_jax import calibrate, convert, evaluate, generate
from lserve_jax.calibration.training import TrainingConfig
from lserve_jax.cli.common import run_command
from lserve_jax.cli.flags import SHARED, add_fields, add_shared, given
from lserve_jax.cli.parser import OneLineParser
from lserve_jax.config.attention import AttentionConfig, from_preset
from lserve_jax.config.errors import InputError
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.config.settings import settings
from lserve_jax.evaluation import ablations
from lserve_jax.evaluation.opening import PromptSettings
from lserve_jax.evaluation.variants import parse_variant
from lserve_jax.serve import __main__ as serve
from lserve_jax.serve.options import ServeOptions

NO_VALUE = ()
MODEL = {
    "--model": ("a", "a", "smollm2-135m-instruct"),
    "--tokenizer": ("a", "a", None),
    "--dtype": ("float32", "float32", "auto"),
    "--implementation": ("xla", "xla", "auto"),
    "--recall-interval": ("4", 4, None),
    "--head-pattern": ("a", "a", None),
    "--quiet": (NO_VALUE, True, False),
}
# Flag: its argument, the value that it stands for, and the value without the flag.
FLAGS: dict[str, Mapping[str, tuple[Any, Any, Any]]] = {
    "generate": {
        **MODEL,
        "--max-model-len": ("4", 4, None),
        "--prefill-chunk": ("4", 4, None),
        "--prompt": ("a", ["a"], []),
        "--prompt-file": ("a", ["a"], []),
        "--system-prompt": ("a", "a", None),
        "--raw": (NO_VALUE, True, False),
        "--max-tokens": ("4", 4, 256),
        "--temperature": ("0.5", 0.5, None),
        "--top-p": ("0.5", 0.5, None),
        "--top-k": ("4", 4, None),
        "--min-p": ("0.5", 0.5, None),
        "--seed": ("4", 4, None),
        "--stop": ("a", ["a"], None),
        "--ignore-eos": (NO_VALUE, True, False),
        "--attention": ("quest", "quest", "lserve"),
        "--token-budget": ("4", 4, None),
        "--page-size": ("4", 4, None),
        "--sub-page-size": ("4", 4, None),
        "--selector-interval": ("4", 4, None),
        "--selector-spread": ("0.5", 0.5, None),
        "--selector-memory": ("0.5", 0.5, None),
        "--selector": ("oracle", "oracle", None),
        "--budget-share": ("0.25", 0.25, None),
        "--budget-cap": ("4", 4, None),
        "--sink": ("4", 4, None),
        "--local": ("4", 4, None),
        "--prefill-local": ("4", 4, None),
        "--prefill-sparsity": ("triangle", "triangle", None),
        "--prefill-from": ("4", 4, None),
        "--prefill-threshold": ("0.5", 0.5, None),
        "--prefill-block": ("4", 4, None),
        "--prefill-near": ("4", 4, None),
        "--prefill-last": ("4", 4, None),
        "--prefill-first-layer": ("4", 4, None),
        "--is-prefill-corrected": (NO_VALUE, True, None),
        "--uncorrected-layers": ("0,4", (0, 4), None),
        "--static-sparsity": ("0.5", 0.5, None),
        "--dense-layers": ("0,4", (0, 4), None),
        "--kv-dtype": ("int4", "int4", None),
        "--json": (NO_VALUE, True, False),
        "--dry-run": (NO_VALUE, True, False),
    },
    "evaluate": {
        **MODEL,
        "--tasks": ("a", "a", "niah_single_1,niah_single_2,vt_direct,copy,perplexity"),
        "--lengths": ("a", "a", "1024,2048"),
        "--samples": ("4", 4, 20),
        "--variants": ("a", "a", None),
        "--ablation": ("a", "a", None),
        "--base": ("a", "a", ablations.BASE),
        "--batch": ("8", 8, 4),
        "--max-num-seqs": ("8", 8, 4),
        "--seed": ("4", 4, 0),
        "--raw": (NO_VALUE, True, False),
        "--word-lengths": (NO_VALUE, True, False),
        "--haystack": ("a", "a", "prose"),
        "--longbench": ("a", "a", None),
        "--qa": ("a", "a", None),
        "--corpus": ("a", "a", None),
        "--tail": ("4", 4, 128),
        "--drift-tokens": ("4", 4, 1024),
        "--json": (NO_VALUE, True, False),
    },
    "calibrate": {
        **{flag: MODEL[flag] for flag in ("--model", "--tokenizer", "--dtype", "--quiet")},
        "--method": ("train", "train", "score"),
        "--sink": ("4", 4, 128),
        "--local": ("4", 4, None),
        "--quota": ("layer", "layer", "model"),
        "--dense-layers": ("0,4", (0, 4), None),
        "--length": ("4", 4, 1536),
        "--held-out": ("4", 4, 6),
        "--seed": ("4", 4, 0),
        "--chunk": ("4", 4, None),
        "--prefill-chunk": ("4", 4, None),
        "--no-picture": (NO_VALUE, True, False),
        "--score": ("random", "random", "best_place"),
        "--prompts": ("4", 4, 12),
        "--steps": ("4", 4, 2000),
        "--learning-rate": ("0.5", 0.5, 0.02),
        "--regularisation": ("0.5", 0.5, 0.05),
        "--min-length": ("4", 4, 2048),
        "--max-length": ("4", 4, None),
        "--passkeys": ("4", 4, 10),
    },
    "convert": {flag: MODEL[flag] for flag in ("--model", "--dtype")},
    "serve": {
        **{flag: option for flag, option in MODEL.items() if flag != "--recall-interval"},
        "--max-model-len": ("4", 4, None),
        "--max-num-seqs": ("4", 4, 8),
        "--prefill-chunk": ("4", 4, None),
        "--attention": ("quest", "quest", "lserve"),
        "--token-budget": ("4", 4, None),
        "--kv-dtype": ("int4", "int4", None),
        "--host": ("::1", "::1", "127.0.0.1"),
        "--port": ("4", 4, 8000),
        "--api-key": ("a", "a", None),
        "--served-model-name": ("a", "a", None),
        "--max-queued-requests": ("4", 4, 256),
        "--max-queued-tokens": ("4", 4, None),
        "--max-body-bytes": ("4", 4, 16 * 2**20),
        "--request-timeout": ("0.5", 0.5, 0.0),
        "--default-max-tokens": ("4", 4, None),
        "--ping-interval": ("0.5", 0.5, 1.0),
        "--stuck-after": ("0.5", 0.5, 600.0),
        "--drain-timeout": ("0.5", 0.5, 30.0),
        "--metrics-prefix": ("vllm:", "vllm:", "lserve_"),
    },
}
COMMANDS = {"generate": generate, "evaluate": evaluate, "calibrate": calibrate, "convert": convert, "serve": serve}
DEST = {"--batch": "max_num_seqs", "--chunk": "prefill_chunk", "--no-is-sink-forced": "is_sink_forced"}
# A flag that is not given leaves these to the dataclass; other fields are the model's or the preset's.
DEFAULTS = {
    "generate": {"max_tokens": SamplingParams.max_tokens, "ignore_eos": SamplingParams.ignore_eos},
    "evaluate": dataclasses.asdict(PromptSettings()),
    "calibrate": dataclasses.asdict(TrainingConfig()),
    "convert": {},
    "serve": dataclasses.asdict(ServeOptions()),
}


def value_of(command: str, flag: str, *arguments: str) -> Any:
    """What a command makes of a flag."""
    required = () if command in ("generate", "serve") else ("--out", "folder")
    args = COMMANDS[command].build_parser().parse_args([*required, *arguments])
    name = DEST.get(flag, flag[2:].replace("-", "_"))
    value = getattr(args, name)
    return DEFAULTS[command].get(name) if value is None else value


@pytest.mark.parametrize("command", FLAGS)
def test_every_flag_keeps_its_spelling_its_default_and_its_meaning(command: str):
    for flag, (argument, value, default) in FLAGS[command].items():
        arguments = (flag,) if argument is NO_VALUE else (flag, argument)
        assert value_of(command, flag, *arguments) == value, flag
        assert value_of(command, flag) == default, flag


def help_of(command: str) -> str:
    """The help of a command in one line."""
    return " ".join(COMMANDS[command].build_parser().format_help().split())


def test_the_help_of_every_shared_flag_with_a_value_says_its_default():
    valued = {flag: options["help"] for flag, options in SHARED.items() if "action" not in options}
    assert [flag for flag, text in valued.items() if "(default: " not in text] == []


@pytest.mark.parametrize("command", FLAGS)
def test_the_help_can_be_printed(command: str):
    text = help_of(command)
    assert "%(" not in text
    assert "==SUPPRESS==" not in text
    assert text.count("(default: None)") == 0


def test_the_help_of_generate_says_where_a_default_comes_from():
    text = help_of("generate")
    for part in (
        "--token-budget N|all tokens whose pages",
        "all lifts a preset's budget (default: the preset's, 4096 for lserve)",
        "(default: the model's own, else 0)",
        "--dense-layers I,J",
        "(default: the preset's, none for lserve)",
        "(default: the preset's, or what suits the budget: 64 from 4096 tokens)",
        "(default: the model's own, else 256)",
    ):
        assert part in text


# A value other than the default of each field, as a flag's arguments, as a variant writes it, and as it is.
FIELDS: dict[str, tuple[tuple[str, ...], str, Any]] = {
    "token_budget": (("--token-budget", "512"), "512", 512),
    "page_size": (("--page-size", "32"), "32", 32),
    "sub_page_size": (("--sub-page-size", "8"), "8", 8),
    "selector_interval": (("--selector-interval", "2"), "2", 2),
    "sink": (("--sink", "0"), "0", 0),
    "local": (("--local", "64"), "64", 64),
    "prefill_local": (("--prefill-local", "128"), "128", 128),
    "prefill_sparsity": (("--prefill-sparsity", "blocks"), "blocks", "blocks"),
    "prefill_from": (("--prefill-from", "1024"), "1024", 1024),
    "prefill_threshold": (("--prefill-threshold", "0.5"), "0.5", 0.5),
    "prefill_block": (("--prefill-block", "64"), "64", 64),
    "prefill_near": (("--prefill-near", "128"), "128", 128),
    "prefill_last": (("--prefill-last", "0"), "0", 0),
    "prefill_first_layer": (("--prefill-first-layer", "1"), "1", 1),
    "is_prefill_corrected": (("--no-is-prefill-corrected",), "false", False),
    "uncorrected_layers": (("--uncorrected-layers", "0,1"), "0,1", (0, 1)),
    "static_sparsity": (("--static-sparsity", "0"), "0", 0.0),
    "dense_layers": (("--dense-layers", "0,1"), "0,1", (0, 1)),
    "kv_dtype": (("--kv-dtype", "int8"), "int8", "int8"),
    "is_sink_forced": (("--no-is-sink-forced",), "false", False),
    "selector_spread": (("--selector-spread", "1"), "1", 1.0),
    "selector_memory": (("--selector-memory", "0.5"), "0.5", 0.5),
    "selector": (("--selector", "oracle"), "oracle", "oracle"),
    "budget_share": (("--budget-share", "0.25"), "0.25", 0.25),
    "budget_cap": (("--budget-cap", "8192"), "8192", 8192),
    "group_reduction": (("--group-reduction", "mean"), "mean", "mean"),
}


def test_every_field_of_attention_is_a_flag_of_generate_and_a_field_of_variants():
    assert FIELDS.keys() == {one.name for one in dataclasses.fields(AttentionConfig)} - {"preset"}
    for name, (arguments, text, value) in FIELDS.items():
        assert getattr(AttentionConfig(), name) != value
        args = generate.build_parser().parse_args(arguments)
        assert given(args, AttentionConfig) == {name: value}
        assert getattr(from_preset("lserve", **given(args, AttentionConfig)), name) == value
        assert getattr(parse_variant(f"lserve:{name}={text}").config(4096), name) == value


def test_a_budget_can_be_lifted_everywhere():
    args = generate.build_parser().parse_args(["--token-budget", "all"])
    assert from_preset("lserve", **given(args, AttentionConfig)).token_budget is None
    assert parse_variant("quest:token_budget=all").config(4096).token_budget is None


def test_a_result_of_evaluate_is_stored_with_every_setting_of_its_prompts():
    assert {one.name for one in dataclasses.fields(PromptSettings)} <= {*evaluate.SETTINGS}


def test_what_is_not_named_is_not_given():
    args = generate.build_parser().parse_args([])
    assert given(args, AttentionConfig) == {}
    assert given(args, SamplingParams) == {}
    args = generate.build_parser().parse_args(["--temperature", "0", "--stop", "a", "--stop", "b", "--no-ignore-eos"])
    assert given(args, SamplingParams) == {"temperature": 0.0, "stop": ["a", "b"], "ignore_eos": False}


def test_every_field_of_sampling_is_a_flag():
    assert set(settings(SamplingParams)) == {one.name for one in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize("cls", [AttentionConfig, SamplingParams, PromptSettings, TrainingConfig])
def test_every_setting_can_become_a_flag(cls: type):
    parser = OneLineParser(prog="x")
    add_fields(parser, cls)
    assert given(parser.parse_args([]), cls) == {}


# --- the derivation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Example:
    count: int = field(default=3, metadata={"help": "how many, 100% of them", "metavar": "COUNT"})
    is_on: bool = field(default=True, metadata={"help": "whether"})
    unnamed: int = 0


def test_a_command_may_have_a_default_and_a_help_of_its_own():
    parser = OneLineParser(prog="x")
    add_fields(parser, Example, ("count",), own={"count": {"default": 5, "help": "so many"}})
    assert given(parser.parse_args([]), Example) == {"count": 5}
    assert given(parser.parse_args(["--count", "7"]), Example) == {"count": 7}
    assert "--count COUNT so many (default: 5)" in " ".join(parser.format_help().split())


def test_percent_signs_of_a_help_are_printed():
    parser = OneLineParser(prog="x")
    add_fields(parser, Example, default="usually {}")
    text = " ".join(parser.format_help().split())
    assert "--count COUNT how many, 100% of them (default: usually 3)" in text
    assert "--is-on, --no-is-on whether (default: usually on)" in text
    assert "unnamed" not in text


def test_a_shared_flag_has_aliases_and_changes():
    parser = OneLineParser(prog="x")
    add_shared(parser, "--max-num-seqs/--batch", default=4)
    assert parser.parse_args([]).max_num_seqs == 4
    assert parser.parse_args(["--batch", "2"]).max_num_seqs == 2


# --- wrong values, exit status ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--sink x", "error: --sink 'x' must be a whole number (--help lists the flags)"),
        ("--token-budget 5.5", "error: --token-budget '5.5' must be a whole number or all (--help lists the flags)"),
        ("--token-budget 25%", "error: --token-budget '25%' must be a whole number or all (--help lists the flags)"),
        ("--static-sparsity half", "error: --static-sparsity 'half' must be a number (--help lists the flags)"),
        ("--dense-layers 0;1", "error: --dense-layers '0;1' must be layer numbers with commas between, such as 0,1"),
        ("--group-reduction sum", "error: --group-reduction 'sum' must be one of max, mean (--help lists the flags)"),
        (
            "--attention sparse",
            "error: --attention 'sparse' must be one of lserve, dense, streaming, quest, qserve, minference (",
        ),
        ("--max-model-len x", "error: --max-model-len 'x' must be a whole number (--help lists the flags)"),
        ("--is-sink-forced=yes", "error: --is-sink-forced takes no value, got 'yes' (--help lists the flags)"),
        ("--json=yes", "error: --json takes no value, got 'yes' (--help lists the flags)"),
    ],
)
def test_a_text_that_is_no_value_is_one_line_and_status_2(
    arguments: str, line: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as end:
        generate.build_parser().parse_args(arguments.split())
    assert end.value.code == 2
    (found,) = capsys.readouterr().err.splitlines()
    assert found.startswith(line)


def refusal(command: str, arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr with which a command refuses arguments."""
    with pytest.raises(SystemExit) as end:
        COMMANDS[command].build_parser().parse_args(arguments)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def valued_flags(command: str) -> list[str]:
    """The flags of a command that take a value."""
    actions = COMMANDS[command].build_parser()._actions
    return [action.option_strings[0] for action in actions if action.nargs is None and action.option_strings]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_value_that_begins_with_a_dash_is_refused_with_the_way_to_write_it(
    command: str, capsys: pytest.CaptureFixture[str]
):
    flags = valued_flags(command)
    assert {"--model", "--dtype"} <= {*flags}
    for flag in flags:
        line = refusal(command, [flag, "--x"], capsys)
        assert "expected one argument; a value that begins with a dash is written " in line
        assert f" {flag}=-x" in line
        assert ("comes from --prompt-file" in line) == (flag == "--prompt")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("--max-tok 5", "unrecognized arguments: --max-tok 5; did you mean --max-tokens?"),
        ("--token_budget=64", "unrecognized arguments: --token_budget=64; did you mean --token-budget?"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag (--help"),
        ("--temprature 1", "did you mean --temperature?"),
    ],
)
def test_a_flag_that_is_not_written_in_full_is_refused_with_those_that_may_be_meant(
    arguments: str, hint: str, capsys: pytest.CaptureFixture[str]
):
    assert hint in refusal("generate", arguments.split(), capsys)


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("generate", "--head-pattern"),
        ("generate", "--tokenizer"),
        ("evaluate", "--head-pattern"),
        ("calibrate", "--out"),
        ("convert", "--out"),
        ("evaluate", "--out"),
    ],
)
def test_an_address_where_a_path_is_meant_is_refused(command: str, flag: str, capsys: pytest.CaptureFixture[str]):
    line = refusal(command, [f"{flag}=gs://bucket/x"], capsys)
    assert line.startswith(f"error: {flag} 'gs://bucket/x' must be a path on this machine, not an address")


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_is_no_path_is_refused(path: str, capsys: pytest.CaptureFixture[str]):
    for command, flag in (("generate", "--prompt-file"), ("generate", "--head-pattern"), ("convert", "--out")):
        assert f"error: {flag} {path!r} must be a path (" in refusal(command, [f"{flag}={path}"], capsys)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("80gb", 80 * 10**9), ("1.5 TiB", 3 * 2**39), ("512MB", 512 * 10**6), ("4096", 4096)],
)
def test_a_memory_is_a_number_of_bytes_or_has_a_unit(text: str, size: int):
    assert generate.build_parser().parse_args(["--memory", text]).memory == size


@pytest.mark.parametrize("text", ["0", "80G", "-1", "nan", "", "GiB", "1e3GB", f"{10**30}GiB", "9" * 400])
def test_a_memory_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]):
    line = refusal("generate", [f"--memory={text}"], capsys)
    assert line.startswith(f"error: --memory {text!r} must be a number of bytes, or one with GB or GiB, such as 80GiB")


def test_the_help_says_how_to_stop_at_a_newline():
    assert "--stop TEXT" in help_of("generate")
    assert "a newline is written $'\\n'" in help_of("generate")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (InputError("two\nlines"), 2, "error: two lines\n"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "error: a.txt: No such file or directory\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (KeyboardInterrupt("so far"), 130, "so far\n"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_a_status(
    error: BaseException, status: int, text: str, capsys: pytest.CaptureFixture[str]
):
    def command() -> None:
        raise error

    assert run_command(command) == status
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("kind", [AssertionError, ValueError, NotImplementedError])
def test_an_error_of_our_own_is_not_hidden(kind: type[Exception]):
    def command() -> None:
        raise kind

    with pytest.raises(kind):
        run_command(command)
