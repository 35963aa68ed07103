"""`python -m lserve_jax.generate`: what it prints where, and one line for everything that cannot be."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lserve_jax import LLM, AttentionConfig, SamplingParams, prepare
from lserve_jax.cli.common import use_compilation_cache
from lserve_jax.generate import main

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "golden" / "tiny"
MODEL = str(TINY / "llama3")
SAMPLED = str(TINY / "llama31")  # its generation_config.json: do_sample, temperature 0.6, top_p 0.9
# One shape for all runs, so that each program is compiled once.
SIZES = ("--max-model-len", "128", "--prefill-chunk", "64")
PROMPT = "hello there"
HUGE = str(10**30)


@dataclasses.dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command in this process, with the tiny model unless another is named."""

    def call(*arguments: str, model: str = MODEL) -> Result:
        capfd.readouterr()
        try:
            status = main(["--model", model, *SIZES, *arguments])
        except SystemExit as end:  # argparse
            status = end.code
        assert isinstance(status, int)
        captured = capfd.readouterr()
        return Result(status, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(MODEL, max_model_len=128, prefill_chunk=64, max_num_seqs=1)


def chat_tokens(llm: LLM, text: str = PROMPT, system: str | None = None) -> list[int]:
    messages = [{"role": "system", "content": system}] if system else []
    return llm.render_chat([*messages, {"role": "user", "content": text}])


def greedy(llm: LLM, tokens: list[int] | str, **fields: Any) -> str:
    return llm.generate([tokens], SamplingParams(**fields))[0].text


# --- output ---------------------------------------------------------------------------------------------------------


def test_text_goes_to_stdout_and_everything_else_to_stderr(run: Callable[..., Result], llm: LLM):
    result = run("--prompt", PROMPT, "--max-tokens", "12")
    assert result.status == 0
    assert result.out == greedy(llm, chat_tokens(llm), max_tokens=12) + "\n"
    assert "weights: 100%" in result.err
    assert "compile prefill_short, sample, decode" in result.err
    assert "prefill: 100%" in result.err
    assert "no head pattern for" in result.err
    *_, prompt, answer, attention, weights, cache, kernels = result.err.splitlines()
    assert prompt.startswith(f"prompt {len(chat_tokens(llm))} tokens, ")
    assert answer.startswith("answer 12 tokens, ")
    assert attention.startswith("attention lserve: 4 retrieval + 0 streaming KV heads, token budget 4096, 100% of the")
    assert weights.startswith("weights float32: ")
    assert cache.startswith("KV cache float32: ")
    assert kernels.startswith("kernels xla; mosaic_gpu refused: Mosaic GPU kernels need a Hopper GPU")


def test_quiet_leaves_stderr_empty(run: Callable[..., Result], llm: LLM):
    result = run("--prompt", PROMPT, "--max-tokens", "12", "--quiet")
    assert result == Result(0, greedy(llm, chat_tokens(llm), max_tokens=12) + "\n", "")


def test_json_is_one_object_a_line_with_the_promised_fields(run: Callable[..., Result], llm: LLM):
    result = run("--prompt", PROMPT, "--max-tokens", "12", "--json", "--kv-dtype", "int8")
    assert result.status == 0
    (line,) = result.out.splitlines()
    found = json.loads(line)
    assert list(found) == [
        *("text", "token_ids", "prompt_tokens", "completion_tokens", "finish_reason", "ttft_s"),
        *(
            "cached_tokens",
            "prefill_tokens_per_s",
            "decode_tokens_per_s",
            "compile_s",
            "attention",
            "weights",
            "kv_cache",
            "pages_read_ratio",
        ),
        *("attention_recall", "attention_recall_by_layer", "implementations", "refusals"),
    ]
    count = len(chat_tokens(llm))
    assert (found["prompt_tokens"], found["completion_tokens"], len(found["token_ids"])) == (count, 12, 12)
    assert found["finish_reason"] == "length"
    assert llm.tokenizer is not None
    assert found["text"] == llm.tokenizer.decode(found["token_ids"])
    for name in ("ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s", "compile_s"):
        assert found[name] > 0
    policy = dataclasses.asdict(AttentionConfig(preset="lserve", kv_dtype="int8"))
    assert found["attention"].items() >= (policy | {"dense_layers": [], "uncorrected_layers": []}).items()
    assert found["attention"]["retrieval_heads"] == [2, 2]
    # One page of 64 tokens, 2 layers of 2 retrieval heads of 16: codes; scales and offsets; bounds in float32.
    page = 4 * (64 * (16 + 16 + 2 + 2) + 2 * 4 * 16 * 4)
    dense = 64 * 4 * 16 * 2 * 2
    assert count + 11 <= 64
    assert found["kv_cache"] == {
        "dtype": "int8",
        "retrieval_bytes": page,
        "streaming_bytes": 0,
        "dense_bf16_bytes": dense,
    }
    assert found["weights"] == {"forms": "float32", "bytes": llm.setup.plan.weight_bytes}
    assert found["pages_read_ratio"] == 1.0
    assert found["implementations"] == dict.fromkeys(("kv_write", "prefill_attention", "decode_attention"), "xla")
    assert found["refusals"].keys() == {"mosaic_gpu"}
    assert "need a Hopper GPU" in found["refusals"]["mosaic_gpu"][0]


@pytest.mark.slow
def test_several_prompts_are_a_batch_in_the_order_given(run: Callable[..., Result], llm: LLM, tmp_path: Path):
    (tmp_path / "a.txt").write_text("\ufefffrom a file\n", encoding="utf-8")  # a byte-order mark is no text
    arguments = ("--prompt", PROMPT, "--prompt-file", str(tmp_path / "a.txt"), "--prompt", "two", "--max-tokens", "6")
    texts = [greedy(llm, chat_tokens(llm, text), max_tokens=6) for text in (PROMPT, "two", "from a file\n")]
    result = run(*arguments)
    assert result.out == "".join(f"=== {number}/3\n{text}\n" for number, text in enumerate(texts, start=1))
    lines = run(*arguments, "--json").out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == texts


def test_raw_continues_the_text_itself_and_a_system_prompt_goes_before_it(run: Callable[..., Result], llm: LLM):
    fields = ("--prompt", PROMPT, "--max-tokens", "8", "--quiet")
    assert run(*fields, "--raw").out == greedy(llm, PROMPT, max_tokens=8) + "\n"
    expected = greedy(llm, chat_tokens(llm, system="be brief"), max_tokens=8)
    assert run(*fields, "--system-prompt", "be brief").out == expected + "\n"


def prompt_tokens(run: Callable[..., Result], *arguments: str, model: str = MODEL) -> int:
    """The number of tokens of the prompt that the command makes."""
    result = run("--prompt", PROMPT, "--max-tokens", "1", "--quiet", "--json", *arguments, model=model)
    assert result.status == 0, result.err
    return json.loads(result.out)["prompt_tokens"]


@pytest.fixture
def untemplated(tmp_path: Path) -> Path:
    """The tiny model without its chat template."""
    folder = tmp_path / "model"
    shutil.copytree(TINY / "llama3", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def test_an_answer_that_is_begun_is_continued(run: Callable[..., Result], llm: LLM):
    begun = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "It "}]
    expected = greedy(llm, llm.render_chat(begun, continue_final_message=True), max_tokens=8)
    result = run("--prompt", PROMPT, "--max-tokens", "8", "--quiet", "--assistant-prefix", "It ")
    assert result == Result(0, expected + "\n", "")
    # Control tokens of the prompt are text, those of the prefix are meant.
    assert prompt_tokens(run, "--assistant-prefix", "<|im_end|>") == prompt_tokens(run, "--assistant-prefix", "x")


