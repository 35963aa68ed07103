"""Presets, their overrides, and every refusal of `AttentionConfig`."""

import dataclasses
import math
import re
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from lserve_jax.config.attention import KV_DTYPES, PRESETS, AttentionConfig, from_preset
from pallas_kernels import PagedKV, page_select


def test_presets_differ_from_the_defaults_in_what_makes_each_system():
    default = AttentionConfig()
    assert from_preset("lserve") == default
    assert (default.token_budget, default.page_size, default.sub_page_size) == (4096, 64, 16)
    assert (default.selector_interval, default.sink, default.local) == (1, 128, 256)
    assert (default.static_sparsity, default.dense_layers, default.kv_dtype) == (0.5, (), "auto")
    expected: dict[str, dict[str, Any]] = {
        "dense": {"token_budget": None, "static_sparsity": 0.0},
        "streaming": {"token_budget": None},
        "quest": {
            "static_sparsity": 0.0,
            "page_size": 16,
            "selector_interval": 1,
            "selector_spread": 1.0,
            "selector_memory": 0.0,
            "dense_layers": (0, 1),
        },
        "qserve": {"token_budget": None, "static_sparsity": 0.0, "kv_dtype": "int4"},
        "minference": {
            "token_budget": None,
            "static_sparsity": 0.0,
            "prefill_sparsity": "blocks",
            "prefill_from": 0,
            "prefill_block": 64,
            "prefill_last": 0,
            "prefill_first_layer": 0,
            "is_prefill_corrected": False,
        },
    }
    assert set(PRESETS) == {"lserve", *expected}
    for preset, fields in expected.items():
        assert from_preset(preset) == dataclasses.replace(default, preset=preset, **fields)


def test_quest_is_flat_a_page_is_one_sub_page():
    quest = from_preset("quest")
    assert quest.page_size == quest.sub_page_size


@pytest.mark.parametrize("preset", PRESETS)
def test_overrides_replace_fields_and_none_keeps_the_preset(preset: str):
    config = from_preset(preset, sink=32, token_budget=2048, kv_dtype=None, local=None)
    assert (config.preset, config.sink, config.token_budget) == (preset, 32, 2048)
    assert (config.kv_dtype, config.local) == (from_preset(preset).kv_dtype, 256)


@pytest.mark.parametrize("preset", PRESETS)
def test_all_lifts_the_budget_of_a_preset_and_none_does_not(preset: str):
    assert from_preset(preset, token_budget="all") == dataclasses.replace(from_preset(preset), token_budget=None)
    assert from_preset(preset, token_budget=None) == from_preset(preset)
    assert from_preset("lserve", of_model={"token_budget": "all"}).num_selected is None
    with pytest.raises(ValueError, match="token_budget='every' must be a whole number from 1"):
        from_preset(preset, token_budget="every")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("budget", [None, "all", 512])
def test_the_options_of_a_configuration_make_it_again(preset: str, budget: int | str | None):
    config = from_preset(preset, token_budget=budget, of_model={"sink": 16})
    assert from_preset(preset, **config.options()) == config


def test_zero_is_an_override_and_not_a_missing_value():
    config = from_preset("quest", static_sparsity=0, sink=0, dense_layers=())
    assert (config.static_sparsity, config.sink, config.dense_layers) == (0.0, 0, ())


@pytest.mark.parametrize(
    ("budget", "pages"),
    [
        (48, (16, 2)),
        (511, (16, 2)),
        (512, (16, 4)),
        (2047, (16, 4)),
        (2048, (32, 8)),
        (4095, (32, 8)),
        (4096, (64, 16)),
        (100_000, (64, 16)),
        (None, (64, 16)),
    ],
)
def test_small_budgets_have_small_pages_unless_a_page_size_is_named(budget: int | None, pages: tuple[int, int]):
    config = from_preset("lserve", token_budget=budget)
    assert (config.page_size, config.sub_page_size) == (pages if budget else (64, 16))
    for name, size in (("page_size", 64), ("sub_page_size", 16)):
        named: dict[str, Any] = {name: size}
        config = from_preset("lserve", token_budget=budget and max(budget, 192), **named)
        assert (config.page_size, config.sub_page_size) == (64, 16)
    quest = from_preset("quest", token_budget=budget)
    assert (quest.page_size, quest.sub_page_size) == (16, 16)


