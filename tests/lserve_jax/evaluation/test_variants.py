"""Variants as the command line writes them, and the policies that they stand for."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from lserve_jax import from_preset
from lserve_jax.config.heads import HeadPattern
from lserve_jax.evaluation import ablations
from lserve_jax.evaluation.variants import change, parse_variant, parse_variants


def test_variants_are_split_at_commas_that_no_list_holds():
    text = "dense, quest:dense_layers=0,1,lserve:sink=64+dense_layers=2,3+kv_dtype=int8,streaming"
    labels = ["dense", "quest:dense_layers=0,1", "lserve:sink=64+dense_layers=2,3+kv_dtype=int8", "streaming"]
    variants = parse_variants(text)
    assert [variant.label for variant in variants] == labels
    assert variants[2].config(1024) == from_preset("lserve", sink=64, dense_layers=(2, 3), kv_dtype="int8")


def test_every_field_of_the_policy_can_be_written():
    text = (
        "lserve:token_budget=512+page_size=32+sub_page_size=8+selector_interval=2+sink=32+local=64+prefill_local=128"
        "+static_sparsity=0.75+dense_layers=0+kv_dtype=int4+is_sink_forced=false+group_reduction=mean"
        "+weight_dtype=int8+head_pattern=a+b"
    )
    variant = parse_variant(text)
    assert variant.weight_dtype == "int8"
    assert variant.head_pattern == "a+b"  # a plus is a plus where no field follows
    config = variant.config(4096)
    assert (config.token_budget, config.page_size, config.static_sparsity) == (512, 32, 0.75)
    assert (config.dense_layers, config.is_sink_forced, config.group_reduction) == ((0,), False, "mean")


@pytest.mark.parametrize(
    ("text", "length", "budget"),
    [
        ("lserve:token_budget=25%", 4096, 1024),
        ("lserve:token_budget=25%", 4097, 1040),  # whole pages, rounded up
        ("lserve:token_budget=25%", 1000, 256),
        ("lserve:token_budget=10%+page_size=64", 1000, 128),  # the first page and the newest are always read
        ("lserve:token_budget=12.5%+page_size=16+sink=16", 1024, 128),
        ("dense:token_budget=100%", 1024, 1024),
        ("lserve:token_budget=512", 100_000, 512),
        ("lserve:token_budget=all", 100_000, None),
    ],
)
def test_a_budget_may_be_a_share_of_the_length(text: str, length: int, budget: int | None):
    assert parse_variant(text).config(length).token_budget == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vllm", "variant 'vllm': the preset 'vllm' must be one of lserve, dense"),
        ("", "the preset '' must be one of"),
        ("dense,,lserve", "variant 'dense,': the preset"),
        ("lserve:", "unknown field ''"),
        ("lserve:window=3", "variant 'lserve:window=3': unknown field 'window'; known are token_budget, budget_share"),
        ("lserve:preset=dense", "unknown field 'preset'"),
        ("lserve:sink=64+sink=32", "sink is given twice"),
        ("lserve:sink", "variant 'lserve:sink': sink= must be a whole number"),
        ("lserve:sink=many", "sink=many must be a whole number"),
        ("lserve:token_budget=0%", "token_budget=0% must be a whole number, or a share"),
        ("lserve:token_budget=120%", "token_budget=120% must be"),
        ("lserve:token_budget=x%", "token_budget=x% must be"),
        ("lserve:token_budget=most", "token_budget=most must be a whole number, or a share of the prompt"),
        ("lserve:is_sink_forced=maybe", "is_sink_forced=maybe must be true or false"),
        ("lserve:dense_layers=a", "dense_layers=a must be layer numbers with commas between, such as 0,1"),
        ("lserve:dense_layers=0,,1", "dense_layers=0,,1 must be layer numbers with commas between, such as 0,1"),
        ("lserve:dense_layers=0,", "variant 'lserve:dense_layers=0,': dense_layers=0, must be layer numbers"),
        ("lserve:dense_layers=,", "dense_layers=, must be layer numbers"),
        ("dense,lserve,dense", "variant 'dense' is named twice"),
        ("dense:weight_dtype=int3", "weight_dtype=int3 must be one of auto, bfloat16, float32, int8, int4"),
        ("dense:weight_dtype=", "weight_dtype= must be one of auto"),
        ("dense:weight_dtype=int8+weight_dtype=int8", "weight_dtype is given twice"),
    ],
)
def test_what_is_no_variant_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_variants(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lserve:token_budget=16", "variant 'lserve:token_budget=16': token_budget=16 must be at least 32"),
        ("lserve:page_size=40", "variant 'lserve:page_size=40': page_size=40 must be a multiple of sub_page_size=16"),
        ("lserve:static_sparsity=2+token_budget=5%", "static_sparsity=2.0 must be a number from 0 to 1"),
    ],
)
def test_a_policy_that_cannot_be_is_refused_by_the_variants_name(text: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_variant(text).config(1024)


def test_a_change_replaces_fields_or_leaves_the_variant_itself():
    base = parse_variant("lserve:token_budget=25%+sink=64")
    assert change(base, "sink=64") is base
    assert change(base, "token_budget=25%") is base
    assert change(base, "kv_dtype=auto") is base  # the preset's own
    assert change(base, "page_size=64+sub_page_size=16") is not base  # those of the base follow from the budget
    named = parse_variant("lserve:page_size=64+sub_page_size=16")
    assert change(named, "page_size=64+sub_page_size=16") is named
    assert change(parse_variant("dense"), "token_budget=all") == parse_variant("dense")
    assert change(base, "token_budget=all").config(4096).token_budget is None
    assert change(base, "sink=128+local=64").label == "lserve:token_budget=25%+sink=128+local=64"


def test_the_form_of_the_weights_is_a_field_like_others_and_is_that_of_the_run_where_none_is_named():
    base = dataclasses.replace(parse_variant("dense"), weight_dtype="bfloat16")  # as a run fills it in
    assert change(base, "weight_dtype=bfloat16") is base
    narrow = change(base, "weight_dtype=int8")
    assert (narrow.label, narrow.weight_dtype, narrow.options) == ("dense:weight_dtype=int8", "int8", {})
    assert change(narrow, "weight_dtype=int8") is narrow
    assert change(narrow, "sink=16").weight_dtype == "int8"
    assert change(base, "sink=16").weight_dtype == "bfloat16"
    assert change(narrow, "weight_dtype=int4+sink=16").label == "dense:weight_dtype=int4+sink=16"
    assert narrow.config(1024) == base.config(1024)
    assert narrow.arguments(narrow.config(1024))["weight_dtype"] == "int8"
    assert base.arguments(base.config(1024))["weight_dtype"] == "bfloat16"


def test_each_axis_of_the_ablation_holds_the_base_and_every_setting_can_be():
    base = dataclasses.replace(parse_variant(ablations.BASE), weight_dtype="bfloat16")
    found = ablations.settings(base, ablations.AXES, num_layers=3)
    assert {setting.axis for setting in found} == set(ablations.AXES)
    for axis in ablations.AXES:
        labels = [setting.variant.label for setting in found if setting.axis == axis]
        assert labels.count(ablations.BASE) == 1
        assert len(set(labels)) == len(labels)
    for setting in found:
        setting.variant.config(1024)


def test_a_base_that_is_the_reference_stands_once_in_the_table_of_an_axis():
    base = dataclasses.replace(parse_variant("dense"), weight_dtype="int8")
    found = ablations.settings(base, ["weight_dtype"], num_layers=1)
    cells: list[Any] = [
        {"task": "copy", "length": 9, "variant": label, "is_reference": label == "dense"}
        for label in ("dense", "dense:weight_dtype=int4")
    ]
    rows = ablations.by_axis(found, cells)["weight_dtype"]
    assert [row["variant"] for row in rows] == ["weight_dtype=int8", "weight_dtype=int4"]


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="ablation 'color' must be one of page, budget, selector, interval"):
        ablations.settings(parse_variant(ablations.BASE), ["color"], num_layers=3)


def test_one_layer_at_a_time_may_read_everything():
    found = ablations.settings(parse_variant(ablations.BASE), ["dense_layer"], num_layers=3)
    assert [setting.variant.config(2048).dense_layers for setting in found] == [(), (0,), (1,), (2,)]


def test_what_suits_a_model_is_the_default_of_each_variant_and_of_its_changes(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"attention": {"sink": 16, "dense_layers": [1]}}')
    pattern = HeadPattern(folder=tmp_path, shape=(2, 2), origin="a test")
    base = dataclasses.replace(parse_variant("lserve:token_budget=25%"), pattern=pattern)
    assert (base.config(2048).sink, base.config(2048).dense_layers) == (16, (1,))
    assert change(base, "sink=16") is base
    assert change(base, "sink=128").config(2048).sink == 128
    assert change(base, "local=64").config(2048).dense_layers == (1,)


def test_a_share_of_a_short_prompt_has_small_pages_unless_they_are_named():
    variant = parse_variant("lserve:token_budget=25%")
    assert [variant.config(length).page_size for length in (1024, 8188, 8192, 16384)] == [16, 16, 32, 64]
    assert parse_variant("lserve:token_budget=25%+page_size=64").config(1024).page_size == 64