def test_templates_variables_and_tools_are_flags(run: Callable[..., Result], llm: LLM, tmp_path: Path):
    (tmp_path / "own.jinja").write_text(
        "{{ tools[0].name }}{% if not quiet %}loud{% endif %}{{ messages[-1].content }}"
    )
    (tmp_path / "tools.json").write_text('[{"name": "f"}]')
    own = ("--chat-template", str(tmp_path / "own.jinja"), "--tools", str(tmp_path / "tools.json"))
    fields = ("--prompt", PROMPT, "--max-tokens", "8", "--quiet")
    assert run(*fields, *own).out == greedy(llm, f"floud{PROMPT}", max_tokens=8) + "\n"
    quiet = ("--chat-template-config", '{"quiet": true}')
    assert run(*fields, *own, *quiet).out == greedy(llm, f"f{PROMPT}", max_tokens=8) + "\n"


def test_tools_that_are_nested_too_deeply_are_refused_in_one_line(run: Callable[..., Result], tmp_path: Path):
    (tmp_path / "tools.json").write_text('[{"name": ' + "[" * 1100 + "]" * 1100 + "}]")
    result = run("--prompt", PROMPT, "--tools", str(tmp_path / "tools.json"))
    check_refusal(result, "tools: lists and mappings are nested more than 100 levels deep")


