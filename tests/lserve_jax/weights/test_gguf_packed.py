import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from lserve_jax.config.hf import read_hf
from lserve_jax.weights.gguf import GGUFFile
from lserve_jax.weights.gguf_packed import BLOCKS, LAYOUTS, unpack
from lserve_jax.weights.layout import Layout
from lserve_jax.weights.rules import Tensor, expected_tensors
from pallas_kernels.core.quantized_matrix import QuantizedMatrix, expand
from tests.lserve_jax.checkpoints import interleave, random_tensors, tiny_config, write_gguf

SCALES = ("d", "dmin", "m")  # the float16 fields of a block
WRITTEN = ("Q8_0", "Q4_0", "Q4_1")  # what the gguf package can quantise itself


def block_size(kind: str) -> int:
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of blocks with random bits everywhere but in float16 scales, which are ordinary numbers."""
    rng = np.random.default_rng(seed)
    count = columns // block_size(kind)
    data = rng.integers(0, 256, (rows, count * BLOCKS[kind].itemsize), dtype=np.uint8)
    blocks = data.view(BLOCKS[kind])
    for name in set(SCALES) & set(BLOCKS[kind].names or ()):
        blocks[name] = rng.standard_normal((rows, count)).astype(np.float16)
    return data


def assert_stands_for(matrix: QuantizedMatrix, expected: np.ndarray) -> None:
    """Asserts equality bit for bit, the signs of zeros included; one NaN is as good as another."""
    with np.errstate(invalid="ignore"):
        got = expand(matrix, np.float32, np)
    assert got.dtype == expected.dtype == np.float32
    assert matrix.shape == got.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    np.testing.assert_array_equal(got.view(np.uint32)[~np.isnan(got)], expected.view(np.uint32)[~np.isnan(expected)])


def dequantize(data: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return gguf.dequantize(data, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_fields_of_a_block_fill_it(kind: str):
    assert BLOCKS[kind].itemsize == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (64, 2), (5, 11)])
def test_random_bits_stand_for_the_numbers_of_gguf(kind: str, shape: tuple[int, int]):
    rows, columns = shape[0], shape[1] * block_size(kind)
    data = random_blocks(kind, rows, columns)
    assert_stands_for(unpack(data, kind, (rows, columns)), dequantize(data, kind))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_scale_of_float16_is_kept(kind: str):
    """Denormal, negative, infinite and no numbers, each with random codes and another offset."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    columns = 256
    data = random_blocks(kind, len(every) * block_size(kind) // columns, columns)
    blocks = data.view(BLOCKS[kind]).reshape(-1)
    for seed, name in enumerate(name for name in SCALES if name in (BLOCKS[kind].names or ())):
        blocks[name] = np.random.default_rng(seed).permutation(every) if seed else every
    assert_stands_for(unpack(data, kind, (len(data), columns)), dequantize(data, kind))


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("byte", [0x00, 0x0F, 0x55, 0x80, 0xFF])
def test_codes_of_one_byte_everywhere(kind: str, byte: int):
    """Zeros times negative scales, and the largest codes, whose carries would show in a neighbour."""
    data = np.full((2, 2 * BLOCKS[kind].itemsize), byte, np.uint8)
    blocks = data.view(BLOCKS[kind])
    for name in set(SCALES) & set(BLOCKS[kind].names or ()):
        blocks[name] = np.array([[-1.5, 2.0], [0.0, -0.0]], np.float16)
    assert_stands_for(unpack(data, kind, (2, 2 * block_size(kind))), dequantize(data, kind))


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("chunk", [1, 700, 5000])
def test_chunks_make_no_difference(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch):
    data = random_blocks(kind, 23, 512)
    whole = unpack(data, kind, (23, 512))
    monkeypatch.setattr("lserve_jax.weights.gguf_packed.CHUNK_BYTES", chunk)
    jax.tree.map(np.testing.assert_array_equal, unpack(data, kind, (23, 512)), whole)


@pytest.mark.parametrize("kind", WRITTEN)
def test_quantised_numbers(kind: str):
    numbers = np.random.default_rng(1).standard_normal((48, 96), np.float32)
    numbers[3] = 0
    numbers[4] *= 1e-7  # the scales are denormal, or zero
    data = gguf.quantize(numbers, gguf.GGMLQuantizationType[kind])
    assert_stands_for(unpack(data, kind, numbers.shape), dequantize(data, kind))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layout_is_that_of_the_matrix(kind: str):
    matrix = unpack(random_blocks(kind, 3, 768), kind, (3, 768))
    assert Layout.of(matrix) == LAYOUTS[kind]


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("blocks", [1, 3])
def test_layout_gives_shapes_and_dtypes(kind: str, blocks: int):
    shape = (5, blocks * block_size(kind))
    matrix = unpack(random_blocks(kind, *shape), kind, shape)
    described = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), matrix)
    assert described == LAYOUTS[kind].abstract(shape)
    assert matrix.shape == shape


