"""Quantised Hugging Face checkpoints: bit for bit what the library of each format reads, and refusals by name."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lserve_jax.config.errors import InputError
from lserve_jax.config.hf import read_hf
from lserve_jax.weights import open_checkpoint
from lserve_jax.weights.hf_packing import AwqCodes, GptqCodes, PackedCodes, Packing, StoredMatrix, WholeCodes
from lserve_jax.weights.hf_quantized import read_quantization
from lserve_jax.weights.layout import Layout
from lserve_jax.weights.rules import Tensor, expected_tensors
from lserve_jax.weights.safetensors import SafetensorsFolder
from pallas_kernels.core.quantized_matrix import QuantizedMatrix, expand
from tests.lserve_jax.checkpoints import random_tensors, tiny_config, write_folder
from tests.lserve_jax.weights.test_rules import Heads

GOLDEN = Path(__file__).parents[2] / "golden" / "quantized"
FORMATS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
ACT_ORDER = "gptq_act_order"
KEPT_PACKED = [name for name in FORMATS if name != ACT_ORDER]
ACT_ORDER_REFUSED = (
    r"model\.safetensors: model\.layers\.0\.self_attn\.q_proj\.weight \(and 13 others\) cannot be kept packed: "
    r"its inputs are in act-order, .*; weight_dtype bfloat16 loads it"
)
F32 = np.dtype(np.float32)
K = "model.layers.0.self_attn.k_proj"

ROWS = {"group": None, "scale": "bfloat16"}
GPTQ4 = {"codes": "uint8", "group": 32, "scale": "float16"}
# What the files' headers and configurations say, worked out by hand.
LAYOUTS: dict[str, dict[str, Layout]] = {
    "ct_w8a8": {"mlp.down_proj": Layout(codes="int8", input_bits=8, **ROWS)},
    "ct_w8a16_asymmetric": {"mlp.down_proj": Layout(codes="int8", group=None, scale="float16", low="float32")},
    "ct_w4a16": {"mlp.down_proj": Layout(codes="uint8", group=32, scale="bfloat16")},
    "ct_w4a16_asymmetric": {"mlp.down_proj": Layout(codes="uint8", group=32, scale="float16", low="float32")},
    "ct_mixed": {
        "mlp.down_proj": Layout(codes="uint8", group=96, scale="float32"),
        "mlp.up_proj": Layout(codes="uint8", group=64, scale="float32"),
        "self_attn.q_proj": Layout(codes="int8", group=None, scale="float32", input_bits=8),
    },
    "ct_fp8_channel": {"mlp.down_proj": Layout(codes="float8_e4m3fn", **ROWS)},
    "ct_fp8_tensor": {"mlp.down_proj": Layout(codes="float8_e4m3fn", **ROWS)},
    # Blocks of 48 inputs: two of 96, and one and a third of 64, of which 16 is the largest common measure.
    "ct_fp8_block": {
        "mlp.down_proj": Layout(codes="float8_e4m3fn", group=48, scale="bfloat16"),
        "mlp.up_proj": Layout(codes="float8_e4m3fn", group=16, scale="bfloat16"),
    },
    "fp8_block": {"mlp.down_proj": Layout(codes="float8_e4m3fn", group=16, scale="float32")},
    "gptq": {"mlp.down_proj": Layout(**GPTQ4)},
    "gptq_asymmetric": {"mlp.down_proj": Layout(low="float32", **GPTQ4)},
    "gptq_v2": {"mlp.down_proj": Layout(codes="uint8", group=96, scale="float16", low="float32")},
    "gptq_8bit": {
        "mlp.down_proj": Layout(low="float32", **GPTQ4),
        "mlp.up_proj": Layout(codes="int8", group=32, scale="float16", low="float32"),
    },
    "awq": {"mlp.down_proj": Layout(low="float32", **GPTQ4)},
}
PLAIN = {
    "ct_w4a16": {"layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"},
    "awq": {"layers.1.mlp.gate_proj"},
    "gptq_8bit": {"layers.1.self_attn.k_proj"},
    "fp8_block": {f"layers.1.self_attn.{name}_proj" for name in "qkvo"},
}
QUANTISED_HEAD = {"ct_mixed", "gptq"}


def folder_of(path: Path) -> tuple[SafetensorsFolder, dict[str, Tensor]]:
    """The tensors of a folder, and the model's parameters by their names in the file."""
    hf_config = json.loads((path / "config.json").read_text())
    config = read_hf(hf_config, source="config.json")
    source = SafetensorsFolder(path, read_quantization(hf_config, config, source="config.json"))
    return source, {tensor.names["hf"]: tensor for tensor in expected_tensors(config)}


def expected_of(name: str) -> dict[str, np.ndarray]:
    return load_file(GOLDEN / name / "expected.safetensors")


