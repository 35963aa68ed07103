from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lserve_jax.config.heads import HeadClasses, classify, load_gates, load_settings

# model: (layers, KV heads, retrieval heads of the first layers at a static sparsity of 0.5). The counts of the first
# two were published; those of the others follow from gate >= median, as no head of these layers ties at the median.
PUBLISHED = {
    "Llama-2-7B-32K-Instruct": (32, 32, (12, 21, 4, 10)),
    "Llama-3-8B-Instruct-Gradient-1048k": (32, 8, (1, 1, 3, 2, 2, 4)),
    "Llama-3-8B-Instruct-Gradient-4194k": (32, 8, (2, 1, 3, 0, 2, 5)),
    "Meta-Llama-3.1-8B-Instruct": (32, 8, (2, 3, 4, 1, 4, 2)),
    "Mistral-7B-Instruct-v0.2": (32, 8, (3, 4, 6, 2, 4, 1)),
    "Mistral-7B-Instruct-v0.3": (32, 8, (2, 3, 5, 2, 3, 4)),
}
# Few distinct values, so that most examples have ties at the threshold.
GATES = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 6), st.integers(1, 9)),
    elements=st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]),
)
SPARSITIES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))


def write_gates(folder: Path, text: str) -> Path:
    (folder / "full_attention_heads.tsv").write_text(text)
    return folder


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_pattern_loads_and_gives_the_published_counts(shared_patterns: Path, model: str):
    num_layers, num_kv_heads, first_counts = PUBLISHED[model]
    gates = load_gates(shared_patterns / model, num_layers, num_kv_heads)
    assert gates.shape == (num_layers, num_kv_heads)
    assert gates.dtype == np.float64
    assert gates.min() == 0.0
    assert gates.max() == 1.0
    heads = classify(gates, 0.5)
    assert heads.num_retrieval[: len(first_counts)] == first_counts
    assert sum(heads.num_retrieval) == gates.size // 2


@pytest.mark.parametrize("model", PUBLISHED)
def test_heads_clearly_on_one_side_of_the_published_threshold_are_classed_by_it(shared_patterns: Path, model: str):
    gates = load_gates(shared_patterns / model, *PUBLISHED[model][:2])
    for sparsity in (0.25, 0.5, 0.75):
        threshold = np.quantile(gates, sparsity)
        for row, order, count in zip(gates, *class_fields(classify(gates, sparsity)), strict=True):
            assert (row[list(order[:count])] >= threshold).all()
            assert (row[list(order[count:])] <= threshold).all()


def test_layers_of_one_published_pattern_reach_both_extremes(shared_patterns: Path):
    gates = load_gates(shared_patterns / "Mistral-7B-Instruct-v0.2", 32, 8)
    heads = classify(gates, 0.75)
    assert sum(heads.num_retrieval) == 64
    assert min(heads.num_retrieval) == 0
    assert max(classify(load_gates(shared_patterns / "Meta-Llama-3.1-8B-Instruct", 32, 8), 0.5).num_retrieval) == 8


def class_fields(heads: HeadClasses) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    return heads.order, heads.num_retrieval


@given(GATES, SPARSITIES)
def test_exactly_the_rounded_share_of_the_lowest_gates_stream(gates: np.ndarray, sparsity: float):
    heads = classify(gates, sparsity)
    assert gates.size - sum(heads.num_retrieval) == round(sparsity * gates.size)
    pairs = list(zip(gates, *class_fields(heads), strict=True))
    retrieval = [row[head] for row, order, count in pairs for head in order[:count]]
    streaming = [row[head] for row, order, count in pairs for head in order[count:]]
    assert max(streaming, default=0.0) <= min(retrieval, default=1.0)


@given(GATES, SPARSITIES)
def test_a_quota_per_layer_gives_every_layer_the_rounded_share(gates: np.ndarray, sparsity: float):
    heads = classify(gates, sparsity, quota="layer")
    num_kv_heads = gates.shape[1]
    assert heads.num_retrieval == (num_kv_heads - round(sparsity * num_kv_heads),) * len(gates)
    for row, order, count in zip(gates, *class_fields(heads), strict=True):
        assert max(row[list(order[count:])], default=0.0) <= min(row[list(order[:count])], default=1.0)


def test_equal_gates_stream_from_the_last_layer_and_head_backwards():
    assert classify(np.ones((3, 4)), 0.5).num_retrieval == (4, 2, 0)
    heads = classify(np.array([[0.5, 1.0, 0.5], [0.5, 0.0, 0.5]]), 0.5)
    assert heads == HeadClasses(order=((0, 1, 2), (0, 1, 2)), num_retrieval=(3, 0))
    heads = classify(np.array([[0.1, 0.5, 0.5, 0.5]]), 0.5, quota="layer")
    assert heads == HeadClasses(order=((1, 2, 0, 3),), num_retrieval=(2,))


@given(GATES, SPARSITIES)
def test_the_classes_do_not_change_from_call_to_call_and_can_be_hashed(gates: np.ndarray, sparsity: float):
    first, second = classify(gates, sparsity), classify(gates.copy(), sparsity)
    assert first == second
    assert hash(first) == hash(second)


@given(GATES, st.sampled_from(["model", "layer"]))
def test_a_sparsity_of_0_or_1_puts_all_heads_in_one_class(gates: np.ndarray, quota: str):
    num_layers, num_kv_heads = gates.shape
    assert classify(gates, 0.0, quota) == HeadClasses.all_retrieval(num_layers, num_kv_heads)
    assert classify(gates, 1.0, quota).num_retrieval == (0,) * num_layers
    assert not classify(gates, 1.0, quota).is_permuted


