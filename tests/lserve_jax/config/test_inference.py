import re
from pathlib import Path

import pytest

from lserve_jax import AttentionConfig, HeadClasses, InferenceConfig, from_preset, open_checkpoint
from lserve_jax.config.attention import PRESETS

MODEL = open_checkpoint(str(Path(__file__).parents[2] / "golden" / "tiny" / "llama3")).config  # 2 layers of 2 KV heads


def test_defaults_come_from_the_model():
    config = InferenceConfig(model=MODEL)
    assert (config.dtype, config.kv_dtype, config.num_retrieval) == ("float32", "float32", (2, 2))
    assert InferenceConfig(model=MODEL, dtype="bfloat16").kv_dtype == "bfloat16"
    assert InferenceConfig(model=MODEL, attention=from_preset("qserve")).kv_dtype == "int4"


@pytest.mark.parametrize(("kv_dtype", "streaming"), [("auto", "float32"), ("int8", "int8"), ("int4", "int8")])
def test_streaming_heads_store_as_others_but_never_4_bits(kv_dtype: str, streaming: str):
    config = InferenceConfig(model=MODEL, attention=from_preset("lserve", kv_dtype=kv_dtype))
    assert config.streaming_dtype == streaming


def test_dense_layers_read_all_pages_and_others_the_budget():
    config = InferenceConfig(model=MODEL, attention=AttentionConfig(dense_layers=(1,)))
    assert [kind.decode.num_selected for kind in config.kinds] == [64, None]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("budget", [None, "all", 2048])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "int4"])
def test_a_layer_stores_bounds_if_it_selects_pages_or_quantises_keys(
    preset: str, budget: str | int | None, kv_dtype: str
):
    heads = HeadClasses(order=((0, 1), (0, 1)), num_retrieval=(1, 0))
    policy = from_preset(preset, token_budget=budget, kv_dtype=kv_dtype)
    for one in (None, heads):
        for kind in InferenceConfig(model=MODEL, attention=policy, heads=one).kinds:
            is_quantised = kv_dtype != "bfloat16"
            if kind.retrieval is not None:
                has_bounds = is_quantised or kind.decode.num_selected is not None
                assert (kind.retrieval.sub_page_size is not None) == has_bounds
            if kind.streaming is not None:
                assert (kind.streaming.sub_page_size is not None) == is_quantised


def test_dense_attention_in_bfloat16_stores_no_bounds():
    for preset in ("dense", "streaming"):
        config = InferenceConfig(model=MODEL, attention=from_preset(preset))
        assert [kind.retrieval and kind.retrieval.sub_page_size for kind in config.kinds] == [None, None]
    dense_layer = InferenceConfig(model=MODEL, attention=AttentionConfig(dense_layers=(1,)))
    assert [kind.retrieval and kind.retrieval.sub_page_size for kind in dense_layer.kinds] == [16, None]


def test_keys_of_8_bits_that_nobody_selects_have_the_bounds_of_whole_pages():
    """So they take no more memory than one scale per key did; keys of 4 bits need smaller sub-pages."""
    for preset, kv_dtype, size in (("dense", "int8", 64), ("qserve", "int4", 16), ("lserve", "int8", 16)):
        config = InferenceConfig(model=MODEL, attention=from_preset(preset, kv_dtype=kv_dtype))
        stored = [storage for kind in config.kinds for storage in (kind.retrieval, kind.streaming) if storage]
        assert {storage.sub_page_size for storage in stored} == {size}


def test_equal_configurations_are_one_static_argument():
    one, other = (InferenceConfig(model=MODEL, attention=from_preset("lserve", dense_layers=[0])) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float16"}, "dtype='float16' must be auto or one of bfloat16, float32"),
        ({"attention": AttentionConfig(dense_layers=(0, 2, 5))}, "dense_layers=[2, 5] do not exist: the model has"),
        (
            {"heads": HeadClasses.all_retrieval(2, 3)},
            "head classes of 2 layers of 3 KV heads do not fit a model of 2 layers of 2",
        ),
        (
            {"heads": HeadClasses.all_retrieval(3, 2)},
            "head classes of 3 layers of 2 KV heads do not fit a model of 2 layers of 2",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        InferenceConfig(model=MODEL, **fields)