def test_a_model_without_a_template_is_continued_with_a_warning(
    run: Callable[..., Result], llm: LLM, untemplated: Path
):
    fields = ("--prompt", PROMPT, "--prompt", PROMPT, "--max-tokens", "4")
    result = run(*fields, model=str(untemplated))
    assert result.err.count("has no chat template: the prompt is continued as it is (--raw says that this is") == 1
    assert greedy(llm, PROMPT, max_tokens=4) in result.out
    assert "chat template" not in run(*fields, "--raw", model=str(untemplated)).err
    check_refusal(run(*fields, "--system-prompt", "x", model=str(untemplated)), "has no chat template; give the prompt")
    (untemplated / "own.jinja").write_text("{{ messages[0].content }}")
    own = ("--chat-template", str(untemplated / "own.jinja"))
    assert "chat template" not in run(*fields, *own, model=str(untemplated)).err


def test_templates_of_which_none_is_the_default_are_named(run: Callable[..., Result], untemplated: Path):
    named = [{"name": "rag", "template": "r"}, {"name": "short", "template": "{{ messages[0].content[:2] }}"}]
    (untemplated / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    model = str(untemplated)
    check_refusal(run("--prompt", PROMPT, model=model), "chat templates are rag, short", "--chat-template NAME")
    assert prompt_tokens(run, "--chat-template", "short", model=model) == 1
    assert prompt_tokens(run, "--raw", model=model) > 1


def test_a_prompt_may_come_from_stdin(run: Callable[..., Result], llm: LLM, monkeypatch: pytest.MonkeyPatch):
    text = "Grüße – 你好"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    result = run("--prompt-file", "-", "--max-tokens", "5", "--quiet")
    assert result == Result(0, greedy(llm, chat_tokens(llm, text), max_tokens=5) + "\n", "")


def test_stop_strings_end_the_text(run: Callable[..., Result], llm: LLM):
    whole = greedy(llm, chat_tokens(llm), max_tokens=40, ignore_eos=True)
    stop = whole[9:12]
    result = run("--prompt", PROMPT, "--max-tokens", "40", "--ignore-eos", "--quiet", "--stop", "#####", "--stop", stop)
    assert result.out == whole[: whole.index(stop)] + "\n"
    found = json.loads(
        run("--prompt", PROMPT, "--max-tokens", "40", "--ignore-eos", "--quiet", "--stop", stop, "--json").out
    )
    assert (found["text"], found["finish_reason"]) == (whole[: whole.index(stop)], "stop")


@pytest.mark.slow
def test_sampling_defaults_are_the_models_own_and_flags_go_before_them(run: Callable[..., Result]):
    own = LLM(SAMPLED, max_model_len=128, prefill_chunk=64, max_num_seqs=1)
    defaults = SamplingParams(temperature=0.6, top_p=0.9)
    assert own.default_sampling_params() == defaults
    tokens, common = chat_tokens(own), ("--prompt", PROMPT, "--max-tokens", "20", "--quiet", "--ignore-eos")
    fields: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}
    drawn = greedy(own, tokens, temperature=0.6, top_p=0.9, seed=4, **fields)
    hot = greedy(own, tokens, temperature=1.9, top_p=0.9, top_k=50, min_p=0.01, seed=4, **fields)
    likeliest = greedy(own, tokens, **fields)
    assert len({drawn, hot, likeliest}) == 3
    assert run(*common, "--seed", "4", model=SAMPLED).out == drawn + "\n"
    flags = ("--temperature", "1.9", "--top-k", "50", "--min-p", "0.01")
    assert run(*common, "--seed", "4", *flags, model=SAMPLED).out == hot + "\n"
    assert run(*common, "--temperature", "0", model=SAMPLED).out == likeliest + "\n"


@pytest.mark.slow
def test_attention_flags_override_the_preset(run: Callable[..., Result], tmp_path: Path):
    (tmp_path / "full_attention_heads.tsv").write_text("1\t0\n0\t1\n")
    flags: dict[str, Any] = {"token_budget": 96, "page_size": 8, "sub_page_size": 4, "selector_interval": 2, "sink": 9}
    flags |= {"local": 24, "prefill_local": 30, "static_sparsity": 0.25, "dense_layers": "1", "kv_dtype": "int4"}
    arguments = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    result = run(
        "--prompt",
        PROMPT,
        "--max-tokens",
        "3",
        "--json",
        "--quiet",
        "--attention",
        "quest",
        *arguments,
        "--head-pattern",
        str(tmp_path),
    )
    policy = json.loads(result.out)["attention"]
    assert policy.items() >= (flags | {"preset": "quest", "dense_layers": [1]}).items()


