"""Which head pattern a model gets, and what is said where it has none."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lserve_jax import HeadClasses, Setup, open_checkpoint, prepare
from lserve_jax.config.heads import HeadPattern
from lserve_jax.convert import convert
from lserve_jax.engine.patterns import architecture, find_pattern
from tests.lserve_jax.checkpoints import random_tensors, tiny_config, write_folder

CONFIG = tiny_config(max_position_embeddings=1024)  # 3 layers of 3 KV heads
NAME = "smollm2-135m-instruct"
# The config.json of HuggingFaceTB/SmolLM2-135M-Instruct, without what no loader reads.
ORIGINAL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}


def named(folder: Path, config: dict[str, Any]) -> str:
    """A model of which only the configuration is there, which suffices to find its pattern."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def plan(model: str, **settings: Any) -> Setup:
    return prepare(model, max_model_len=1024, max_num_seqs=1, prefill_chunk=64, **settings)


def shipped() -> HeadClasses | None:
    return plan(NAME).config.heads


# --- the pattern that ships ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("embedded_gguf")
@pytest.mark.parametrize("folder", ["SmolLM2-135M-Instruct", "smollm2-135m-instruct", "SMOLLM2-135M-INSTRUCT.bf16"])
def test_the_folder_of_the_embedded_model_has_its_pattern_whatever_the_case_of_its_name(folder: str, tmp_path: Path):
    setup = plan(named(tmp_path / folder, ORIGINAL))
    assert setup.config.heads == shipped()
    assert setup.config.attention.dense_layers == (7,)
    assert setup.pattern_origin == "shipped with the package for this model"
    assert setup.warnings == ()


@pytest.mark.usefixtures("embedded_gguf")
def test_a_folder_of_another_name_has_the_pattern_of_its_architecture_and_one_line_says_so(tmp_path: Path):
    setup = plan(named(tmp_path / "my-tune", ORIGINAL))
    assert setup.config.heads == shipped()
    (warning,) = setup.warnings
    for part in (f"{tmp_path}/my-tune", NAME, "has the same architecture", "--head-pattern", "lserve_jax.calibrate"):
        assert part in warning
    assert "\n" not in warning
    assert plan(named(tmp_path / "other", ORIGINAL), attention="dense").warnings == ()  # it needs no pattern


@pytest.mark.usefixtures("embedded_gguf")
@pytest.mark.parametrize(
    "change", [{"rope_theta": 10000}, {"vocab_size": 49153}, {"num_key_value_heads": 9}, {"intermediate_size": 1537}]
)
def test_another_architecture_does_not_get_the_pattern(change: dict[str, Any], tmp_path: Path):
    model = open_checkpoint(named(tmp_path / "SmolLM2-135M-Instruct", ORIGINAL | change))
    assert find_pattern(model) is None


@pytest.mark.usefixtures("embedded_gguf")
def test_the_shipped_pattern_says_on_which_model_it_was_found():
    pattern = find_pattern(open_checkpoint(NAME))
    assert pattern is not None
    (config,) = [file for file in pattern.files if file.name == "config.json"]
    found = json.loads(config.read_text(encoding="utf-8"))
    model = open_checkpoint(NAME)
    assert (found["checkpoint"], found["architecture"]) == (model.digest, architecture(model.config))


# --- a model's own pattern -------------------------------------------------------------------------------------------


def gates(folder: Path, streaming: int) -> Path:
    """A pattern that lets one head of each layer stream, with a window of its own."""
    folder.mkdir(exist_ok=True)
    rows = np.ones((3, 3))
    rows[:, streaming] = 0
    np.savetxt(folder / "full_attention_heads.tsv", rows, delimiter="\t")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", CONFIG, random_tensors(CONFIG))


def streaming_head(setup: Setup) -> int:
    """The head that streams in every layer."""
    assert setup.config.heads is not None
    (last,) = {order[-1] for order in setup.config.heads.order}
    return last


def test_a_pattern_in_the_models_folder_is_found_and_the_named_one_comes_before_it(model: Path, tmp_path: Path):
    share = {"static_sparsity": 1 / 3}
    gates(model, 0)  # beside the model's config.json, as DuoAttention's gates lie where they were unpacked
    setup = plan(str(model), **share)
    assert streaming_head(setup) == 0
    assert setup.config.attention.sink == 128  # the config.json is the model's
    own = gates(model / "head_pattern", 1)
    (own / "config.json").write_text('{"attention": {"sink": 16}}')
    setup = plan(str(model), **share)
    assert (streaming_head(setup), setup.config.attention.sink) == (1, 16)
    assert setup.pattern_origin == f"the model's own, {own}"
    assert setup.warnings == ()
    assert streaming_head(plan(str(model), head_pattern=gates(tmp_path / "named", 2), **share)) == 2


