import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lserve_jax.config.errors import InputError
from lserve_jax.config.hf import ARCHITECTURES, NEUTRAL_VALUES, read_hf
from lserve_jax.config.model import ModelConfig, RopeConfig
from lserve_jax.models.known import known_configs
from lserve_jax.weights.rules import expected_tensors
from tests.lserve_jax.checkpoints import tiny_config

ROPE_KEYS = [
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor"),
    *("high_freq_factor", "beta_fast", "attention_factor", "mscale", "truncate", "partial_rotary_factor"),
    *("full_attention", "sliding_attention"),
]
CONFIG_KEYS = [
    *tiny_config(),
    *("rope_scaling", "rope_parameters", "dtype", "layer_types", "use_sliding_window", "max_window_layers"),
    *("attention_bias", "mlp_bias", "quantization_config", "original_max_position_embeddings"),
    *NEUTRAL_VALUES,
]


def read(config: dict[str, Any], **generation_config: Any) -> ModelConfig:
    return read_hf(config, source="folder/config.json", generation_config=generation_config)


def rope_of(section: dict[str, Any], **changes: Any) -> RopeConfig:
    return read(tiny_config(rope_scaling=section, **changes)).rope


def test_every_field_of_a_llama_config_is_read():
    assert read(tiny_config(rope_theta=5e5)) == ModelConfig(
        architecture="llama",
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_layers=3,
        num_heads=6,
        num_kv_heads=3,
        head_dim=4,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=5e5),
        max_context=256,
        tie_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        dtype="float32",
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_config_is_hashable_so_that_it_can_be_a_static_argument():
    assert hash(read(tiny_config())) == hash(read(tiny_config()))


@pytest.mark.parametrize(
    ("model_type", "changes", "biases"),
    [
        ("llama", {}, (False, False, False)),
        ("llama", {"attention_bias": True}, (True, True, False)),
        ("llama", {"mlp_bias": True}, (False, False, True)),
        ("mistral", {"attention_bias": True, "mlp_bias": True}, (False, False, False)),
        ("qwen2", {}, (True, False, False)),
        ("qwen3", {}, (False, False, False)),
        ("qwen3", {"attention_bias": True}, (True, True, False)),
    ],
)
def test_biases_follow_the_architecture(model_type: str, changes: dict[str, Any], biases: tuple[bool, bool, bool]):
    config = read(tiny_config(model_type, **changes))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == biases
    assert config.qk_norm == (model_type == "qwen3")


def test_architecture_is_found_by_class_or_by_model_type():
    assert read(tiny_config(architectures=None, model_type="qwen3")).architecture == "qwen3"
    assert read(tiny_config(model_type="other")).architecture == "llama"


@pytest.mark.parametrize(
    "names", [{"architectures": ["GemmaForCausalLM"]}, {"architectures": None, "model_type": "gemma"}]
)
def test_unknown_architecture_is_named_with_the_known_ones(names: dict[str, Any]):
    with pytest.raises(
        ValueError, match=r"config\.json: architecture '[Gg]emma.*known: LlamaForCausalLM \(llama\), Mis"
    ):
        read(tiny_config(**names))


def test_config_without_architecture_is_refused():
    with pytest.raises(ValueError, match="names no architecture"):
        read(tiny_config(architectures=None, model_type=None))


def test_head_size_is_explicit_or_derived_or_the_architectures_own():
    assert read(tiny_config(head_dim=10)).head_dim == 10
    assert read(tiny_config(num_attention_heads=4, num_key_value_heads=4) | {"head_dim": None}).head_dim == 8
    assert read(tiny_config("qwen3", head_dim=None)).head_dim == 128


def test_null_kv_heads_are_as_many_as_query_heads():
    assert read(tiny_config() | {"num_key_value_heads": None}).num_kv_heads == 6
    assert read(tiny_config(num_key_value_heads=None)).num_kv_heads == 6
    with pytest.raises(ValueError, match="missing required keys: num_key_value_heads"):
        read(tiny_config("qwen2", num_key_value_heads=None))


def test_old_and_new_spellings_give_the_same_config():
    section = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = tiny_config(rope_scaling={"type": "llama3"} | section, rope_theta=5e5, torch_dtype="bfloat16")
    new = tiny_config(
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | section,
        rope_theta=None,
        torch_dtype=None,
        dtype="bfloat16",
    )
    assert read(old) == read(new)
    assert read(old).rope == RopeConfig(kind="llama3", theta=5e5, factor=8.0, original_max_position=64)


@pytest.mark.parametrize(
    ("named", "meant"),
    [("bfloat16", "bfloat16"), ("float16", "bfloat16"), ("float32", "float32"), ("torch.float32", "float32")],
)
def test_auto_dtype(named: str, meant: str):
    assert read(tiny_config(torch_dtype=named)).dtype == meant