def test_the_budget_of_a_preset_can_be_lifted_and_every_field_be_named(run: Callable[..., Result]):
    flags = ("--attention", "quest", "--token-budget", "all", "--group-reduction", "mean", "--no-is-sink-forced")
    result = run("--prompt", PROMPT, "--max-tokens", "3", "--json", "--quiet", *flags)
    policy = json.loads(result.out)["attention"]
    named = {"preset": "quest", "token_budget": None, "group_reduction": "mean", "is_sink_forced": False}
    assert policy.items() >= named.items()


def test_dry_run_prints_the_plan_and_touches_no_weights(run: Callable[..., Result], tmp_path: Path):
    shutil.copy(TINY / "llama3" / "config.json", tmp_path)
    result = run("--dry-run", model=str(tmp_path))
    assert result.status == 0
    names = [line.split(":")[0] for line in result.out.splitlines()]
    assert names == [
        *("context", "KV heads", "weights", "retrieval pages", "streaming pages", "open pages", "KV cache"),
        *("prefix cache", "swap", "total", "memory", "largest context", "head pattern", "kernels"),
    ]


def test_a_plan_can_be_one_json_object(run: Callable[..., Result]):
    result = run("--dry-run", "--json", "--kv-dtype", "int8")
    (line,) = result.out.splitlines()
    found = json.loads(line)
    plan = prepare(MODEL, max_model_len=128, prefill_chunk=64, max_num_seqs=1, kv_dtype="int8").plan
    expected = {
        "max_model_len": 128,
        "max_num_seqs": 1,
        "prefill_chunk": 64,
        "dtype": "float32",
        "kv_dtype": "int8",
        "retrieval_heads": 4,
        "streaming_heads": 0,
        "retrieval_pages": plan.pools.retrieval,
        "streaming_pages": 0,
        "weight_forms": "float32",
        "weight_bytes": plan.weight_bytes,
        "retrieval_bytes": plan.retrieval_bytes,
        "streaming_bytes": 0,
        "open_page_bytes": plan.tail_bytes,
        "total_bytes": plan.total_bytes,
        "prefix_cache": True,
        "swap_pages": 0,
        "fits": True,
        "implementations": dict.fromkeys(("kv_write", "prefill_attention", "decode_attention"), "xla"),
    }
    assert found.items() >= expected.items()
    assert found.keys() - expected.keys() == {"free_bytes", "largest_context", "refusals", "head_pattern"}
    assert found["largest_context"] > 128


def test_a_plan_and_a_run_say_which_form_the_weights_have(run: Callable[..., Result]):
    words = "int4 in groups of 32, int8, int4 in groups of 16"
    form = ("--weight-dtype", "int4")
    plain, narrow = (json.loads(run("--dry-run", "--json", *flags).out) for flags in ((), form))
    assert narrow["weight_forms"] == words
    assert narrow["weight_bytes"] < 0.4 * plain["weight_bytes"]
    assert narrow["implementations"]["quantized_matmul"] == "xla"
    assert f", {words})" in run("--dry-run", *form).out
    result = run("--prompt", PROMPT, "--max-tokens", "4", "--json", *form)
    assert json.loads(result.out)["weights"] == {"forms": words, "bytes": narrow["weight_bytes"]}
    assert f"weights {words}: " in result.err


def test_a_recall_interval_that_no_answer_reaches_is_no_obstacle(run: Callable[..., Result]):
    result = run("--prompt", PROMPT, "--max-tokens", "4", "--quiet", "--json", "--recall-interval", str(2**31 - 1))
    assert json.loads(result.out)["attention_recall"] is None


def test_more_tokens_than_the_context_has_room_for_are_warned_of(run: Callable[..., Result], llm: LLM):
    count = len(chat_tokens(llm))
    room = 128 - count
    warning = (
        f"--max-tokens {room + 1}: after a prompt of {count} tokens, the context of 128 (--max-model-len) has room for "
        f"{room} more"
    )
    result = run("--prompt", PROMPT, "--max-tokens", str(room + 1), "--ignore-eos", "--json")
    assert warning in result.err.splitlines()
    assert json.loads(result.out)["completion_tokens"] == room
    result = run("--prompt", PROMPT, "--max-tokens", str(room), "--ignore-eos", "--json")
    assert "--max-tokens" not in result.err
    assert json.loads(result.out)["completion_tokens"] == room
    assert "--max-tokens" not in run("--prompt", PROMPT).err  # the default asks for no certain number


