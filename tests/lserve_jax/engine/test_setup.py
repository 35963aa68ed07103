"""Defaults that come from the head pattern of a model."""

from pathlib import Path
from typing import Any

import pytest

from lserve_jax.engine.device import Device
from lserve_jax.engine.setup import prepare

MODEL = Path(__file__).parents[2] / "golden" / "tiny" / "llama3"


@pytest.fixture
def pattern(tmp_path: Path) -> Path:
    (tmp_path / "full_attention_heads.tsv").write_text("1\t0\n0\t1\n")
    (tmp_path / "config.json").write_text('{"attention": {"sink": 16, "local": 32, "dense_layers": [1]}}')
    return tmp_path


def test_a_patterns_settings_are_defaults_of_presets_whose_heads_stream(pattern: Path):
    policy = prepare(str(MODEL), head_pattern=pattern, local=48).config.attention
    assert (policy.sink, policy.local, policy.dense_layers) == (16, 48, (1,))
    policy = prepare(str(MODEL), attention="dense", head_pattern=pattern).config.attention
    assert (policy.sink, policy.local, policy.dense_layers) == (128, 256, ())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"attention": {"window": 3}}', r"config\.json: attention: unknown attention option window"),
        ('{"attention": {"sink": -1}}', r"config\.json: attention: sink=-1 must be"),
        ('{"attention": {"dense_layers": [9]}}', r"dense_layers=\[9\] do not exist"),
        ("{", r"config\.json: not valid JSON"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(settings: str, message: str, pattern: Path):
    (pattern / "config.json").write_text(settings)
    with pytest.raises(ValueError, match=message) as error:
        prepare(str(MODEL), head_pattern=pattern)
    assert "\n" not in str(error.value)


def test_a_pattern_from_elsewhere_names_none(pattern: Path):
    (pattern / "config.json").write_text('{"sink_size": 64, "recent_size": 256}')
    assert prepare(str(MODEL), head_pattern=pattern).config.attention.sink == 128


@pytest.mark.usefixtures("embedded_gguf")
def test_the_embedded_model_has_windows_of_its_own():
    policy = prepare("smollm2-135m-instruct").config.attention
    assert (policy.sink, policy.local, policy.prefill_local, policy.dense_layers) == (64, 512, 512, (7,))


@pytest.mark.usefixtures("embedded_gguf")
def test_a_cpu_multiplies_integers_where_factors_are_known(tmp_path: Path):
    (tmp_path / "full_attention_heads.tsv").write_text("1\t0\t1\n" * 30)

    def default(model: str, **options: Any) -> tuple[str | None, bool]:
        forms = prepare(model, **options).forms
        return forms.weight_dtype, forms.smoothing is not None

    gpu = Device(platform="gpu", free_bytes=None, is_here=False)
    embedded = "smollm2-135m-instruct"
    assert default(embedded) == ("int8", True)
    assert default(embedded, attention="dense") == ("int8", True)
    assert default(embedded, dtype="float32") == ("auto", False)
    assert default(embedded, device=gpu) == ("auto", False)
    assert default(embedded, weight_dtype="bfloat16") == ("bfloat16", False)
    assert default(embedded, head_pattern=tmp_path) == ("int8", True), "a pattern without factors changes no weights"
    assert default(str(MODEL)) == ("auto", False)
    w8a8 = MODEL.parents[1] / "quantized" / "ct_w8a8"
    assert default(str(w8a8)) == ("auto", False)


def test_prefill_sparsity_that_no_prompt_can_come_to_is_said():
    asked = {"prefill_sparsity": "blocks", "prefill_from": 1024, "prefill_first_layer": 0}
    short, long = (prepare(str(MODEL), max_model_len=length, **asked) for length in (1024, 1025))
    assert any("prefill_sparsity has no effect" in warning for warning in short.warnings)
    assert not any("prefill_sparsity" in warning for warning in long.warnings)
    assert short.config.attention.prefill_sparsity == "none" and long.config.attention.prefill_sparsity == "blocks"