def test_linear_rope():
    assert rope_of({"type": "linear", "factor": 4.0}) == RopeConfig(kind="linear", factor=4.0)
    with pytest.raises(ValueError, match=r"missing required keys: rope_scaling\.factor"):
        rope_of({"type": "linear"})


def test_llama3_rope_needs_its_factors_and_takes_the_whole_range_as_original():
    section = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert rope_of(section).original_max_position == 256
    with pytest.raises(ValueError, match=r"keys: rope_scaling\.low_freq_factor, rope_scaling\.high_freq_factor"):
        rope_of({"rope_type": "llama3", "factor": 2.0})


def test_yarn_rope_reads_every_field():
    section = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16,
        "beta_slow": 2,
        "attention_factor": 1.5,
        "mscale": 0.7,
        "mscale_all_dim": 0.8,
        "truncate": False,
    }
    assert rope_of(section) == RopeConfig(
        kind="yarn",
        factor=4.0,
        original_max_position=64,
        beta_fast=16.0,
        beta_slow=2.0,
        attention_factor=1.5,
        mscale=0.7,
        mscale_all_dim=0.8,
        truncate=False,
    )


def test_yarn_rope_takes_absent_fields_as_transformers_does():
    assert rope_of({"rope_type": "yarn", "factor": 2.0}) == RopeConfig(
        kind="yarn", factor=2.0, original_max_position=256, beta_fast=32.0, beta_slow=1.0, truncate=True
    )
    by_length = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}
    assert rope_of(by_length).factor == 4.0
    with pytest.raises(ValueError, match=r"missing required keys: rope_scaling\.factor"):
        rope_of({"rope_type": "yarn"})


def test_top_level_original_length_wins():
    section = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    assert rope_of(section, original_max_position_embeddings=128).original_max_position == 128


def test_yarn_raises_the_context_to_what_it_stretches_to():
    section = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert read(tiny_config(rope_scaling=section)).max_context == 1024


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": 1e6}, 1e6),
        ({"rope_scaling": YARN, "rope_theta": 1e6}, 1e6),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6),
        ({"rope_scaling": YARN, "rope_parameters": {"type": "default", "rope_theta": 1e6}}, 1e6),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e6}}, 1e6),
        ({"rope_scaling": YARN | {"rope_theta": 1e6}, "rope_parameters": {"rope_type": "default"}}, 1e6),
        ({"rope_scaling": YARN, "rope_parameters": YARN | {"rope_theta": 1e6}, "rope_theta": 1e6}, 1e6),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1000000}, 1e6),
        ({"rope_parameters": {"rope_theta": None}, "rope_theta": 1e6}, 1e6),
        ({"rope_parameters": {"rope_theta": 1e6}} | {"rope_scaling": None}, 1e6),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {}}, 1e6),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, 1e6),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": None}}, 1e6),
        ({"rope_parameters": {f"{kind}_attention": {"rope_theta": 1e6} for kind in ("full", "sliding")}}, 1e6),
    ],
)
def test_the_base_is_found_wherever_it_stands(changes: dict[str, Any], theta: float):
    rope = read({**tiny_config(rope_theta=None), **changes}).rope
    assert rope.theta == theta
    assert rope.kind == ("yarn" if changes.get("rope_scaling") else "default")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4},
            r"rope_parameters\.rope_theta 1000000\.0 and rope_theta 10000\.0 differ; remove the wrong one",
        ),
        (
            {"rope_scaling": YARN | {"rope_theta": 5e5}, "rope_theta": 1e4},
            "rope_scaling.rope_theta 500000.0 and rope_t",
        ),
        (
            {"rope_scaling": YARN | {"rope_theta": 5e5}, "rope_parameters": {"rope_theta": 1e6}},
            r"rope_scaling\.rope_theta 500000\.0 and rope_parameters\.rope_theta 1000000\.0 differ",
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}},
            r"rope_scaling\.factor 4\.0 and rope_parameters\.factor 2\.0 differ",
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            r"rope_scaling\.rope_type 'yarn' and rope_parameters\.rope_type 'linear' differ",
        ),
        (
            {"rope_scaling": {"rope_type": "default"}, "rope_parameters": YARN},
            r"rope_scaling\.rope_type 'default' and rope_parameters\.rope_type 'yarn' differ",
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}},
            r"rope_scaling\.type 'linear' and rope_scaling\.rope_type 'yarn' differ",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "type": "default", "factor": 4.0}},
            r"rope_parameters\.rope_type 'yarn' and rope_parameters\.type 'default' differ",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            "a RoPE for each layer type is not supported, only one for all layers; got rope_parameters.full_attention",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}, "rope_theta": 1e4},
            r"rope_parameters\.full_attention\.rope_theta 1000000\.0 and rope_theta 10000\.0 differ",
        ),
        ({"rope_parameters": {"full_attention": 1e6}}, "a RoPE for each layer type is not supported"),
        ({"rope_scaling": {"factor": 4.0}}, r"rope_scaling\.factor 4\.0 needs a rope_type: linear, llama3, yarn"),
        (
            {"rope_parameters": {"rope_type": "default", "factor": 4.0}},
            r"rope_parameters\.factor 4\.0 needs a rope_type",
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_theta": "1e6"}},
            r"rope_parameters\.rope_theta must be a pos",
        ),
        (
            {"rope_scaling": YARN | {"mrope_section": [1, 1]}},
            r"'rope_scaling\.mrope_section' \[1, 1\] is not supported",
        ),
        ({"rope_scaling": YARN | {"a\nb": 1}}, r"'rope_scaling\.a\\nb' 1 is not supported"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 1.0},
            r"rope_parameters\.partial_rotary_factor 0\.5 and partial_rotary_factor 1\.0 differ",
        ),
    ],
)
def test_places_that_disagree_about_rope_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=r"^folder/config\.json: .*" + message):
        read(tiny_config(rope_theta=None) | changes)