@pytest.mark.parametrize("flags", [("--attention", "streaming"), ("--static-sparsity", "0.5")])
def test_a_plan_that_assumes_a_pattern_says_so_and_the_run_is_refused_without_one(
    flags: tuple[str, ...], run: Callable[..., Result], tmp_path: Path
):
    planned = run("--dry-run", *flags)
    rows = dict(line.split(":", 1) for line in planned.out.splitlines())
    assert rows["KV heads"].strip() == "2 retrieval + 2 streaming of 4"
    assert rows["head pattern"].strip() == f"none for {MODEL}: this plan assumes one"
    check_refusal(run("--prompt", PROMPT, *flags), "needs a head pattern", "--head-pattern", "lserve_jax.calibrate")
    (tmp_path / "full_attention_heads.tsv").write_text("1\t0\n0\t1\n")
    planned = run("--dry-run", *flags, "--head-pattern", str(tmp_path))
    assert f"head pattern:     {tmp_path}\n" in planned.out


def test_a_plan_of_heads_that_stream_only_by_default_is_that_of_the_run(run: Callable[..., Result]):
    planned = run("--dry-run")
    assert "4 retrieval + 0 streaming of 4" in planned.out
    assert f"head pattern:     none for {MODEL}\n" in planned.out
    (line,) = planned.err.splitlines()
    assert "--head-pattern" in line and "python -m lserve_jax.calibrate" in line


def test_help_is_printed_in_full(run: Callable[..., Result]):
    result = run("--help")
    assert result.status == 0
    assert "--selector-interval" in result.out


@pytest.mark.slow
def test_a_reader_that_has_had_enough_ends_the_command_without_noise():
    command = [sys.executable, "-m", "lserve_jax.generate", "--model", MODEL, *SIZES, "--prompt", PROMPT, "--quiet"]
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


# --- bad input ------------------------------------------------------------------------------------------------------


def copy_of(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(TINY / name, folder / name))


def changed_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncated(folder: Path) -> tuple[str, ...]:
    model = copy_of("llama3", folder)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return str(model), "model.safetensors", "truncated"


def without_weights(folder: Path) -> tuple[str, ...]:
    model = copy_of("llama3", folder)
    (model / "model.safetensors").unlink()
    return str(model), "model.safetensors"


def without_a_shard(folder: Path) -> tuple[str, ...]:
    model = copy_of("llama31", folder)
    (model / "model-00003-of-00004.safetensors").unlink()
    return str(model), "model-00003-of-00004.safetensors"


def with_a_tensor_missing_from_the_index(folder: Path) -> tuple[str, ...]:
    model = copy_of("llama31", folder)
    index = model / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    shard = names["model.norm.weight"]
    changed_json(index, weight_map={name: file for name, file in names.items() if file != shard})
    return str(model), "model.norm.weight"


def with_a_misshapen_tensor(folder: Path) -> tuple[str, ...]:
    model = copy_of("llama3", folder)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 5), np.float32)
    save_file(tensors, model / "model.safetensors")
    return str(model), "model.layers.1.mlp.up_proj.weight", "[3, 5]"


def of_unknown_architecture(folder: Path) -> tuple[str, ...]:
    model = copy_of("llama3", folder)
    changed_json(model / "config.json", model_type="mamba", architectures=["MambaForCausalLM"])
    return (
        str(model),
        "config.json",
        "Mamba",
        *(f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")),
    )


def of_unknown_rope(folder: Path) -> tuple[str, ...]:
    model = copy_of("llama3", folder)
    config = json.loads((model / "config.json").read_text())
    config.pop("rope_parameters", None)
    (model / "config.json").write_text(json.dumps(config | {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}))
    return str(model), "config.json", "spiral", "yarn"


def with_bad_generation_config(folder: Path) -> tuple[str, ...]:
    model = copy_of("llama31", folder)
    changed_json(model / "generation_config.json", temperature=-1)
    return str(model), "generation_config.json", "temperature"


BAD_MODELS = (
    *(truncated, without_weights, without_a_shard, with_a_tensor_missing_from_the_index, with_a_misshapen_tensor),
    *(of_unknown_architecture, of_unknown_rope, with_bad_generation_config),
)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_refusal(result: Result, *parts: str) -> None:
    """Status 2, nothing on stdout, and one line on stderr with all of the parts."""
    assert (result.status, result.out) == (2, "")
    assert result.err.endswith("\n")
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert not [part for part in parts if part not in line], line


@pytest.mark.parametrize("make", BAD_MODELS)
def test_a_model_that_cannot_be_is_refused_in_one_line(
    make: Callable[[Path], tuple[str, ...]], run: Callable[..., Result], tmp_path: Path
):
    model, *parts = make(tmp_path)
    before = snapshot(tmp_path)
    check_refusal(run("--prompt", PROMPT, model=model), *parts)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    ],
)
def test_a_file_of_the_model_that_is_not_utf8_is_refused_in_one_line(
    name: str, run: Callable[..., Result], tmp_path: Path
):
    model = copy_of("llama31", tmp_path)
    (model / name).write_bytes((model / name).read_bytes() + b'"\xff\xfe')
    check_refusal(run("--prompt", PROMPT, model=str(model)), name)


