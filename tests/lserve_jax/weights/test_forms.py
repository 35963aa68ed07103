"""Forms of weights: what is promised is loaded, heads move in every form, and parts in different forms stay apart."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax.config.errors import InputError
from lserve_jax.config.inference import WEIGHT_DTYPES
from lserve_jax.models.layers import numbers
from lserve_jax.weights import open_checkpoint
from lserve_jax.weights.layout import INT4, INT8, INT8_WIDE, Layout
from lserve_jax.weights.rules import parameters
from lserve_jax.weights.tensors import describe_forms, get_leaf, tree_bytes
from pallas_kernels.core.quantized_matrix import QuantizedMatrix, expand, quantize_groups, quantize_rows
from tests.lserve_jax.checkpoints import random_tensors, tiny_config, write_folder, write_gguf
from tests.lserve_jax.weights.test_rules import Heads

QUANTIZED = Path(__file__).parents[2] / "golden" / "quantized" / "gguf"
FILES = sorted(path.name for path in QUANTIZED.glob("*.gguf"))
# Heads of 32 and rows of 64: blocks per KV head are smaller than rows, and larger than groups.
CONFIG = tiny_config(
    hidden_size=64, intermediate_size=96, num_attention_heads=6, num_key_value_heads=3, head_dim=32, attention_bias=True
)
ORDERS = Heads((2, 0, 1), (0, 1, 2), (1, 0, 2))


def is_matrix(leaf: Any) -> bool:
    """Whether a leaf is a quantised matrix: a leaf of its own here."""
    return isinstance(leaf, QuantizedMatrix)


def plain(params: Any, config: Any) -> dict[tuple[str, ...], np.ndarray]:
    """Every parameter as numbers of float32, by path."""
    return {
        parameter.path: np.asarray(numbers(get_leaf(params, parameter.path), jnp.dtype("float32"), parameter.axis))
        for parameter in parameters(config)
    }


def moved(tree: dict[tuple[str, ...], np.ndarray], config: Any, heads: Heads) -> dict[tuple[str, ...], np.ndarray]:
    """The same numbers with KV heads in another order, moved by hand."""
    result = {}
    for parameter in parameters(config):
        array, order = tree[parameter.path], None
        if parameter.layer is not None:
            order = list(heads.order[parameter.layer])
        if order is not None and parameter.path[-2] == "qkv_proj":
            array = array[order]
        if order is not None and parameter.path[-2:] == ("o_proj", "kernel"):
            array = array.reshape(len(array), len(order), -1)[:, order].reshape(array.shape)
        result[parameter.path] = array
    return result


@pytest.mark.parametrize("weight_dtype", [None, *WEIGHT_DTYPES])
@pytest.mark.parametrize("name", [*FILES, "safetensors", "q8_0"])
def test_what_is_promised_is_loaded_and_heads_move_in_every_form(name: str, weight_dtype: str | None, tmp_path: Path):
    if name in FILES:
        checkpoint = open_checkpoint(str(QUANTIZED / name))
        order = tuple(range(checkpoint.config.num_kv_heads))[::-1]
        heads = Heads(*[order] * checkpoint.config.num_layers)
    else:
        tensors, heads = random_tensors(CONFIG), ORDERS
        if name == "safetensors":
            path = write_folder(tmp_path / "model", CONFIG, tensors)
        else:
            path = write_gguf(tmp_path / "model.gguf", CONFIG, tensors, kind="Q8_0")
        checkpoint = open_checkpoint(str(path))
    promised = checkpoint.abstract_params("float32", weight_dtype)
    plain_order = checkpoint.load_params("float32", weight_dtype=weight_dtype)
    other_order = checkpoint.load_params("float32", heads, weight_dtype=weight_dtype)
    for params in (plain_order, other_order):
        assert jax.tree.structure(params) == jax.tree.structure(promised)
        for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(promised), strict=True):
            assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
    config = checkpoint.config
    expected = moved(plain(plain_order, config), config, heads)
    for path, array in plain(other_order, config).items():
        np.testing.assert_array_equal(array, expected[path], err_msg=".".join(path))


def test_int8_and_int4_are_made_of_the_numbers_of_the_file(tmp_path: Path):
    checkpoint = open_checkpoint(str(write_folder(tmp_path, CONFIG, random_tensors(CONFIG))))
    exact = checkpoint.load_params("float32")
    kernel = np.asarray(exact["layers_1"]["mlp"]["gate_up_proj"]["kernel"])
    for weight_dtype, expected, layout in [
        ("int8", quantize_rows(kernel, np, input_bits=8), INT8),
        ("int4", quantize_groups(kernel, 32, np), INT4),
    ]:
        got = checkpoint.load_params("float32", weight_dtype=weight_dtype)["layers_1"]["mlp"]["gate_up_proj"]["kernel"]
        assert Layout.of(got) == layout
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    outside = checkpoint.load_params("float32", weight_dtype="int4")
    assert Layout.of(outside["lm_head"]["kernel"]) == INT8_WIDE
    assert Layout.of(outside["embed"]["embedding"]) == INT8_WIDE


def test_norms_and_biases_stay_numbers_and_some_inputs_are_wide(tmp_path: Path):
    checkpoint = open_checkpoint(str(write_folder(tmp_path, CONFIG, random_tensors(CONFIG))))
    params = checkpoint.load_params("float32", weight_dtype="int8")
    leaves = {".".join(parameter.path): get_leaf(params, parameter.path) for parameter in parameters(checkpoint.config)}
    quantised = {name: leaf for name, leaf in leaves.items() if is_matrix(leaf)}
    assert leaves.keys() - quantised.keys() == {name for name in leaves if name.endswith((".scale", ".bias"))}
    wide = {name for name, leaf in quantised.items() if leaf.input_bits == 16}
    downs = {f"layers_{layer}.mlp.down_proj.kernel" for layer in range(checkpoint.config.num_layers)}
    assert wide == downs | {"embed.embedding", "lm_head.kernel"}


def test_parts_in_different_forms_are_entries_of_their_own():
    params = open_checkpoint(str(QUANTIZED / "Q4_K_M.gguf")).load_params("float32", weight_dtype="auto")
    kernels = [params[f"layers_{layer}"]["attention"]["qkv_proj"]["kernel"] for layer in range(2)]
    mixed = [kernel for kernel in kernels if isinstance(kernel, tuple)]
    assert mixed
    for queries_and_keys, values in mixed:
        assert (queries_and_keys.bits, values.bits) == (4, 8)
        assert queries_and_keys.shape[1] == 1 + queries_and_keys.shape[1] - values.shape[1]


def test_a_plan_in_words_and_bytes(tmp_path: Path):
    checkpoint = open_checkpoint(str(write_folder(tmp_path, CONFIG, random_tensors(CONFIG))))
    tree = checkpoint.abstract_params("bfloat16", "int4")
    assert describe_forms(tree).split(", ")[0] == "int4 in groups of 32"
    assert tree_bytes(tree) == tree_bytes(checkpoint.load_params("bfloat16", weight_dtype="int4"))


def test_an_unknown_form_is_refused(tmp_path: Path):
    checkpoint = open_checkpoint(str(write_folder(tmp_path, CONFIG, random_tensors(CONFIG))))
    with pytest.raises(InputError, match="weight_dtype='int2' must be one of auto, bfloat16, float32, int8, int4"):
        checkpoint.load_params("float32", weight_dtype="int2")


def test_expansion_of_a_whole_is_that_of_its_rows():
    matrix = quantize_groups(np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32), 32, np)
    rows = [expand(jax.tree.map(lambda leaf, row=row: leaf[row], matrix), np.float32, np) for row in range(7)]
    np.testing.assert_array_equal(np.stack(rows), expand(matrix, np.float32, np))