@pytest.mark.parametrize("kind", LAYOUTS)
def test_mapped_memory_is_copied(kind: str, tmp_path: Path):
    """At an odd address, as nothing in a file is aligned for certain; afterwards the file may go."""
    data = random_blocks(kind, 6, 512)
    (tmp_path / "blocks").write_bytes(b"\x00" + data.tobytes())
    mapped = np.memmap(tmp_path / "blocks", mode="r")[1:].reshape(data.shape)
    matrix = unpack(mapped, kind, (6, 512))
    for leaf in jax.tree.leaves(matrix):
        assert type(leaf) is np.ndarray
        assert leaf.flags.c_contiguous
        assert leaf.flags.writeable
        assert not np.shares_memory(leaf, mapped)
    assert_stands_for(matrix, dequantize(data, kind))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_packed_matrices_take_little_more_than_the_file(kind: str):
    """Q5_K and Q6_K have a byte per code, and scales of 6 bits one each."""
    data = random_blocks(kind, 8, 2048)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(unpack(data, kind, (8, 2048))))
    most = {"Q4_K": 148 / 144, "Q5_K": 276 / 176, "Q6_K": 274 / 210}.get(kind, 1)
    assert held == round(data.nbytes * most)


# A file's tensors: rows of 32 everywhere, heads of 8.
CONFIG = tiny_config(num_attention_heads=8, num_key_value_heads=4, head_dim=8)


def tensors_of(config: dict) -> dict[str, Tensor]:
    return {tensor.names["gguf"]: tensor for tensor in expected_tensors(read_hf(config, source="test"))}


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_file_reads_the_same_numbers_packed_and_as_arrays(kind: str, family: str, tmp_path: Path):
    """Only llama.cpp's `llama` interleaves the rows of rotary matrices."""
    config = CONFIG | {"architectures": tiny_config(family)["architectures"], "model_type": family}
    written = random_tensors(config)
    file = GGUFFile(write_gguf(tmp_path / "model.gguf", config, written, architecture=family, kind=kind))
    qtype = gguf.GGMLQuantizationType[kind]
    with file.open() as read:
        for tensor in tensors_of(config).values():
            original = written[tensor.names["hf"]]
            if original.ndim == 1:
                assert file.layout(tensor) is None
                np.testing.assert_array_equal(read.array(tensor, np.dtype(np.float32)), original)
                continue
            assert file.layout(tensor) == LAYOUTS[kind]
            expected = gguf.dequantize(gguf.quantize(original, qtype), qtype)
            assert tensor.file_shape == expected.shape
            np.testing.assert_array_equal(read.array(tensor, np.dtype(np.float32)), expected)
            assert_stands_for(read.packed(tensor), expected)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q5_0", "Q5_1"])
def test_numbers_and_other_types_have_no_layout(kind: str, tmp_path: Path):
    file = GGUFFile(write_gguf(tmp_path / "model.gguf", CONFIG, random_tensors(CONFIG), kind=kind))
    assert {file.layout(tensor) for tensor in tensors_of(CONFIG).values()} == {None}


def test_missing_tensors_have_no_layout(tmp_path: Path):
    """The inventory tells of them."""
    written = random_tensors(CONFIG)
    del written["lm_head.weight"]
    file = GGUFFile(write_gguf(tmp_path / "model.gguf", CONFIG, written, kind="Q8_0"))
    assert file.layout(tensors_of(CONFIG)["output.weight"]) is None


GOLDEN = Path(__file__).parents[2] / "golden" / "quantized" / "gguf"
TENSORS: dict[str, dict[str, dict[str, Any]]] = json.loads((GOLDEN / "tensors.json").read_text())


def sha256(numbers: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(numbers, "<f4").tobytes()).hexdigest()


def test_the_files_of_llama_cpp_have_every_kind():
    kinds = {row["kind"] for rows in TENSORS.values() for row in rows.values()}
    assert kinds == {*LAYOUTS, "Q5_0", "F32"}


@pytest.mark.parametrize("name", TENSORS)
def test_files_of_llama_cpp_hold_its_own_numbers(name: str):
    """Each tensor, packed and as an array, has the checksum of what llama.cpp itself dequantises."""
    file = GGUFFile(GOLDEN / f"{name}.gguf")
    config = read_hf(file.hf_config(), source=name)
    tensors = {tensor.names["gguf"]: tensor for tensor in expected_tensors(config)}
    assert tensors.keys() == TENSORS[name].keys()
    with file.open() as read:
        for key, row in TENSORS[name].items():
            tensor = tensors[key]
            layout = LAYOUTS.get(row["kind"])
            assert file.layout(tensor) == layout
            held = [read.array(tensor, np.dtype(np.float32))]
            if layout is not None:
                held.append(expand(read.packed(tensor), np.float32, np))
            for numbers in held:
                in_order = interleave(numbers, config.head_dim) if tensor.is_rotary else numbers
                assert in_order.shape == tuple(row["shape"])
                assert sha256(in_order) == row["sha256"], key


def test_other_rows_of_a_golden_file_have_another_checksum():
    """The rows of q are not in the file's order: the check above would see a wrong order."""
    file = GGUFFile(GOLDEN / "Q4_K_M.gguf")
    tensors = {tensor.names["gguf"]: tensor for tensor in expected_tensors(read_hf(file.hf_config(), source="Q4_K_M"))}
    with file.open() as read:
        numbers = expand(read.packed(tensors["blk.0.attn_q.weight"]), np.float32, np)
    assert sha256(numbers) != TENSORS["Q4_K_M"]["blk.0.attn_q.weight"]["sha256"]
