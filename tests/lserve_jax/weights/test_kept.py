"""Weights that are kept for the next model are, bit for bit, those that it would read."""

import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lserve_jax.weights import open_checkpoint
from lserve_jax.weights.load import Checkpoint
from tests.lserve_jax.checkpoints import assert_same_bits, assert_same_tree, random_tensors, write_folder
from tests.lserve_jax.weights.test_rules import CONFIGS, Heads

GGUF = Path(__file__).parents[2] / "golden" / "quantized" / "gguf"
ORDERS = (None, Heads((2, 0, 1), (0, 1, 2), (1, 0, 2)), Heads((1, 2, 0), (0, 1, 2), (2, 1, 0)), None)


def opened(folder: Path, config: dict[str, Any]) -> Checkpoint:
    return open_checkpoint(str(write_folder(folder, config, random_tensors(config))))


def unreadable(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("name", CONFIGS)
def test_each_order_of_heads_equals_a_load_of_its_own_after_any_other(name: str, tmp_path: Path):
    checkpoint = opened(tmp_path, CONFIGS[name])
    expected = [jax.tree.map(np.asarray, checkpoint.load_params("float32", heads)) for heads in ORDERS]
    kept = checkpoint.kept()
    trees = [kept.load_params("float32", ORDERS[0])]
    unreadable(tmp_path)
    trees += [kept.load_params("float32", heads) for heads in ORDERS[1:]]
    for tree, wanted in zip(trees, expected, strict=True):  # those of earlier models are still right
        assert_same_tree(tree, wanted)


def test_another_dtype_is_read_anew(tmp_path: Path):
    checkpoint = opened(tmp_path, CONFIGS["biased"])
    kept = checkpoint.kept()
    kept.load_params("float32", None)
    wanted = jax.tree.map(np.asarray, checkpoint.load_params("bfloat16", None))
    assert_same_tree(kept.load_params("bfloat16", None), wanted, "bfloat16")


@pytest.mark.parametrize("weight_dtype", ["auto", "int4"])
@pytest.mark.parametrize("name", ["Q4_1", "Q4_K_M", "Q8_0"])
def test_packed_weights_in_each_order_equal_a_load_of_their_own(name: str, weight_dtype: str):
    checkpoint = open_checkpoint(str(GGUF / f"{name}.gguf"))
    layers, heads = checkpoint.config.num_layers, checkpoint.config.num_kv_heads
    rng = np.random.default_rng(0)
    orders = [Heads(*(tuple(rng.permutation(heads)) for _ in range(layers))) for _ in range(2)]
    kept = checkpoint.kept()
    for order in (None, *orders, None):
        assert_same_bits(
            kept.load_params("float32", order, weight_dtype=weight_dtype),
            checkpoint.load_params("float32", order, weight_dtype=weight_dtype),
        )


def test_another_form_is_read_anew(tmp_path: Path):
    checkpoint = opened(tmp_path, CONFIGS["biased"])
    kept = checkpoint.kept()
    for weight_dtype in ("int8", "int4", None, "int8"):
        wanted = checkpoint.load_params("float32", ORDERS[1], weight_dtype=weight_dtype)
        assert_same_bits(kept.load_params("float32", ORDERS[1], weight_dtype=weight_dtype), wanted)
    unreadable(tmp_path)
    kept.load_params("float32", ORDERS[2], weight_dtype="int8")
    with pytest.raises(ValueError, match="holds neither"):
        kept.load_params("float32", ORDERS[2], weight_dtype="int4")


def test_memory_never_holds_two_models_where_none_is_alive(tmp_path: Path):
    kept = opened(tmp_path, CONFIGS["biased"]).kept()
    alive: list[weakref.ref[jax.Array]] = []
    tree = kept.load_params("float32", ORDERS[0])
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(tree))
    alive = [weakref.ref(leaf) for leaf in jax.tree.leaves(tree)]
    del tree
    before = {id(leaf) for leaf in jax.live_arrays()} - {id(one()) for one in alive}
    reports = []

    def check(done: int, whole: int) -> None:
        held = sum(leaf.nbytes for leaf in jax.live_arrays() if id(leaf) not in before)
        assert held <= total + largest
        reports.append((done, whole))

    kept.load_params("float32", ORDERS[1], check)
    assert reports[0] == (0, total) and reports[-1] == (total, total)
    assert sum(one() is None for one in alive) > 0  # those that were permuted went
    assert reports == sorted(reports)


def test_an_order_that_cannot_be_is_refused_and_what_follows_is_right(tmp_path: Path):
    checkpoint = opened(tmp_path, CONFIGS["biased"])
    kept = checkpoint.kept()
    kept.load_params("float32", ORDERS[1])
    with pytest.raises(ValueError, match="the head order has 1 layers, the model has 3"):
        kept.load_params("float32", Heads((0, 1, 2)))
    wanted = jax.tree.map(np.asarray, checkpoint.load_params("float32", ORDERS[2]))
    assert_same_tree(kept.load_params("float32", ORDERS[2]), wanted)