# --- what the libraries read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEPT_PACKED)
def test_packed_matrix_has_bit_for_bit_the_numbers_that_the_library_reads(name: str):
    source, tensors = folder_of(GOLDEN / name)
    expected = expected_of(name)
    assert len(expected) >= 3
    with source.open() as reader:
        for key, numbers in expected.items():
            packed = reader.packed(tensors[key])
            assert expand(packed, np.float32, np).tobytes() == numbers.tobytes(), key
            on_device = expand(jax.tree.map(jnp.asarray, packed), jnp.float32)
            np.testing.assert_array_equal(np.asarray(on_device), numbers)


@pytest.mark.parametrize("name", FORMATS)
def test_array_has_bit_for_bit_the_numbers_that_the_library_reads(name: str):
    source, tensors = folder_of(GOLDEN / name)
    with source.open() as reader:
        for key, numbers in expected_of(name).items():
            assert reader.array(tensors[key], F32).tobytes() == numbers.tobytes(), key
            half = reader.array(tensors[key], np.dtype(ml_dtypes.bfloat16))
            assert half.tobytes() == numbers.astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize("name", KEPT_PACKED)
def test_layout_that_the_header_tells_is_the_layout_of_every_matrix(name: str):
    source, tensors = folder_of(GOLDEN / name)
    with source.open() as reader:
        for tensor in tensors.values():
            layout = source.layout(tensor)
            if layout is not None:
                packed = reader.packed(tensor)
                assert Layout.of(packed) == layout
                told = layout.abstract(tensor.file_shape)
                assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), told) == jax.tree.map(
                    lambda leaf: (leaf.shape, leaf.dtype), packed
                )
                assert all(leaf.flags.c_contiguous for leaf in jax.tree.leaves(packed))


@pytest.mark.parametrize("name", KEPT_PACKED)
def test_layouts_are_those_of_the_format(name: str):
    source, tensors = folder_of(GOLDEN / name)
    for part, layout in LAYOUTS[name].items():
        assert source.layout(tensors[f"model.layers.0.{part}.weight"]) == layout


@pytest.mark.parametrize("name", FORMATS)
def test_exactly_the_modules_that_the_configuration_names_are_quantised(name: str):
    source, tensors = folder_of(GOLDEN / name)
    plain = {key for key in tensors if key not in source.quantized.matrices}
    kept = {f"model.{module}.weight" for module in PLAIN.get(name, ())}
    norms = {key for key in tensors if "norm" in key}
    head = set() if name in QUANTISED_HEAD else {"lm_head.weight"}
    assert plain == {"model.embed_tokens.weight"} | norms | kept | head
    held = load_plain(GOLDEN / name, plain)
    with source.open() as reader:
        for key in plain:
            assert source.layout(tensors[key]) is None
            assert reader.array(tensors[key], F32).tobytes() == held[key].tobytes()


def load_plain(path: Path, names: set[str]) -> dict[str, np.ndarray]:
    with safe_open(path / "model.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name) for name in names}


@pytest.mark.parametrize("weight_dtype", ["float32", "auto"])
@pytest.mark.parametrize("name", FORMATS)
def test_checkpoint_loads_in_every_form(name: str, weight_dtype: str):
    checkpoint = open_checkpoint(str(GOLDEN / name))
    assert checkpoint.warnings == ()
    if (name, weight_dtype) == (ACT_ORDER, "auto"):
        with pytest.raises(InputError, match=ACT_ORDER_REFUSED):
            checkpoint.load_params("float32", weight_dtype="auto")
        return
    params = checkpoint.load_params("float32", weight_dtype=weight_dtype)
    told = checkpoint.abstract_params("float32", weight_dtype)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), told
    )
    for layer in range(2):
        numbers = expected_of(name).get(f"model.layers.{layer}.mlp.down_proj.weight")
        leaf = params[f"layers_{layer}"]["mlp"]["down_proj"]["kernel"]
        assert isinstance(leaf, QuantizedMatrix) == (weight_dtype == "auto")
        np.testing.assert_array_equal(np.asarray(expand(leaf, jnp.float32)), numbers)


@pytest.mark.parametrize("weight_dtype", ["int8", "int4", "bfloat16"])
def test_act_order_may_be_loaded_in_another_form(weight_dtype: str):
    checkpoint = open_checkpoint(str(GOLDEN / ACT_ORDER))
    leaf = checkpoint.load_params("float32", weight_dtype=weight_dtype)["layers_0"]["mlp"]["down_proj"]["kernel"]
    numbers = expected_of(ACT_ORDER)["model.layers.0.mlp.down_proj.weight"]
    error = np.abs(np.asarray(expand(leaf, jnp.float32)) - numbers).max()
    assert error <= np.abs(numbers).max() / {"int8": 250, "int4": 14, "bfloat16": 256}[weight_dtype]


def test_act_order_is_refused_where_it_would_have_to_stay_packed():
    source, tensors = folder_of(GOLDEN / ACT_ORDER)
    with pytest.raises(InputError, match=ACT_ORDER_REFUSED):
        source.require_kept()
    assert source.layout(tensors[f"{K}.weight"]) is None


