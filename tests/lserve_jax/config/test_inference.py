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
def test_a_layer_stores_statistics_exactly_if_it_selects_pages_by_them(preset: str, budget: str | int | None):
    heads = HeadClasses(order=((0, 1), (0, 1)), num_retrieval=(1, 0))
    for one in (None, heads):
        config = InferenceConfig(model=MODEL, attention=from_preset(preset, token_budget=budget), heads=one)
        for kind in config.kinds:
            if kind.retrieval is not None:
                assert kind.retrieval.has_statistics == (kind.decode.num_selected is not None)
            assert kind.streaming is None or not kind.streaming.has_statistics


def test_dense_attention_stores_no_statistics():
    for preset in ("dense", "streaming", "qserve"):
        config = InferenceConfig(model=MODEL, attention=from_preset(preset))
        assert [kind.retrieval and kind.retrieval.has_statistics for kind in config.kinds] == [False, False]
    dense_layer = InferenceConfig(model=MODEL, attention=AttentionConfig(dense_layers=(1,)))
    assert [kind.retrieval and kind.retrieval.has_statistics for kind in dense_layer.kinds] == [True, False]


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