def test_whole_floats_are_integers():
    exact = tiny_config(rope_scaling=YARN, eos_token_id=[2, 3])
    floats = {key: float(value) if type(value) is int else value for key, value in exact.items()}
    floats |= {"rope_scaling": YARN | {"original_max_position_embeddings": 256.0}, "eos_token_id": [2.0, 3.0]}
    config = read(floats)
    assert config == read(exact)
    assert all(type(size) is int for size in (config.num_heads, config.head_dim, config.bos_token_id))
    assert read(tiny_config(), eos_token_id=7.0).eos_token_ids == (7,)
    windowed = tiny_config("qwen2", sliding_window=64.0, use_sliding_window=True, max_window_layers=2.0)
    assert read(windowed).max_context == 64


@pytest.mark.parametrize("value", [32.5, "32", float("inf"), float("nan"), -32.0, 0.0, 2.0**31, True, [32]])
def test_what_is_no_whole_number_is_no_size(value: object):
    with pytest.raises(InputError, match="hidden_size must be a positive integer, got ") as caught:
        read(tiny_config() | {"hidden_size": value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [2.5, "2", -1.0, float("inf"), [2, None]])
def test_what_is_no_whole_number_is_no_token(value: object):
    with pytest.raises(InputError, match="eos_token_id must be a token id or a list of them"):
        read(tiny_config() | {"eos_token_id": value})


def test_zeros_of_yarn_count_as_absent_where_they_do_in_transformers():
    zeros = {"mscale": 0, "mscale_all_dim": 0.0, "beta_fast": 0, "beta_slow": 0}
    assert rope_of(YARN | zeros) == rope_of(YARN)
    assert rope_of(YARN | {"mscale": 0.7, "mscale_all_dim": 0}).mscale_all_dim is None
    with pytest.raises(InputError, match=r"rope_scaling\.attention_factor must be a positive number, got 0"):
        rope_of(YARN | {"attention_factor": 0})
    with pytest.raises(InputError, match=r"rope_scaling\.mscale must be a positive number, got False"):
        rope_of(YARN | {"mscale": False})


def test_values_without_end_are_cut_in_messages():
    with pytest.raises(InputError) as caught:
        read(tiny_config() | {"head_dim": [1] * 1000, "rope_scaling": ["x"] * 1000, "hidden_act": "x" * 1000})
    assert len(str(caught.value)) < 500


def test_windows_from_the_first_layer_on():
    changes = {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}
    assert read(tiny_config("qwen2", **changes)).max_context == 64


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope"])
def test_unknown_rope_kind_is_named_with_the_known_ones(kind: str):
    with pytest.raises(
        ValueError, match=f"RoPE kind '{kind}' is not supported; known kinds: default, linear, llama3, yarn"
    ):
        rope_of({"rope_type": kind, "factor": 2.0})


@pytest.mark.parametrize(
    ("model_type", "changes", "context"),
    [
        ("llama", {"sliding_window": 64}, 256),
        ("mistral", {"sliding_window": None}, 256),
        ("mistral", {"sliding_window": 64}, 64),
        ("mistral", {"sliding_window": 512}, 256),
        ("qwen2", {"sliding_window": 64}, 256),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3}, 256),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, 64),
        ("qwen3", {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention"] * 3}, 256),
        ("qwen3", {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}, 64),
    ],
)
def test_context_ends_at_an_active_sliding_window(model_type: str, changes: dict[str, Any], context: int):
    assert read(tiny_config(model_type, **changes)).max_context == context


def test_absent_window_of_mistral_is_transformers_default():
    config = tiny_config("mistral", max_position_embeddings=32768)
    del config["sliding_window"]
    assert read(config).max_context == 4096