def test_a_model_with_a_key_called_attention_keeps_it_for_itself(model: Path):
    (model / "config.json").write_text(json.dumps(CONFIG | {"attention": "sdpa"}))
    gates(model, 0)
    assert streaming_head(plan(str(model), static_sparsity=1 / 3)) == 0


def test_converted_models_keep_their_pattern_under_any_name(model: Path, tmp_path: Path):
    own = gates(model / "head_pattern", 1)
    (own / "config.json").write_text('{"attention": {"sink": 16}, "checkpoint": "0123"}')
    convert(str(model), tmp_path / "copy")
    for name in ("full_attention_heads.tsv", "config.json"):
        assert (tmp_path / "copy" / "head_pattern" / name).read_bytes() == (own / name).read_bytes()
    shutil.rmtree(own)
    gates(model, 2)
    convert(str(model), tmp_path / "beside")
    assert [path.name for path in (tmp_path / "beside" / "head_pattern").iterdir()] == ["full_attention_heads.tsv"]
    setups = [plan(str(tmp_path / name), static_sparsity=1 / 3) for name in ("copy", "beside")]
    assert [(streaming_head(setup), setup.config.attention.sink) for setup in setups] == [(1, 16), (2, 128)]


def test_a_pattern_that_does_not_fit_ends_a_conversion_before_anything_is_written(model: Path, tmp_path: Path):
    (model / "full_attention_heads.tsv").write_text("1\t0\n")
    with pytest.raises(ValueError, match=r"full_attention_heads\.tsv: expected gates"):
        convert(str(model), tmp_path / "copy")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_model_without_a_pattern_is_converted_without_one(model: Path, tmp_path: Path):
    convert(str(model), tmp_path / "copy")
    assert not (tmp_path / "copy" / "head_pattern").exists()


def test_a_guess_does_not_go_along_as_if_it_were_known(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = gates(tmp_path / "shipped", 1)
    for is_guess in (True, False):
        pattern = HeadPattern(folder=folder, shape=(3, 3), origin="shipped", is_guess=is_guess)
        monkeypatch.setattr("lserve_jax.convert.find_pattern", lambda checkpoint, named, found=pattern: found)
        convert(str(model), tmp_path / f"{is_guess}")
        assert (tmp_path / f"{is_guess}" / "head_pattern").exists() is not is_guess


# --- no pattern ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "wish"),
    [
        ({"attention": "streaming"}, "attention=streaming"),
        ({"static_sparsity": 0.75}, "static_sparsity=0.75"),
        ({"attention": "dense", "static_sparsity": 0.5}, "static_sparsity=0.5"),
        ({"attention": "streaming", "static_sparsity": 0.75}, "static_sparsity=0.75"),
    ],
)
def test_streaming_heads_that_are_asked_for_need_a_pattern(settings: dict[str, Any], wish: str, model: Path):
    with pytest.raises(ValueError, match=f"^{wish} needs a head pattern, and {model} has none: ") as error:
        plan(str(model), **settings)
    assert "--head-pattern" in str(error.value) and "python -m lserve_jax.calibrate" in str(error.value)
    assert "\n" not in str(error.value)
    assert plan(str(model), head_pattern=gates(model.parent / "found", 0), **settings).has_streaming_heads


def test_a_preset_whose_heads_would_stream_by_default_says_that_none_does(model: Path, caplog: Any):
    setup = plan(str(model))
    assert not setup.has_streaming_heads
    with caplog.at_level(logging.WARNING):
        setup.warn()
    (line,) = [record.getMessage() for record in caplog.records]
    for part in (f"no head pattern for {model}", "--head-pattern", "python -m lserve_jax.calibrate"):
        assert part in line
    assert setup.pattern_origin == f"none for {model}"
    for settings in ({"attention": "dense"}, {"static_sparsity": 0}):
        setup = plan(str(model), **settings)
        assert (setup.warnings, setup.pattern_origin) == ((), "none, because no head streams")


def test_a_plan_says_that_it_assumes_a_pattern(model: Path):
    for settings in ({"attention": "streaming", "static_sparsity": 2 / 3}, {"static_sparsity": 2 / 3}):
        setup = plan(str(model), assume_streaming=True, **settings)
        assert sum(setup.config.num_retrieval) == 3
        assert setup.pattern_origin == f"none for {model}: this plan assumes one"
    assert not plan(str(model), assume_streaming=True).has_streaming_heads  # as the real run