def test_a_model_of_which_only_shapes_are_known_is_refused(run: Callable[..., Result], tmp_path: Path):
    check_refusal(run("--prompt", PROMPT, model="llama-3.1-8b"), "only the shapes of llama-3.1-8b", "--dry-run")
    check_refusal(run("--prompt", PROMPT, model=str(tmp_path / "absent")), "absent", "no such file or folder")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("no prompt", "--prompt-file")),
        (("--prompt", ""), ("the prompt is empty",)),
        (("--prompt", PROMPT, "--prompt", " \n"), ("the prompt is empty",)),
        (("--prompt", "x" * 500), ("prompt has 517 tokens", "max_model_len is 128")),
        (("--prompt", "a\udcffb"), ("valid Unicode",)),
        (("--prompt", PROMPT, "--token-budget", "0"), ("token_budget=0", "from 1")),
        (("--prompt", PROMPT, "--token-budget", "-64"), ("token_budget=-64",)),
        (("--prompt", PROMPT, "--token-budget", "most"), ("--token-budget 'most'", "a whole number or all")),
        (("--prompt", PROMPT, "--token-budget", "31"), ("token_budget=31 must be at least 32", "2 pages of 16")),
        (("--prompt", PROMPT, "--page-size", "40"), ("page_size=40", "multiple of sub_page_size=16")),
        (("--prompt", PROMPT, "--page-size", "0"), ("page_size=0",)),
        (("--prompt", PROMPT, "--selector-interval", "0"), ("selector_interval=0",)),
        (("--prompt", PROMPT, "--static-sparsity", "1.5"), ("static_sparsity=1.5", "0 to 1")),
        (("--prompt", PROMPT, "--sink", "-1"), ("sink=-1",)),
        (("--prompt", PROMPT, "--local", "0"), ("local=0",)),
        (("--prompt", PROMPT, "--dense-layers", "0,two"), ("--dense-layers '0,two'",)),
        (("--prompt", PROMPT, "--dense-layers", "1,2"), ("dense_layers=[2]", "layers 0 … 1")),
        (("--prompt", PROMPT, "--max-model-len", "0"), ("max_model_len=0 must be a whole number from 1",)),
        (("--prompt", PROMPT, "--prefill-chunk", "-1"), ("prefill_chunk=-1 must be a whole number from 1",)),
        *(
            (("--prompt", PROMPT, f"--{name.replace('_', '-')}", HUGE), (f"{name}={HUGE} must be at most 2147483647",))
            for name in ("max_model_len", "prefill_chunk", "recall_interval", "token_budget", "sink", "local")
        ),
        (("--dry-run", "--max-model-len", HUGE), (f"max_model_len={HUGE} must be at most 2147483647",)),
        (("--prompt", PROMPT, "--temperature", "-0.1"), ("temperature", "got -0.1")),
        (("--prompt", PROMPT, "--temperature", "nan"), ("temperature", "got nan")),
        (("--prompt", PROMPT, "--top-p", "0", "--top-k", "-2"), ("top_p", "got 0.0", "top_k", "got -2")),
        (("--prompt", PROMPT, "--min-p", "2"), ("min_p", "got 2.0")),
        (("--prompt", PROMPT, "--max-tokens", "0"), ("max_tokens", "got 0")),
        (("--prompt", PROMPT, "--seed", "-1"), ("seed", "got -1")),
        (("--prompt", PROMPT, "--stop", ""), ("stop", "non-empty")),
        (("--prompt", PROMPT, "--system-prompt", "x", "--raw"), ("--system-prompt", "--raw")),
        (("--prompt", PROMPT, "--assistant-prefix", "x", "--raw"), ("--assistant-prefix", "--raw")),
        (("--prompt", PROMPT, "--chat-template", "nope"), ("'nope' is neither a name", "nor a file")),
        (("--prompt", PROMPT, "--chat-template-config", "{"), ("--chat-template-config is not JSON",)),
        (("--prompt", PROMPT, "--chat-template-config", "[]"), ("--chat-template-config must be a JSON object",)),
        (("--prompt", PROMPT, "--chat-template-config", '{"messages": 1}'), ("cannot set 'messages'",)),
        (("--prompt", PROMPT, "--tools", "/nope.json"), ("--tools /nope.json: No such file",)),
        (("--prompt", PROMPT, "--tools", __file__), ("--tools is not JSON",)),
        (("--prompt", PROMPT, "--temperature", "warm"), ("--temperature", "'warm'", "--help")),
        (("--prompt", PROMPT, "--attention", "sparse"), ("--attention", "'sparse'", "lserve")),
        (("--prompt", PROMPT, "--kv-dtype", "fp8"), ("--kv-dtype", "'fp8'", "int4")),
        (("--prompt", PROMPT, "--no-such-flag"), ("--no-such-flag",)),
        (("--prompt", PROMPT, "--tokenizer", "nowhere"), ("nowhere", "tokenizer.json")),
        (("--prompt", PROMPT, "--prompt-file", "nowhere.txt"), ("--prompt-file nowhere.txt", "No such file")),
        (("--prompt-file", str(TINY)), ("--prompt-file", "Is a directory")),
        (("--prompt", PROMPT, "--head-pattern", "nowhere"), ("nowhere", "full_attention_heads.tsv")),
    ],
)
def test_values_that_cannot_be_are_refused_in_one_line(
    arguments: tuple[str, ...], parts: tuple[str, ...], run: Callable[..., Result]
):
    check_refusal(run(*arguments), *parts)