def test_what_suits_a_model_lies_between_the_preset_and_what_is_named():
    of_model = {"sink": 64, "prefill_local": 256, "dense_layers": [7], "page_size": 32}
    config = from_preset("lserve", of_model=of_model, sink=16, token_budget=512)
    assert (config.sink, config.prefill_local, config.dense_layers, config.page_size) == (16, 256, (7,), 32)
    assert from_preset("streaming", of_model=of_model).prefill_local == 256
    for preset in ("dense", "quest", "qserve"):
        assert from_preset(preset, of_model=of_model) == from_preset(preset)
    assert from_preset("lserve", of_model={"dense_layers": None}) == from_preset("lserve")
    with pytest.raises(ValueError, match="unknown attention option window"):
        from_preset("lserve", of_model={"window": 3})


def test_one_dense_layer_may_be_a_bare_number():
    assert from_preset("lserve", dense_layers=7) == from_preset("lserve", dense_layers=[7])


@pytest.mark.parametrize("dtype", ["auto", *KV_DTYPES])
def test_every_kv_dtype_is_accepted(dtype: str):
    assert from_preset("lserve", kv_dtype=dtype).kv_dtype == dtype


def test_values_of_other_number_types_and_lists_become_plain_hashable_values():
    values = {"page_size": np.int64(32), "sink": np.int32(64), "static_sparsity": np.float32(0.25)}
    config = from_preset("lserve", **values, dense_layers=[0, np.int8(2)])
    plain = AttentionConfig(page_size=32, sink=64, static_sparsity=0.25, dense_layers=(0, 2))
    assert config == plain
    assert hash(config) == hash(plain)
    assert [type(config.page_size), type(config.sink), type(config.static_sparsity)] == [int, int, float]
    assert jax.jit(lambda policy: policy.sink, static_argnums=0)(config) == 64


