import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lserve_jax.convert import convert, main
from lserve_jax.engine.setup import prepare
from lserve_jax.text.tokenizer import Tokenizer
from lserve_jax.weights import embedded, open_checkpoint
from lserve_jax.weights.tensors import describe_forms, tree_bytes
from tests.lserve_jax.checkpoints import (
    assert_same_bits,
    assert_same_tree,
    random_tensors,
    tiny_config,
    write_folder,
    write_gguf,
)

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "golden" / "tiny"


def error_line(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a call that ends with status 2."""
    capfd.readouterr()
    assert main(arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("name", ["llama31", "qwen2_yarn", "mistral"])
def test_converted_folder_is_the_same_checkpoint(name: str, tmp_path: Path):
    source = open_checkpoint(str(TINY / name))
    assert main(["--model", str(TINY / name), "--out", str(tmp_path / "out")]) == 0
    copy = open_checkpoint(str(tmp_path / "out"))
    assert copy.config == source.config
    assert copy.generation_config == source.generation_config
    dtype = source.config.dtype
    assert_same_tree(copy.load_params(dtype), jax.tree.map(np.asarray, source.load_params(dtype)), dtype)
    mine, theirs = (Tokenizer.from_folder(folder) for folder in (tmp_path / "out", TINY / name))
    messages = [{"role": "user", "content": "Grüße, 12 <s> worlds"}]
    assert mine.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    assert mine.eos_token_ids == theirs.eos_token_ids


def test_dtype_of_the_new_folder_is_the_one_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    model = str(TINY / "llama3")
    assert open_checkpoint(model).config.dtype == "float32"
    assert main(["--model", model, "--out", str(tmp_path / "new" / "out"), "--dtype", "bfloat16"]) == 0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "weights" in captured.err
    assert "100%" in captured.err
    copy = open_checkpoint(str(tmp_path / "new" / "out"))
    assert copy.config.dtype == "bfloat16"
    expected = open_checkpoint(model).load_params("bfloat16")
    assert_same_tree(copy.load_params("bfloat16"), jax.tree.map(np.asarray, expected), "bfloat16")


@pytest.mark.parametrize("name", ["Q4_1", "Q4_K_M"])
def test_packed_weights_stay_packed(name: str, tmp_path: Path):
    model = str(ROOT / "tests" / "golden" / "quantized" / "gguf" / f"{name}.gguf")
    convert(model, tmp_path / "out")
    source, copy = open_checkpoint(model), open_checkpoint(str(tmp_path / "out"))
    assert copy.config == source.config
    dtype = source.config.dtype
    mine, theirs = (checkpoint.load_params(dtype, weight_dtype="auto") for checkpoint in (copy, source))
    assert any(leaf.dtype == np.uint8 for leaf in jax.tree.leaves(mine))
    assert_same_bits(mine, theirs)


@pytest.mark.parametrize(
    ("weight_dtype", "words", "most"),
    [
        ("int8", {"int8"}, 0.4),
        ("int4", {"int8", "int4 in groups of 32", "int4 in groups of 16"}, 0.4),
        ("float32", {"float32"}, 1.1),
    ],
)
def test_weights_are_quantised_when_asked_for(weight_dtype: str, words: set[str], most: float, tmp_path: Path):
    model = str(TINY / "llama3")
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert main(["--model", model, "--out", str(plain)]) == 0
    assert main(["--model", model, "--out", str(out), "--weight-dtype", weight_dtype]) == 0
    assert json.loads((out / "config.json").read_text()) == json.loads((plain / "config.json").read_text())
    params = open_checkpoint(str(out)).load_params("float32", weight_dtype="auto")
    assert set(describe_forms(params).split(", ")) == words
    assert tree_bytes(params) < most * tree_bytes(open_checkpoint(model).load_params("float32"))


def test_packed_weights_of_a_hugging_face_folder_stay_packed_and_the_config_no_longer_speaks_of_them(tmp_path: Path):
    model = str(ROOT / "tests" / "golden" / "quantized" / "gptq")
    assert main(["--model", model, "--out", str(tmp_path / "out"), "--tokenizer", str(TINY / "llama3")]) == 0
    source, copy = open_checkpoint(model), open_checkpoint(str(tmp_path / "out"))
    assert "quantization_config" in source.hf_config and "quantization_config" not in copy.hf_config
    for weight_dtype in ("auto", "float32"):
        mine, theirs = (
            checkpoint.load_params(source.config.dtype, weight_dtype=weight_dtype) for checkpoint in (copy, source)
        )
        assert_same_bits(mine, theirs)


def test_the_embedded_model_in_8_bits_loads_as_it_was_loaded_when_it_was_quantised(embedded_gguf: Path, tmp_path: Path):
    """Smoothed once."""
    model = embedded.MODEL_NAME
    convert(model, tmp_path / "out", weight_dtype="int8")
    source = prepare(model, attention="dense", weight_dtype="int8")
    copy = prepare(str(tmp_path / "out"), attention="dense")  # nobody says how
    assert source.forms.smoothing is not None and copy.forms.smoothing is None
    wanted = source.load_params()
    assert_same_bits(copy.load_params(), wanted)
    assert not (tmp_path / "out" / "head_pattern" / "smoothing.safetensors").exists()


def test_quantised_checkpoint_becomes_ordinary_numbers_and_says_so(tmp_path: Path):
    model = str(ROOT / "tests" / "golden" / "quantized" / "gptq")
    arguments = ["--weight-dtype", "float32", "--tokenizer", str(TINY / "llama3")]
    assert main(["--model", model, "--out", str(tmp_path / "out"), *arguments]) == 0
    copy = open_checkpoint(str(tmp_path / "out"))
    assert "quantization_config" not in copy.hf_config
    expected = open_checkpoint(model).load_params("float32")
    assert_same_tree(copy.load_params("float32"), jax.tree.map(np.asarray, expected))


@pytest.mark.parametrize("is_named", [False, True])
def test_what_a_gguf_tokenizer_is_warned_of_is_printed_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], is_named: bool
):
    tokens = ["<|im_end|>", *(chr(code) for code in range(33, 127)), "he"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": ["h e"],
    }
    config = tiny_config(vocab_size=len(tokens))
    path = write_gguf(tmp_path / "model.gguf", config, random_tensors(config), metadata=metadata)
    named = ("--tokenizer", str(path)) if is_named else ()
    model = str(TINY / "llama3") if is_named else str(path)
    assert main(["--model", model, "--out", str(tmp_path / "out"), *named]) == 0
    assert capfd.readouterr().err.count("the type of token '<|im_end|>' is not that of a control token") == 1
    copy = Tokenizer.from_folder(tmp_path / "out")
    assert copy.encode("he", add_special_tokens=False) == [len(tokens) - 1]


def test_gguf_file_is_converted_with_its_tokenizer(tmp_path: Path):
    tokens = ["<s>", "</s>", "<|user|>", *(chr(code) for code in range(33, 127)), "Ġ", "Ċ", "he", "Ġhe"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["h e", "Ġ he"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.chat_template": "{% for message in messages %}<|user|>{{ message['content'] }}</s>{% endfor %}",
    }
    config = tiny_config(vocab_size=len(tokens))
    path = write_gguf(tmp_path / "model.gguf", config, random_tensors(config), metadata=metadata, kind="F16")
    assert main(["--model", str(path), "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    source, copy = open_checkpoint(str(path)), open_checkpoint(str(tmp_path / "out"))
    assert copy.config == dataclasses.replace(source.config, dtype="float32")
    assert_same_tree(copy.load_params("float32"), jax.tree.map(np.asarray, source.load_params("float32")))
    mine, theirs = Tokenizer.from_folder(tmp_path / "out"), Tokenizer.from_gguf(metadata)
    messages = [{"role": "user", "content": "he said <s> to\nhe"}]
    assert mine.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    assert mine.eos_token_ids == theirs.eos_token_ids == source.config.eos_token_ids


def test_a_gguf_file_that_does_not_say_how_it_splits_is_converted_with_another_tokenizer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    config = tiny_config(vocab_size=40)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [chr(code) for code in range(33, 73)],
        "tokenizer.ggml.token_type": [1] * 40,
        "tokenizer.ggml.merges": ['! "'],
    }
    metadata["tokenizer.ggml.tokens"][-1] = '!"'
    path = write_gguf(tmp_path / "model.gguf", config, random_tensors(config), metadata=metadata)
    arguments = ["--model", str(path), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr("lserve_jax.weights.load.Checkpoint.load_params", None)
        line = error_line(arguments, capfd)
        assert f"{path}: cannot build its tokenizer: tokenizer.ggml.pre is missing" in line
        assert "missing" in error_line([*arguments, "--tokenizer", str(tmp_path)], capfd)
    other = TINY / "llama3"
    assert main([*arguments, "--tokenizer", str(other)]) == 0
    assert Tokenizer.from_folder(tmp_path / "out").encode("hi") == Tokenizer.from_folder(other).encode("hi")


def test_every_chat_template_is_taken_along(tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(TINY / "llama3", model)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("r")
    assert main(["--model", str(model), "--out", str(tmp_path / "out")]) == 0
    templates = Tokenizer.from_folder(tmp_path / "out").chat_templates
    assert templates == Tokenizer.from_folder(model).chat_templates
    assert templates["rag"] == "r"


def test_folder_that_is_not_empty_is_refused_before_the_model_is_opened(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "kept.txt").write_text("mine")
    line = error_line(["--model", "no-such-model", "--out", str(tmp_path)], capfd)
    assert line == f"error: {tmp_path}: the folder is not empty; name a new one"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_bad_model_is_refused_and_nothing_is_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    out = str(tmp_path / "out")
    assert "no-such-model: no such file or folder" in error_line(["--model", "no-such-model", "--out", out], capfd)
    config = tiny_config()
    write_folder(tmp_path / "bad", config | {"rope_scaling": {"type": "dynamic"}}, random_tensors(config))
    assert "RoPE kind 'dynamic'" in error_line(["--model", str(tmp_path / "bad"), "--out", out], capfd)
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config | {"vocab_size": 41}))
    line = error_line(["--model", str(tmp_path / "bad"), "--out", out], capfd)
    assert "tensor lm_head.weight has shape [40, 32], expected [41, 32]" in line
    assert {path.name for path in tmp_path.iterdir()} == {"bad"}


@pytest.mark.parametrize("option", [("--dtype", "int8"), ("--weight-dtype", "int3"), ("--weight-dtype", "")])
def test_wrong_option_ends_with_status_2(option: tuple[str, str]):
    with pytest.raises(SystemExit) as caught:
        main(["--out", "x", *option])
    assert caught.value.code == 2


def test_target_that_cannot_be_made_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "file").touch()
    capfd.readouterr()
    assert main(["--model", str(TINY / "llama3"), "--out", str(tmp_path / "file" / "out")]) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_program_runs_as_a_module(tmp_path: Path):
    command = [sys.executable, "-m", "lserve_jax.convert", "--model", "no-such-model", "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: no-such-model: no such file or folder")
    assert result.stderr.count("\n") == 1


def test_a_folder_whose_name_is_no_text_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    line = error_line(["--model", str(TINY / "llama31"), "--out", str(tmp_path / "a\udcff")], capfd)
    assert line.endswith(r"a\udcff: the name must be valid Unicode")
    assert not [*tmp_path.iterdir()]
