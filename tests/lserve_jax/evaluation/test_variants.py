"""Variants as the command line writes them, and the policies that they stand for."""

import re

import pytest

from lserve_jax import from_preset
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
        "+static_sparsity=0.75+dense_layers=0+kv_dtype=int4+is_sink_forced=false+group_reduction=mean+head_pattern=a+b"
    )
    variant = parse_variant(text)
    assert variant.head_pattern == "a+b"  # a plus is a plus where no field follows
    config = variant.config(4096)
    assert (config.token_budget, config.page_size, config.static_sparsity) == (512, 32, 0.75)
    assert (config.dense_layers, config.is_sink_forced, config.group_reduction) == ((0,), False, "mean")


@pytest.mark.parametrize(
    ("text", "length", "budget"),
    [
        ("lserve:token_budget=25%", 4096, 1024),
        ("lserve:token_budget=25%", 4097, 1088),  # whole pages, rounded up
        ("lserve:token_budget=25%", 1000, 256),
        ("lserve:token_budget=10%", 1000, 256),  # sink, newest page and the one before are always read
        ("lserve:token_budget=12.5%+page_size=16+sink=16", 1024, 128),
        ("dense:token_budget=100%", 1024, 1024),
        ("lserve:token_budget=512", 100_000, 512),
    ],
)
def test_a_budget_may_be_a_share_of_the_length(text: str, length: int, budget: int):
    assert parse_variant(text).config(length).token_budget == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vllm", "variant 'vllm': the preset 'vllm' must be one of lserve, dense"),
        ("", "the preset '' must be one of"),
        ("dense,,lserve", "variant 'dense,': the preset"),
        ("lserve:", "unknown field ''"),
        ("lserve:window=3", "variant 'lserve:window=3': unknown field 'window'; known are token_budget, page_size"),
        ("lserve:preset=dense", "unknown field 'preset'"),
        ("lserve:sink=64+sink=32", "sink is given twice"),
        ("lserve:sink", "variant 'lserve:sink': sink= must be a whole number"),
        ("lserve:sink=many", "sink=many must be a whole number"),
        ("lserve:token_budget=0%", "token_budget=0% must be a whole number, or a share"),
        ("lserve:token_budget=120%", "token_budget=120% must be"),
        ("lserve:token_budget=x%", "token_budget=x% must be"),
        ("lserve:is_sink_forced=maybe", "is_sink_forced=maybe must be true or false"),
        ("lserve:dense_layers=a", "dense_layers=a must be layer numbers such as 0,1"),
        ("dense,lserve,dense", "variant 'dense' is named twice"),
    ],
)
def test_what_is_no_variant_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_variants(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lserve:token_budget=64", "variant 'lserve:token_budget=64': token_budget=64 must be at least 256"),
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
    assert change(base, "page_size=64+sub_page_size=16") is base  # the preset's own
    assert change(base, "sink=128+local=64").label == "lserve:token_budget=25%+sink=128+local=64"


def test_each_axis_of_the_ablation_holds_the_base_and_every_setting_can_be():
    found = ablations.settings(ablations.BASE, ablations.AXES)
    assert {setting.axis for setting in found} == set(ablations.AXES)
    for axis in ablations.AXES:
        labels = [setting.variant.label for setting in found if setting.axis == axis]
        assert labels.count(ablations.BASE) == 1
        assert len(set(labels)) == len(labels)
    for setting in found:
        setting.variant.config(1024)


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="ablation 'color' must be one of page, budget, interval"):
        ablations.settings(ablations.BASE, ["color"])