@pytest.mark.parametrize(
    ("sink", "page_size", "interval", "expected"),
    [
        (128, 64, 4, 1 + 2),  # the last 4 tokens lie in 2 pages at most
        (128, 64, 1, 1 + 1),
        (0, 64, 4, 0 + 2),
        (129, 64, 4, 1 + 2),
        (128, 64, 65, 1 + 2),  # 65 tokens in pages of 64: 2 pages at most, 66 tokens: 3
        (128, 64, 66, 1 + 3),
        (1, 1, 4, 1 + 4),
    ],
)
def test_forced_pages_are_the_first_and_those_of_the_newest_tokens(
    sink: int, page_size: int, interval: int, expected: int
):
    common: dict[str, Any] = {"sink": sink, "page_size": page_size, "sub_page_size": 1, "selector_interval": interval}
    config = AttentionConfig(token_budget=expected * page_size, **common)
    assert config.forced_pages == expected
    positions = range(sink + 3 * page_size, sink + 5 * page_size)
    newest = {len({at // page_size for at in range(last - interval + 1, last + 1)}) for last in positions}
    assert config.forced_pages == min(sink, 1) + max(newest)
    with pytest.raises(ValueError, match=rf"token_budget={expected * page_size - 1} must be at least"):
        AttentionConfig(token_budget=expected * page_size - 1, **common)


def test_a_sink_that_is_not_forced_needs_no_budget():
    config = AttentionConfig(is_sink_forced=False, token_budget=64)
    assert (config.sink_pages, config.forced_pages, config.num_selected) == (0, 1, 1)


def test_a_budget_is_counted_in_whole_pages():
    assert AttentionConfig(token_budget=4096).num_selected == 64
    assert AttentionConfig(token_budget=4095).num_selected == 63
    assert AttentionConfig(token_budget=None).num_selected is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({name: 0}, f"{name}=0 must be a whole number from 1") for name in ("page_size", "sub_page_size", "local")),
        ({"selector_interval": 0}, "selector_interval=0 must be a whole number from 1"),
        ({"prefill_local": -5}, "prefill_local=-5 must be a whole number from 1"),
        ({"sink": -1}, "sink=-1 must be a whole number from 0"),
        ({"page_size": 64.0}, "page_size=64.0 must be a whole number from 1"),
        ({"page_size": "64"}, "page_size='64' must be a whole number from 1"),
        ({"page_size": True}, "page_size=True must be a whole number from 1"),
        ({"page_size": 60}, "page_size=60 must be a multiple of sub_page_size=16"),
        ({"sub_page_size": 128}, "page_size=64 must be a multiple of sub_page_size=128"),
        ({"token_budget": 0}, "token_budget=0 must be a whole number from 1"),
        ({"token_budget": -64}, "token_budget=-64 must be a whole number from 1"),
        ({"token_budget": 4096.5}, "token_budget=4096.5 must be a whole number from 1"),
        (
            {"token_budget": 127, "page_size": 64},
            "token_budget=127 must be at least 128: the 2 pages of 64 tokens with the first and the newest tokens are",
        ),
        ({"token_budget": 31}, "token_budget=31 must be at least 32: the 2 pages of 16 tokens"),
        ({"selector_interval": 4096}, "token_budget=4096 must be at least 4224: the 66 pages of 64 tokens"),
        ({"static_sparsity": -0.1}, "static_sparsity=-0.1 must be a number from 0 to 1"),
        ({"static_sparsity": 1.01}, "static_sparsity=1.01 must be a number from 0 to 1"),
        ({"static_sparsity": math.nan}, "static_sparsity=nan must be a number from 0 to 1"),
        ({"selector_memory": 1.5}, "selector_memory=1.5 must be a number from 0 to 1"),
        ({"selector": "best"}, "selector='best' must be one of bound, mean_key, oracle, random"),
        ({"static_sparsity": "half"}, "static_sparsity='half' must be a number from 0 to 1"),
        ({"dense_layers": (0, -1)}, "dense_layers=-1 must be a whole number from 0"),
        ({"dense_layers": ("0",)}, "dense_layers='0' must be a whole number from 0"),
        ({"kv_dtype": "fp8"}, "kv_dtype='fp8' must be auto or one of bfloat16, float32, int8, int4"),
        ({"group_reduction": "sum"}, 'group_reduction=\'sum\' must be "max" or "mean"'),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_one_line(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        from_preset("lserve", **fields)
    assert "\n" not in str(error.value)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    message = "attention='sparse' must be one of lserve, dense, streaming, quest, qserve, minference"
    with pytest.raises(ValueError, match=re.escape(message)):
        from_preset("sparse")


def test_unknown_options_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^unknown attention option budget, window; known are budget_cap, .*sink"):
        from_preset("lserve", window=3, budget=None)
    with pytest.raises(ValueError, match="unknown attention option preset"):
        from_preset("lserve", preset="dense")


@pytest.mark.parametrize("page_size", [1, 8, 64])
@pytest.mark.parametrize("interval", [1, 4, 9])
@pytest.mark.parametrize("sink", [0, 20])
def test_the_pages_that_are_always_read_are_those_of_the_op(page_size: int, interval: int, sink: int):
    """The check stands in both: this side imports no jax, and the op knows nothing of this side."""
    config = AttentionConfig(
        token_budget=None, page_size=page_size, sub_page_size=page_size, selector_interval=interval, sink=sink
    )
    page, bounds = np.zeros((1, 1, page_size, 4), np.float32), np.zeros((1, 1, 1, 4), np.float32)
    lengths = np.zeros(1, np.int32)
    arrays: Any = (None, PagedKV(page, page, bounds, bounds), None, lengths, None, None)  # type: ignore[arg-type]
    select = partial(page_select, *arrays, interval=interval, sink_pages=config.sink_pages, implementation="nobody")
    with pytest.raises(ValueError, match="must be at least"):
        select(num_selected=config.forced_pages - 1)
    with pytest.raises(ValueError, match="implementation='nobody'"):
        select(num_selected=config.forced_pages)