def test_prompt_files_that_hold_no_text_are_refused_in_one_line(run: Callable[..., Result], tmp_path: Path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"abc\xff")
    check_refusal(run("--prompt-file", str(path)), "prompt.txt", "not UTF-8", "byte 3")
    path.write_text("\n\n")
    check_refusal(run("--prompt-file", str(path)), "the prompt is empty")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"1\t0\t1\n" * 5, ("[2, 2]", "[5, 3]")),
        (b"1\t0\n1\n", ("[2, 2]", "[2, 1 or 2]")),
        (b"1\t0\n1\tx\n", ("line 2", "'x'")),
        (b"1\t0\n1\t\xff\n", ("cannot be read as text",)),
    ],
    ids=["another model", "ragged", "no number", "not UTF-8"],
)
def test_a_head_pattern_that_does_not_fit_is_refused_in_one_line(
    content: bytes, parts: tuple[str, ...], run: Callable[..., Result], tmp_path: Path
):
    (tmp_path / "full_attention_heads.tsv").write_bytes(content)
    check_refusal(run("--prompt", PROMPT, "--head-pattern", str(tmp_path)), "full_attention_heads.tsv", *parts)


def test_a_published_pattern_of_another_model_is_refused(run: Callable[..., Result], shared_patterns: Path):
    pattern = str(shared_patterns / "Meta-Llama-3.1-8B-Instruct")
    check_refusal(run("--prompt", PROMPT, "--head-pattern", pattern), "[2, 2]", "[32, 8]")