def test_heads_are_permuted_only_where_a_streaming_head_precedes_a_retrieval_head():
    assert not HeadClasses.all_retrieval(2, 4).is_permuted
    assert not classify(np.array([[1.0, 0.0], [1.0, 0.0]]), 0.5).is_permuted
    assert classify(np.array([[1.0, 0.0], [0.0, 1.0]]), 0.5).is_permuted


def test_gates_slightly_outside_the_unit_interval_are_clipped(tmp_path: Path):
    gates = load_gates(write_gates(tmp_path, "-0.001\t0.5\n1.002\t1e-3\n"), 2, 2)
    np.testing.assert_array_equal(gates, [[0.0, 0.5], [1.0, 0.001]])


def test_a_folder_without_a_pattern_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"full_attention_heads\.tsv: no such file; a head pattern is a folder"):
        load_gates(tmp_path / "absent", 2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\t0\n0\t1\n", r"heads\.tsv: expected gates \[layers, KV heads\] = \[3, 2\], got \[2, 2\]$"),
        ("1\t0\t1\n" * 3, r"= \[3, 2\], got \[3, 3\]$"),
        ("1\t0\n1\n1\t0\n", r"= \[3, 2\], got \[3, 1 or 2\]$"),
        ("1 0\n" * 3, r"got \[3, 1\]; line 1: '1 0' is not a finite number; line 2"),
        ("", r"got \[0, 0\]$"),
        (
            "1\t0\n1\tnan\n-inf\t0\n",
            r"heads\.tsv: line 2: 'nan' is not a finite number; line 3: '-inf' is not a finite",
        ),
        ("1\t0\nx\t\n1\t0\n", r"line 2: 'x' is not a finite number; line 2: '' is not a finite number$"),
        ("x\tx\n" * 3, r"line 3: 'x' is not a finite number; and 1 more such values$"),
    ],
)
def test_a_bad_pattern_is_refused_with_all_its_problems(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_gates(write_gates(tmp_path, text), 3, 2)


def test_a_binary_file_is_refused(tmp_path: Path):
    (tmp_path / "full_attention_heads.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"heads\.tsv: cannot be read as text"):
        load_gates(tmp_path, 1, 1)


def test_the_pattern_of_another_published_model_is_refused(shared_patterns: Path):
    with pytest.raises(ValueError, match=r"Llama-2-7B-32K-Instruct.*= \[32, 8\], got \[32, 32\]$"):
        load_gates(shared_patterns / "Llama-2-7B-32K-Instruct", 32, 8)


@pytest.mark.parametrize(
    ("gates", "sparsity", "quota", "message"),
    [
        (np.ones((2, 2)), 1.5, "model", r"static_sparsity must be between 0 and 1, got 1\.5"),
        (np.ones((2, 2)), -0.1, "model", r"static_sparsity must be between 0 and 1"),
        (np.ones((2, 2)), float("nan"), "model", r"static_sparsity must be between 0 and 1, got nan"),
        (np.ones((2, 2)), 0.5, "shard", r"quota must be one of model, layer, got 'shard'"),
        (np.ones(4), 0.5, "model", r"gates must be finite and \[layers, KV heads\], got shape \(4,\)"),
        (np.full((2, 2), np.nan), 0.5, "model", r"gates must be finite"),
    ],
)
def test_classify_refuses_what_it_cannot_rank(gates: np.ndarray, sparsity: float, quota: str, message: str):
    with pytest.raises(ValueError, match=message):
        classify(gates, sparsity, quota)


@pytest.mark.parametrize(
    ("order", "num_retrieval", "message"),
    [
        (((0, 1),), (1, 1), r"one entry per layer, got 1 and 2"),
        ((), (), r"one entry per layer, got 0 and 0"),
        (((0, 1),), (3,), r"layer 0: num_retrieval must be 0 to 2, got 3"),
        (((0, 1), (0, 0)), (1, 1), r"layer 1: order must name heads 0 to 1 once, got \(0, 0\)"),
        (((0, 1), (0, 1, 2)), (1, 1), r"layer 1: order must name heads 0 to 1 once"),
        (((1, 0),), (2,), r"layer 0: heads must ascend inside each class, got \(1, 0\) with count=2"),
    ],
)
def test_inconsistent_classes_are_refused(order: tuple, num_retrieval: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        HeadClasses(order=order, num_retrieval=num_retrieval)


def test_a_pattern_may_name_settings_that_suit_it(tmp_path: Path):
    assert load_settings(tmp_path) == {}
    config = tmp_path / "config.json"
    config.write_text('{"sink_size": 64}')
    assert load_settings(tmp_path) == {}
    config.write_text('{"attention": {"sink": 64, "dense_layers": [7]}}')
    assert load_settings(tmp_path) == {"sink": 64, "dense_layers": [7]}


@pytest.mark.parametrize("text", ["{", "[1]", '{"attention": [1]}', '{"attention": 3}', "\xff"])
def test_settings_that_are_none_are_refused_in_one_line(text: str, tmp_path: Path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"config\.json: (not valid JSON|must hold a JSON object|attention must be)"
    ) as error:
        load_settings(tmp_path)
    assert "\n" not in str(error.value)