def test_end_tokens_come_as_number_or_list_and_the_generation_config_wins():
    assert read(tiny_config(eos_token_id=[5, 6, 5])).eos_token_ids == (5, 6)
    assert read(tiny_config(), eos_token_id=[7, 8]).eos_token_ids == (7, 8)
    assert read(tiny_config(), eos_token_id=None).eos_token_ids == (2,)
    assert read(tiny_config("qwen2", eos_token_id=None, bos_token_id=None)).eos_token_ids == ()


def test_all_missing_keys_are_named_in_one_line():
    config = tiny_config(hidden_size=None, vocab_size=None, rms_norm_eps=None)
    with pytest.raises(ValueError, match=r"^folder/config\.json: missing required keys: [^;]*$") as caught:
        read(config)
    assert {"hidden_size", "vocab_size", "rms_norm_eps"} <= set(str(caught.value).replace(",", "").split())


def test_missing_keys_wrong_types_and_unknown_features_are_reported_together():
    config = tiny_config(hidden_size="32", vocab_size=None, hidden_act="gelu", rope_scaling={"type": "dynamic"})
    with pytest.raises(ValueError, match=r"vocab_size.*hidden_size must be a positive integer.*'dynamic'.*'gelu'"):
        read(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, r"num_kv_heads \(4\) must divide num_heads \(6\)"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"head_dim": None}, r"num_attention_heads \(6\) must divide hidden_size \(32\)"),
        ({"eos_token_id": False}, "eos_token_id must be a token id or a list"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, got True"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not one of bfloat16, float16, float32"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is not supported, only 'silu'"),
        ({"quantization": {"bits": 4}}, r"quantization \(\{'bits': 4\}\) is not supported; use an unquantised"),
        ({"hidden_activation": "gelu_tanh"}, "hidden_activation 'gelu_tanh' is not supported, only 'silu'"),
        ({"logits_scaling": 8.0}, "logits_scaling 8.0 is not supported, only 1"),
        ({"attention_multiplier": 0.01}, "attention_multiplier 0.01 is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported, only 0"),
        ({"num_local_experts": 8}, "num_local_experts 8 is not supported, only 0"),
        ({"is_causal": False}, "is_causal False is not supported, only True"),
        ({"rope_traditional": True}, "rope_traditional True is not supported, only False"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention, but no sliding window applies"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2}}, r"rope_scaling\.factor must be a positive number"),
        ({"rope_scaling": 4.0}, "rope_scaling must be a mapping"),
        (
            {"layer_types": ["full_attention", "chunked_attention"]},
            r"layer_types \['full_attention', 'chunked_attention'\]",
        ),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers must be a positive integer, got 2147483648"),
    ],
)
def test_what_a_config_cannot_have_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=r"^folder/config\.json: .*" + message):
        read(tiny_config(**changes))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("yarn"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(ROPE_KEYS), inner, max_size=4),
    max_leaves=8,
)


@given(model_type=st.sampled_from(list(ARCHITECTURES)), changes=st.dictionaries(st.sampled_from(CONFIG_KEYS), JSON))
def test_any_json_is_read_or_refused_in_one_line(model_type: str, changes: dict[str, Any]):
    message = "name: "
    try:
        config = read_hf(tiny_config(model_type) | changes, source="name", generation_config=changes)
        assert hash(config) is not None
        assert 0 < config.max_context < 2**31
    except ValueError as error:
        message = str(error)
    assert message.startswith("name: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "dynamic"}, "RoPE kind 'dynamic'"),
        ({"theta": 0.0}, "RoPE theta must be a positive number"),
        ({"kind": "llama3"}, "original_max_position must be a positive integer for llama3"),
        ({"kind": "llama3", "original_max_position": 64, "low_freq_factor": 4.0}, "low_freq_factor must be below"),
    ],
)
def test_rope_config_checks_itself(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**fields)


def test_model_config_checks_itself_and_names_every_problem():
    good = read(tiny_config())
    with pytest.raises(ValueError, match=r"vocab_size must be.*rms_norm_eps must.*dtype must"):
        dataclasses.replace(good, vocab_size=0, rms_norm_eps=2.0, dtype="int8")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As published with the checkpoints (of Minitron only "4.51 billion").
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3-8b", 8_030_261_248),
        ("llama-2-7b", 6_738_415_616),
        ("mistral-7b-v0.3", 7_248_023_552),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("llama-3.1-minitron-4b-width", 4_512_746_496),
    ],
)
def test_known_models_have_their_published_number_of_parameters(name: str, parameters: int):
    config = read_hf(known_configs()[name], source=name)
    assert sum(tensor.size for tensor in expected_tensors(config)) == parameters


def test_every_known_model_is_tested():
    assert len(known_configs()) == 7