def test_memory_that_does_not_suffice_is_refused_with_the_largest_context_that_fits(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lserve_jax.engine.memory.free_memory", lambda: 2**22)
    parts = ("max_model_len=100000", "largest context that fits is", "tokens")
    check_refusal(run("--prompt", PROMPT, "--max-model-len", "100000"), *parts)
    planned = run("--dry-run", "--max-model-len", "100000")  # a plan is an answer, not a failure
    assert planned.status == 0
    assert "DOES NOT FIT" in planned.out


def test_memory_that_the_device_lacks_at_last_is_one_line_too(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
):
    import jax

    def exhausted(*arguments: Any, **settings: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore")

    monkeypatch.setattr(LLM, "from_setup", exhausted)
    check_refusal(run("--prompt", PROMPT), "out of memory", "123 bytes", "--max-model-len")


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command that decides itself where compiled programs are kept; what comes after keeps them where it did."""
    import jax

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def homeless(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without an entry in the system's list, as in some containers."""

    def unknown(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


def check_uncached_answer(result: Result, *parts: str) -> None:
    """The answer, and one warning with all of the parts."""
    assert result.status == 0
    assert result.out.strip()
    (line,) = (line for line in result.err.splitlines() if line.startswith("compiled programs are not kept: "))
    assert not [part for part in parts if part not in line], line


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"])
def test_an_unwritable_cache_folder_is_a_warning_and_no_obstacle(
    variable: str, own_cache: None, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(variable, str(tmp_path / "file" / "cache"))
    result = run("--prompt", PROMPT, "--max-tokens", "4")
    check_uncached_answer(result, str(tmp_path / "file" / "cache"), "cannot be written", variable)
    assert snapshot(tmp_path) == {"file": b""}


def test_a_user_without_a_home_gets_an_answer_and_a_warning(homeless: None, run: Callable[..., Result]):
    check_uncached_answer(run("--prompt", PROMPT, "--max-tokens", "4"), "no home folder", "XDG_CACHE_HOME")


def test_a_user_without_a_home_is_told_where_the_embedded_model_could_be_kept(
    homeless: None, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lserve_jax.weights.embedded.PACKAGE", "a_package_that_is_not_installed")
    check_refusal(run("--prompt", PROMPT, model="smollm2-135m-instruct"), "no home folder", "XDG_CACHE_HOME")
    check_refusal(run("--prompt", PROMPT, model="~/model"), "~/model", "no such home folder")


def test_an_address_of_a_cache_is_left_to_jax(own_cache: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import jax

    address = "memory://bucket/cache"  # jax makes a folder of no address by itself
    jax.config.update("jax_compilation_cache_dir", address)  # as jax does when it is imported
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", address)
    monkeypatch.chdir(tmp_path)
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == address
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("gs://bucket/model", ("gs://bucket/model: nothing is read from gs://", "download")),
        ("s3://bucket/model.gguf", ("s3://",)),
        ("https://example.org/a/b", ("https://", "download")),
        ("https://huggingface.co/org/name/tree/main", ("a hub id", "org/name")),
        ("https://hf.co/org/name", ("a hub id", "org/name")),
        ("", ("the name of the model is empty",)),
        ("~no-such-user/model", ("no such home folder",)),
    ],
)
def test_an_address_of_a_model_is_refused_with_what_is_taken(
    model: str, parts: tuple[str, ...], run: Callable[..., Result]
):
    check_refusal(run("--prompt", PROMPT, model=model), *parts)


def test_an_unwritable_cache_folder_for_the_embedded_model_is_refused_in_one_line(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("lserve_jax.weights.embedded.PACKAGE", "a_package_that_is_not_installed")
    check_refusal(run("--prompt", PROMPT, model="smollm2-135m-instruct"), str(tmp_path / "file"), "XDG_CACHE_HOME")


@pytest.mark.slow
def test_a_refusal_as_a_program_has_status_2_and_one_line():
    command = [sys.executable, "-m", "lserve_jax.generate", "--model", MODEL, *SIZES, "--prompt", "x" * 500]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    check_refusal(Result(result.returncode, result.stdout, result.stderr), "517", "128")


# --- saved contexts -------------------------------------------------------------------------------------------------

DOCUMENT = "The old lighthouse stood on a hill above the town. " * 6


@pytest.mark.parametrize("mode", [("--raw",), ("--system-prompt", "Be brief.")])
def test_a_saved_context_gives_the_answer_of_the_whole_prompt(
    mode: tuple[str, ...], run: Callable[..., Result], tmp_path: Path
):
    path, sizes = str(tmp_path / "document.safetensors"), ("--max-model-len", "480")
    saved = run("--prompt", DOCUMENT, "--save-context", path, *mode, *sizes)
    assert (saved.status, saved.out) == (0, "")
    assert saved.err.splitlines()[-1].endswith(f"tokens: {path}")
    asked = ("--max-tokens", "8", "--ignore-eos", "--json", "--quiet", *mode, *sizes)
    whole = run("--prompt", f"{DOCUMENT}Where?", *asked)
    parts = run("--context-file", path, "--prompt", "Where?", *asked)
    assert parts.status == 0, parts.err
    one, other = json.loads(whole.out), json.loads(parts.out)
    assert (one["cached_tokens"], other["cached_tokens"] >= 64) == (0, True)
    same = ("prompt_tokens", "token_ids", "text")
    assert [one[key] for key in same] == [other[key] for key in same]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--prompt", "a", "--prompt", "b", "--save-context", "x"), "saves one prompt and generates nothing"),
        (("--prompt", "a", "--save-context", "x", "--json"), "saves one prompt and generates nothing"),
        (("--prompt", "a", "--save-context", "x", "--context-file", "y"), "saves one prompt and generates nothing"),
        (("--prompt", "a", "--save-context", "no/such/folder/x"), "must be a file in a folder that exists"),
        (("--prompt", "a", "--save-context", "."), "must be a file in a folder that exists"),
        (("--prompt", "a", "--save-context", "x"), "fewer than prefill_chunk=64"),
        (("--prompt", "a", "--context-file", "no/such/file"), "no/such/file: cannot be read (No such file"),
        (("--prompt", "a", "--context-file", "."), "cannot be read"),
    ],
)
def test_contexts_that_cannot_be_are_one_line_before_any_weight_is_read(
    arguments: tuple[str, ...], named: str, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LLM, "from_setup", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    result = run(*arguments)
    assert result.status == 2
    (line,) = result.err.splitlines()
    assert named in line
    assert list(tmp_path.iterdir()) == []