@pytest.mark.parametrize("name", KEPT_PACKED)
def test_what_can_be_kept_is_not_refused(name: str):
    folder_of(GOLDEN / name)[0].require_kept()


def test_heads_of_quantised_matrices_are_permuted_as_those_of_numbers(tmp_path: Path):
    settings = ct(
        {
            "targets": ["re:.*self_attn"],
            "weights": weights(num_bits=4, strategy="group", group_size=8),
            "format": "pack-quantized",
        },
        {"input_activations": inputs()},
    )
    config = tiny_config(quantization_config=settings)
    tensors: dict[str, Any] = random_tensors(config)
    rng = np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith("_proj.weight") or name == "lm_head.weight"]:
        rows, columns = tensors[name].shape
        if "self_attn" in name:
            del tensors[name]
            tensors[f"{name}_packed"] = words_of(rng.integers(0, 16, (rows, columns)), 4)
            tensors[f"{name}_shape"] = np.array([rows, columns])
            tensors[f"{name}_scale"] = rng.standard_normal((rows, columns // 8)).astype(np.float16)
        else:
            tensors[name] = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
            tensors[f"{name}_scale"] = rng.standard_normal((rows, 1)).astype(np.float16)
    checkpoint = open_checkpoint(str(write_folder(tmp_path, config, tensors, shards=2)))
    for heads in None, Heads((2, 0, 1), (0, 1, 2), (1, 0, 2)):
        packed = checkpoint.load_params("float32", heads, weight_dtype="auto")
        numbers = checkpoint.load_params("float32", heads)
        widened = jax.tree.map(
            lambda leaf: expand(leaf, jnp.float32), packed, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix)
        )
        jax.tree.map(np.testing.assert_array_equal, widened, numbers)
        assert isinstance(packed["layers_0"]["attention"]["o_proj"]["kernel"], QuantizedMatrix)


@pytest.mark.parametrize("name", ["ct_fp8_block", "gptq", "awq"])
def test_shards_are_read_like_one_file(name: str, tmp_path: Path):
    tensors = raw_tensors(GOLDEN / name)
    hf_config = json.loads((GOLDEN / name / "config.json").read_text())
    source, named = folder_of(write_folder(tmp_path, hf_config, tensors, shards=3))
    assert source.inventory().problems == []
    with source.open() as reader:
        for key, numbers in expected_of(name).items():
            assert expand(reader.packed(named[key]), np.float32, np).tobytes() == numbers.tobytes()


def raw_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint, float8 too, which safetensors does not read into numpy."""
    data = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    types = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
    types |= {"I8": np.int8, "I32": np.int32, "I64": np.int64}
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[start:end], types[entry["dtype"]]).reshape(entry["shape"])
    return tensors


# --- packings against loops ------------------------------------------------------------------------------------------


def words_of(values: np.ndarray, bits: int) -> np.ndarray:
    """Codes [R, C] packed along the last axis, one by one, into words of 32 bits."""
    per = 32 // bits
    out = np.zeros((len(values), -(-values.shape[1] // per)), np.uint32)
    for row, column in np.ndindex(*values.shape):
        out[row, column // per] |= np.uint32(int(values[row, column]) << bits * (column % per))
    return out.view(np.int32)


def compressed(q: np.ndarray, z: np.ndarray, scale: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    zero = words_of(z.T, bits).T.copy()
    shape = np.array(q.shape)
    return {"weight_packed": words_of(q, bits), "weight_zero_point": zero, "weight_scale": scale, "weight_shape": shape}


def gptq(q: np.ndarray, z: np.ndarray, scale: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    return {"qweight": words_of(q, bits).T.copy(), "qzeros": words_of(z.T, bits), "scales": scale.T.copy()}


def awq(q: np.ndarray, z: np.ndarray, scale: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    def interleaved(values: np.ndarray) -> np.ndarray:
        padded = np.pad(values, ((0, 0), (0, -values.shape[1] % 8)))
        return words_of(padded.reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(padded.shape), bits)

    return {"qweight": interleaved(q.T), "qzeros": interleaved(z.T), "scales": scale.T.copy()}


@pytest.mark.parametrize(("rows", "inputs", "group"), [(8, 32, 8), (5, 48, 32), (1, 8, 8), (13, 40, None), (9, 20, 16)])
@pytest.mark.parametrize(
    ("write", "packing"),
    [
        (compressed, PackedCodes(bits=4, block=(1, None), has_zeros=True)),
        (compressed, PackedCodes(bits=8, block=(1, None), has_zeros=True)),
        (gptq, GptqCodes(bits=4, block=(1, None), has_zeros=True, is_first_version=False)),
        (gptq, GptqCodes(bits=8, block=(1, None), has_zeros=True, is_first_version=False)),
        (awq, AwqCodes(bits=4, block=(1, None), has_zeros=True)),
    ],
)
def test_sizes_that_fill_no_word_and_groups_that_end_early(
    write: Callable[..., dict[str, np.ndarray]], packing: Packing, rows: int, inputs: int, group: int | None
):
    rng = np.random.default_rng(rows * inputs)
    packing = type(packing)(**{**vars(packing), "block": (1, group)})
    q = rng.integers(0, 1 << packing.bits, (rows, inputs))
    order = np.arange(inputs) // (group or inputs)
    z = rng.integers(0, 1 << packing.bits, (rows, int(order[-1]) + 1))
    scale = rng.uniform(1e-4, 2, z.shape).astype(np.float16)
    matrix = StoredMatrix(name="a.weight", shape=(rows, inputs), packing=packing)
    tensors = {f"a.{key}": value for key, value in write(q, z, scale, packing.bits).items()}
    for key, value in tensors.items():
        assert value.shape == matrix.parts[key].shapes[0]
    expected = (q - z[:, order]).astype(np.float32) * scale.astype(np.float32)[:, order]
    packed = matrix.unpack(tensors)
    assert Layout.of(packed) == matrix.layout("F16")
    np.testing.assert_array_equal(expand(packed, np.float32, np), expected)
    np.testing.assert_array_equal(matrix.numbers(tensors, F32), expected)


def test_zero_points_of_the_first_version_borrow_from_their_neighbours():
    packing = GptqCodes(bits=4, block=(1, None), has_zeros=True)
    matrix = StoredMatrix(name="a.weight", shape=(8, 8), packing=packing)
    z = np.array([[0], [1], [15], [0], [0], [8], [15], [0]])
    q, scale = np.arange(64).reshape(8, 8) % 16, np.ones((8, 1), np.float16)
    tensors = gptq(q, z, scale, 4)
    tensors["qzeros"] = (tensors["qzeros"].view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    named = {f"a.{key}": value for key, value in tensors.items()}
    np.testing.assert_array_equal(expand(matrix.unpack(named), np.float32, np), q - z)


@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_scales_of_rows_may_lack_their_last_axis(shape: tuple[int, ...]):
    matrix = StoredMatrix(name="a.weight", shape=(4, 6), packing=WholeCodes(block=(1, None)))
    assert shape in matrix.parts["a.weight_scale"].shapes
    tensors = {"a.weight": np.ones((4, 6), np.int8), "a.weight_scale": np.arange(4, dtype=np.float16).reshape(shape)}
    np.testing.assert_array_equal(matrix.numbers(tensors, F32)[:, 0], np.arange(4))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scale_of_a_whole_matrix_may_have_no_axes(shape: tuple[int, ...]):
    matrix = StoredMatrix(name="a.weight", shape=(4, 6), packing=WholeCodes(is_float=True, block=(None, None)))
    assert shape in matrix.parts["a.weight_scale"].shapes
    codes = np.full((4, 6), 1.5, ml_dtypes.float8_e4m3fn)
    packed = matrix.unpack({"a.weight": codes, "a.weight_scale": np.full(shape, 2, np.float32)})
    np.testing.assert_array_equal(expand(packed, np.float32, np), np.full((4, 6), 3))
    assert Layout.of(packed) == matrix.layout("F32")


def test_what_would_have_to_be_rounded_is_not_kept_packed():
    matrix = StoredMatrix(name="a.weight", shape=(8, 8), packing=AwqCodes(bits=4, block=(1, None), has_zeros=True))
    assert matrix.refusal("F32", None) == "zero points with scales in float32 would have to be rounded"
    assert matrix.refusal("F16", None) == ""
    odd = StoredMatrix(name="a.weight", shape=(8, 9), packing=PackedCodes(bits=4, block=(1, 4)))
    assert odd.refusal("F16", None) == "groups of 1 inputs in 4 bits are not whole bytes"


# --- quantization_config ---------------------------------------------------------------------------------------------


def settings_of(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "config.json").read_text())["quantization_config"]


def read(settings: Mapping[str, Any], family: str = "llama", key: str = "quantization_config", **changes: Any) -> Any:
    hf_config = tiny_config(family, **changes) | {key: settings}
    return read_quantization(hf_config, read_hf(hf_config, source="config.json"), source="config.json")


def ct(*groups: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """Settings of compressed-tensors; the weights of the groups have 8 bits per output unless they say else."""
    named = {
        f"group_{i}": {"targets": ["Linear"], "weights": weights()} | dict(group) for i, group in enumerate(groups)
    }
    return {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": named} | settings


def weights(**changes: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"} | changes


def inputs(**changes: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True} | changes


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def test_plain_checkpoint_has_no_quantised_matrix():
    hf_config = tiny_config(quantization_config={})
    assert read_quantization(hf_config, read_hf(hf_config, source=""), source="").matrices == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quant_method 'bitsandbytes' is not supported; known: compressed-tensors, gptq",
        ),
        ({"bits": 4}, r"quant_method '' is not supported; .*use an unquantised or a GGUF checkpoint"),
        ("gptq", "quantization_config must be a mapping, got 'gptq'"),
        (ct({}, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is not supported, sparse weights"),
        (
            ct({}, transform_config={"config_groups": {"u": {}}}),
            "transform_config is not supported: it changes the model",
        ),
        (ct(), "missing required keys: quantization_config.config_groups"),
        (
            ct({}, format="nvfp4-pack-quantized"),
            "format 'nvfp4-pack-quantized' is not supported; known: pack-quantized",
        ),
        (ct({}, format="marlin-24"), "format 'marlin-24' is not supported"),
        (ct({}, format="dense"), "format 'dense' is not supported"),
        (ct({"format": "mxfp4-pack-quantized"}), r"group_0\.format 'mxfp4-pack-quantized' is not supported"),
        (
            ct({"weights": weights(num_bits=3)}),
            r"group_0\.weights\.num_bits: int weights of 3 bits in int-quantized are",
        ),
        (ct({"weights": weights(num_bits=4, type="float")}), "float weights of 4 bits"),
        (ct({"weights": weights(type="float", symmetric=False)}), "asymmetric float weights of 8 bits"),
        (ct({"weights": weights(strategy="tensor_group")}), "strategy 'tensor_group' is not supported"),
        (ct({"weights": weights(strategy="group")}), r"missing required keys: .*group_0\.weights\.group_size"),
        (
            ct({"weights": weights(strategy="block", block_structure=[128])}),
            r"block_structure must be two positive integers, got \[128\]",
        ),
        (
            ct({"weights": weights(strategy="tensor", symmetric=False)}, format="pack-quantized"),
            "zero points of blocks of outputs are not read",
        ),
        (ct({}, ignore=["re:("]), r"ignore holds '\(', which is no regular expression"),
        (ct({}, ignore="lm_head"), "ignore must be a list of names, got 'lm_head'"),
        (ct({"targets": [3]}), r"group_0\.targets must be a list of names, got \[3\]"),
        (GPTQ | {"bits": 3}, "bits 3 is not supported, only 4 and 8"),
        (GPTQ | {"bits": 2}, "bits 2 is not supported"),
        ({"quant_method": "gptq"}, "missing required keys: quantization_config.bits"),
        (GPTQ | {"group_size": 0}, "group_size must be a positive integer, got 0"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported; known: gptq, gptq_v2"),
        (GPTQ | {"is_marlin_format": True}, "checkpoint_format 'marlin' is not supported"),
        (GPTQ | {"dynamic": {"+:.*down": {"bits": 3}}}, r"dynamic\.\+:\.\*down\.bits 3 is not supported"),
        (GPTQ | {"dynamic": {"-:(": {}}}, r"dynamic\.-:\( holds '\(', which is no regular expression"),
        (AWQ | {"bits": 8}, "bits 8 is not supported, only 4"),
        (AWQ | {"version": "gemv"}, "version 'gemv' is not supported, only gemm"),
        (AWQ | {"zero_point": False}, "zero_point False is not supported"),
        (FP8 | {"fmt": "e5m2"}, "fmt 'e5m2' is not supported, only e4m3"),
        (FP8 | {"scale_fmt": "ue8m0"}, "scale_fmt 'ue8m0' is not supported, only float"),
        (FP8 | {"weight_block_size": [0, 128]}, "weight_block_size must be two positive integers"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(settings: Any, message: str):
    with pytest.raises(InputError, match=r"\Aconfig\.json: .*" + message + r".*\Z"):
        read(settings)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ({"input_activations": inputs(dynamic=False)}, "not 8 bits per token, static, symmetric"),
        ({"input_activations": inputs(dynamic=False, strategy="tensor")}, "not 8 bits per tensor, static"),
        ({"input_activations": inputs(symmetric=False)}, "not 8 bits per token, dynamic, asymmetric"),
        ({"input_activations": inputs(num_bits=4)}, "not 4 bits per token"),
        ({"weights": weights(symmetric=False), "input_activations": inputs()}, "symmetric, for these weights"),
        ({"weights": weights(num_bits=4), "input_activations": inputs()}, "for these weights"),
        (
            {"weights": weights(strategy="group", group_size=8), "input_activations": inputs()},
            "8-bit inputs are quantised per token, .* for these weights",
        ),
        ({"output_activations": inputs()}, "quantised outputs are not supported"),
    ],
)
def test_inputs_that_no_product_quantises_are_refused_by_name(scheme: dict[str, Any], reason: str):
    quantized = read(ct(scheme))
    matrix = quantized.matrices["model.layers.0.mlp.down_proj.weight"]
    assert re.search(reason, matrix.refusal("BF16", None))
    assert quantized.is_unused("model.layers.0.mlp.down_proj.input_scale")


def test_order_of_inputs_is_that_of_the_tensor_whatever_the_settings_say():
    order = np.arange(64) // 32
    for settings in GPTQ, GPTQ | {"desc_act": True}:
        matrix = read(settings).matrices["model.layers.0.mlp.down_proj.weight"]
        assert [bool(matrix.refusal("F16", one)) for one in (None, order, order * 0 - 1)] == [False] * 3
        assert "act-order" in matrix.refusal("F16", order[::-1])


def modules_of(settings: Mapping[str, Any], layer: int = 1, **changes: Any) -> set[str]:
    """The quantised modules of one layer, and those outside of layers."""
    names = {name.removesuffix(".weight") for name in read(settings, **changes).matrices}
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix) or "layers" not in name}


ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("settings", "modules"),
    [
        (ct({}), {*ATTENTION, *MLP, "lm_head"}),
        (ct({}, ignore=["lm_head"]), ATTENTION | MLP),
        (ct({}, ignore=["lm_head", "re:.*mlp"]), ATTENTION),
        (ct({}, ignore=["Linear"]), set()),
        (ct({}, ignore=["head", "layers.1.mlp.up_proj", "re:mlp"]), {*ATTENTION, *MLP, "lm_head"}),  # no whole names
        (ct({}, ignore=None), {*ATTENTION, *MLP, "lm_head"}),
        (ct({"targets": ["Linear", "Embedding"]}), {*ATTENTION, *MLP, "lm_head", "model.embed_tokens"}),
        (ct({"targets": ["LlamaAttention"]}), set()),
        (ct({"targets": ["re:.*self_attn", "model.layers.1.mlp.up_proj"]}), {*ATTENTION, "mlp.up_proj"}),
        (ct({"weights": None}), set()),
        (ct({"targets": ["re:.*mlp"], "weights": None}, {}), {*ATTENTION, "lm_head"}),
        (GPTQ, ATTENTION | MLP),
        (GPTQ | {"lm_head": True}, {*ATTENTION, *MLP, "lm_head"}),
        (
            GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"]]},
            {"self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"},
        ),
        (GPTQ | {"dynamic": {r"-:.*\.mlp\.": {}}}, ATTENTION),
        (GPTQ | {"dynamic": {r"model\.layers\.1\.mlp": {"bits": 8}, r"-:.*": {}}}, MLP),  # the first that matches
        (AWQ, ATTENTION | MLP),
        (AWQ | {"modules_to_not_convert": ["self_attn"]}, MLP),
        (
            AWQ | {"modules_to_not_convert": ["model.layers.0", "layers.1.mlp.up_proj"]},
            ATTENTION | MLP - {"mlp.up_proj"},
        ),
        (AWQ | {"modules_to_not_convert": ["attn", "up"]}, ATTENTION | MLP),  # parts of words are no modules
        (FP8, ATTENTION | MLP),
        (FP8 | {"modules_to_not_convert": ["lm_head", "model.layers.1"]}, set()),
        (FP8 | {"ignored_layers": ["lm_head", "re:.*mlp"]}, ATTENTION),
        (FP8 | {"modules_to_not_convert": ["model.norm"]}, {*ATTENTION, *MLP, "lm_head"}),
    ],
)
def test_lists_of_modules_are_honoured(settings: dict[str, Any], modules: set[str]):
    assert modules_of(settings) == modules


def test_layer_ten_is_not_layer_one():
    settings = AWQ | {"modules_to_not_convert": ["model.layers.1"]}
    assert modules_of(settings, 1, num_hidden_layers=12) == set()
    assert modules_of(settings, 10, num_hidden_layers=12) == ATTENTION | MLP


def test_names_win_over_patterns_and_patterns_over_classes():
    groups = [
        {"targets": ["Linear"], "weights": weights(num_bits=4, strategy="group", group_size=8)},
        {"targets": ["re:.*q_proj"], "weights": weights(strategy="group", group_size=4)},
        {"targets": ["model.layers.0.self_attn.q_proj"], "weights": weights(strategy="group", group_size=2)},
    ]
    for order in groups, groups[::-1]:
        matrices = read(ct(*order)).matrices
        groups_of = [
            matrices[f"model.layers.{layer}.self_attn.{name}_proj.weight"].packing.block[1]
            for layer, name in ((0, "q"), (1, "q"), (0, "k"))
        ]
        assert groups_of == [2, 4, 8]


def test_tied_head_is_no_matrix_of_its_own():
    assert modules_of(ct({}), tie_word_embeddings=True) == ATTENTION | MLP


def test_scales_of_keys_and_values_are_ignored_with_a_warning():
    quantized = read(ct({}, kv_cache_scheme=weights(type="float", strategy="tensor")))
    (warning,) = quantized.warnings
    assert warning.startswith("config.json: quantization_config.kv_cache_scheme is ignored: keys and values are stored")
    assert all(
        quantized.is_unused(f"model.layers.0.self_attn.{name}")
        for name in ("k_scale", "v_scale", "k_proj.output_scale")
    )
    assert not quantized.is_unused("model.layers.0.self_attn.k_proj.weight")
    assert not read({}).is_unused("model.layers.0.self_attn.k_scale")


def test_old_name_of_the_settings_is_read():
    assert read({**ct({})}, key="compression_config").matrices
    settings = ct({}, format="dense")
    del settings["quant_method"]
    with pytest.raises(InputError, match=r"compression_config\..*format 'dense' is not supported"):
        read(settings, key="compression_config")


def test_autofp8_has_one_scale_per_matrix_and_none_for_inputs_that_is_needed():
    quantized = read({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]})
    name = "model.layers.0.mlp.down_proj"
    assert set(quantized.matrices[f"{name}.weight"].parts) == {f"{name}.weight", f"{name}.weight_scale"}
    assert quantized.is_unused(f"{name}.input_scale")


# --- damaged checkpoints ---------------------------------------------------------------------------------------------


def damaged(tmp_path: Path, name: str, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    tensors = raw_tensors(GOLDEN / name)
    change(tensors)
    shutil.copy(GOLDEN / name / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def put(name: str, value: Any) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq", lambda t: t.pop(f"{K}.qzeros"), f"missing tensor {K}.qzeros [2, 4]"),
        ("awq", lambda t: t.pop(f"{K}.qweight"), f"missing tensor {K}.qweight [64, 4]"),
        ("ct_w4a16", lambda t: t.pop(f"{K}.weight_scale"), f"missing tensor {K}.weight_scale [32, 2]"),
        ("ct_w8a8", lambda t: t.pop(f"{K}.weight"), f"missing tensor {K}.weight [32, 64]"),
        (
            "ct_w4a16",
            put(f"{K}.weight_zero_point", np.zeros((4, 2), np.int32)),
            f"unexpected tensor {K}.weight_zero_point",
        ),
        ("awq", put(f"{K}.g_idx", np.zeros(64, np.int32)), f"unexpected tensor {K}.g_idx"),
        (
            "gptq",
            put(f"{K}.weight", np.zeros((32, 64), np.float16)),
            f"unexpected tensor {K}.weight, which quantization_config says is quantised",
        ),
        (
            "gptq",
            put(f"{K}.qweight", np.zeros((64, 4), np.int32)),
            f"tensor {K}.qweight has shape [64, 4], expected [8, 32]",
        ),
        (
            "ct_w8a8",
            put(f"{K}.weight", np.zeros((32, 64), np.float32)),
            f"tensor {K}.weight has dtype F32, expected I8",
        ),
        (
            "ct_fp8_block",
            put(f"{K}.weight_scale", np.zeros((1, 2), np.int32)),
            f"tensor {K}.weight_scale has dtype I32, expected F16 or BF16 or F32",
        ),
        (
            "ct_w8a8",
            put("lm_head.weight", np.zeros((64, 64), np.int8)),
            "tensor lm_head.weight has dtype I8, expected one of F64, F32, F16, BF16",
        ),
        ("ct_w8a8", lambda t: t.pop("model.norm.weight"), "missing tensor model.norm.weight [64]"),
    ],
)
def test_missing_unexpected_and_misshapen_parts_are_named(
    name: str, change: Callable[[dict[str, np.ndarray]], Any], message: str, tmp_path: Path
):
    checkpoint = open_checkpoint(str(damaged(tmp_path, name, change)))
    with pytest.raises(InputError) as caught:
        checkpoint.load_params("float32")
    assert str(caught.value) == f"{tmp_path / 'model.safetensors'}: {message}"


def test_all_problems_are_named_at_once(tmp_path: Path):
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors[f"{K}.qzeros"], tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.g_idx"]
        tensors["extra"] = np.zeros(1, np.float32)

    with pytest.raises(InputError) as caught:
        open_checkpoint(str(damaged(tmp_path, "gptq", change))).load_params("float32")
    assert str(caught.value).split(": ", 1)[1].split("; ") == [  # g_idx may be absent
        f"missing tensor {K}.qzeros [2, 4]",
        "missing tensor model.norm.weight [64]",
        "unexpected tensor extra",
    ]


@pytest.mark.parametrize("value", [np.zeros((2, 32), np.int32), None])
def test_layout_of_a_matrix_without_scales_is_refused(value: np.ndarray | None, tmp_path: Path):
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors[f"{K}.scales"]
        if value is not None:
            tensors[f"{K}.scales"] = value

    source, tensors = folder_of(damaged(tmp_path, "gptq", change))
    with pytest.raises(InputError, match=rf"model\.safetensors: .*tensor {K}\.scales"):
        source.layout(tensors[f"{K}.weight"])


def change_item(name: str, value: Any, index: Any = 0) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][index] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq", change_item(f"{K}.g_idx", 2), "g_idx must hold groups 0 to 1, has 0 to 2"),
        ("gptq", change_item(f"{K}.g_idx", -7), "g_idx must hold groups 0 to 1, has -7 to 1"),
        (
            "gptq",
            change_item(f"{K}.qzeros", 0x77777776),
            "qzeros hold a zero point of 7, but .*sym says that all are 8",
        ),
        (
            "gptq",
            put(f"{K}.bias", np.ones(32, np.float16)),
            "its bias is not zero, but config.json describes",
        ),
        ("ct_w4a16", change_item(f"{K}.weight_shape", 31), r"weight_shape says \[31, 64\], the model needs \[32, 64\]"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(
    name: str, change: Callable[[dict[str, np.ndarray]], Any], message: str, tmp_path: Path
):
    source, tensors = folder_of(damaged(tmp_path, name, change))
    assert source.inventory().problems == []
    reads: list[Callable[[Any, Tensor], Any]] = [lambda r, t: r.packed(t), lambda r, t: r.array(t, F32)]
    for read_it in reads:
        with source.open() as reader, pytest.raises(InputError, match=rf"model\.safetensors: {K}\.weight: {message}"):
            read_it(reader, tensors[f"{K}.weight"])
    with pytest.raises(InputError, match=message):
        open_checkpoint(str(tmp_path)).load_params("bfloat16")


def test_act_order_that_the_settings_hide_is_found_in_the_tensor(tmp_path: Path):
    source, tensors = folder_of(damaged(tmp_path, "gptq", change_item(f"{K}.g_idx", [1, 1], slice(2))))
    assert source.layout(tensors[f"{K}.weight"]) is None
    with pytest.raises(InputError, match=rf"{K}\.weight cannot be kept packed: its inputs are in act-order"):
        source.require_kept()


def test_order_of_minus_ones_is_none(tmp_path: Path):
    source, tensors = folder_of(damaged(tmp_path, "gptq", put(f"{K}.g_idx", np.full(64, -1, np.int32))))
    with source.open() as reader:
        numbers = expand(reader.packed(tensors[f"{K}.weight"]), np.float32, np)
    np.testing.assert_array_equal(numbers, expected_of("gptq")[f"{K}.weight"])


def test_biases_of_zero_in_early_gptq_files_are_no_biases_of_the_model(tmp_path: Path):
    path = damaged(tmp_path, "gptq", put(f"{K}.bias", np.zeros(32, np.float16)))
    params = open_checkpoint(str(path)).load_params("float32")
    assert not [keys for keys, _ in jax.tree.leaves_with_path(params) if "bias" in jax.tree_util.keystr(keys)]


def test_biases_of_a_model_that_has_them_stay_ordinary_tensors():
    config = tiny_config("qwen2", quantization_config=GPTQ)
    quantized = read_quantization(config, read_hf(config, source=""), source="")
    name = "model.layers.0.self_attn.q_proj"
    assert f"{name}.bias" in random_tensors(config)
    assert f"{name}.bias" not in quantized.matrices[f"{name}.weight"].parts
    assert not quantized.is_unused(f"{name}.bias")


def test_bias_beside_a_quantised_matrix_must_hold_floats(tmp_path: Path):
    config = tiny_config("qwen2", quantization_config=ct({}, ignore=["re:.*mlp", "lm_head", "re:.*o_proj"]))
    tensors: dict[str, Any] = random_tensors(config)
    for name in [name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        tensors[f"{name}_scale"] = np.ones((len(tensors[name]), 1), np.float32)
        tensors[name] = np.ones(tensors[name].shape, np.int8)
    assert open_checkpoint(str(write_folder(tmp_path, config, tensors))).load_params("float32")
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.int8)
    with pytest.raises(InputError, match=r"tensor model\.layers\.0\.self_attn\.q_proj\.bias has dtype I8"):
        open_checkpoint(str(write_folder(tmp_path, config, tensors))).load_params("float32")


def test_digest_is_that_of_configuration_and_weights(tmp_path: Path):
    shutil.copytree(GOLDEN / "gptq", tmp_path / "a")
    before = open_checkpoint(str(tmp_path / "a"))
    assert [file.name for file in before.files()] == ["config.json", "model.safetensors"]
    digest = before.digest
    config = tmp_path / "a" / "config.json"
    config.write_text(config.read_text().replace('"sym": true', '"sym": false'))
    assert open_checkpoint(str(tmp_path / "a")).digest != digest


def test_packed_matrices_own_what_they_hold():
    source, tensors = folder_of(GOLDEN / "ct_w8a8")
    with source.open() as reader:
        packed: QuantizedMatrix = reader.packed(tensors[f"{K}.weight"])
    numbers = expected_of("ct_w8a8")[f"{K}.weight"]  # after the file is closed
    np.testing.assert_array_equal(expand(packed, np.float32, np), numbers)
