import logging
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lserve_jax.config.errors import InputError
from lserve_jax.config.hf import read_hf
from lserve_jax.config.model import RopeConfig
from lserve_jax.engine.setup import prepare
from lserve_jax.weights import open_checkpoint
from lserve_jax.weights.gguf import GGUFFile
from lserve_jax.weights.gguf_config import NEUTRAL_VALUES
from tests.lserve_jax.checkpoints import (
    assert_same_tree,
    manual_params,
    random_tensors,
    tiny_config,
    write_gguf,
)
from tests.lserve_jax.weights.test_rules import CONFIGS, Heads

CONFIG = tiny_config()
ARCHITECTURES = {"llama": "llama", "tied": "llama", "biased": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
QUANTISABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def dequantised(tensors: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """What a file in `kind` holds of `tensors`; blocks lie along rows, so that moving rows changes nothing."""
    if kind == "F32":
        return tensors
    qtype = gguf.GGMLQuantizationType[kind]
    return {
        name: gguf.dequantize(gguf.quantize(tensor, qtype), qtype) if tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_config_and_tensors_are_those_of_the_hugging_face_checkpoint(name: str, path: Path):
    config, tensors = CONFIGS[name], random_tensors(CONFIGS[name])
    write_gguf(path, config, tensors, architecture=ARCHITECTURES[name])
    checkpoint = open_checkpoint(str(path))
    expected = read_hf(config, source=name)
    assert checkpoint.config == expected
    assert_same_tree(checkpoint.load_params("float32"), manual_params(config, tensors))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_are_permuted_as_by_hand(name: str, path: Path):
    config, tensors = CONFIGS[name], random_tensors(CONFIGS[name])
    orders = ((1, 2, 0), (2, 1, 0), (0, 1, 2))
    write_gguf(path, config, tensors, architecture=ARCHITECTURES[name])
    params = open_checkpoint(str(path)).load_params("float32", Heads(*orders))
    assert_same_tree(params, manual_params(config, tensors, orders))


@pytest.mark.parametrize("kind", QUANTISABLE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_type_that_can_be_written_is_dequantised(kind: str, dtype: str, path: Path):
    config = tiny_config(num_attention_heads=8, num_key_value_heads=4)  # rows of 32 everywhere: whole blocks
    tensors = random_tensors(config)
    write_gguf(path, config, tensors, kind=kind)
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.config.dtype == ("float32" if kind == "F32" else "bfloat16")
    assert_same_tree(checkpoint.load_params(dtype), manual_params(config, dequantised(tensors, kind)), dtype)


def q4_k_block() -> tuple[bytes, np.ndarray]:
    """256 weights: scale 0.5, the 8 groups' scales 1..4, 9..12, all minima 0, all nibbles 3 (low) and 5 (high)."""
    low_scales, high_scales = bytes([1, 2, 3, 4]), bytes([9, 10, 11, 12])
    block = np.array([0.5, 0.0], np.float16).tobytes() + low_scales + bytes(4) + high_scales + bytes([0x53] * 128)
    scales = np.array([1, 2, 3, 4, 9, 10, 11, 12], np.float32)
    return block, np.concatenate([np.full(32, 0.5 * scale * q) for scale, q in zip(scales, [3, 5] * 4, strict=True)])


def q6_k_block() -> tuple[bytes, np.ndarray]:
    """256 weights: scale 0.25, the 16 groups' scales -8..7, quants 0 (2 * 16 - 32) in the first half and -32 after."""
    scales = np.arange(-8, 8, dtype=np.int8)
    high_bits = bytes([0b10101010] * 32) + bytes(32)
    block = bytes(128) + high_bits + scales.tobytes() + np.array([0.25], np.float16).tobytes()
    quants = np.repeat(np.array([0, -32], np.float32), 128)
    return block, 0.25 * np.repeat(scales.astype(np.float32), 16) * quants


@pytest.mark.parametrize(("kind", "make"), [("Q4_K", q4_k_block), ("Q6_K", q6_k_block)])
def test_k_quants_are_dequantised(kind: str, make: Any, path: Path):
    block, values = make()
    qtype = gguf.GGMLQuantizationType[kind]
    config = tiny_config(hidden_size=256, num_hidden_layers=1)
    tensors = random_tensors(config)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.tile(values.astype(np.float32), (64, 1))
    rows = np.tile(np.frombuffer(block, np.uint8), (64, 1))
    replaced = {key: value for key, value in tensors.items() if key != name}
    add_and_write(path, config, replaced, "blk.0.ffn_up.weight", rows, qtype)
    assert_same_tree(open_checkpoint(str(path)).load_params("float32"), manual_params(config, tensors))


def add_and_write(
    path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], name: str, data: np.ndarray, qtype: Any = None
) -> None:
    """`write_gguf` with one tensor more, as it shall lie in the file."""
    with pytest.MonkeyPatch.context() as patch:
        original = gguf.GGUFWriter.write_header_to_file

        def with_extra(writer: gguf.GGUFWriter) -> None:
            writer.add_tensor(name, data, raw_dtype=qtype)
            original(writer)

        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_extra)
        write_gguf(path, config, tensors)


def test_tensors_larger_than_a_chunk_are_read_whole(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lserve_jax.weights.gguf.CHUNK_BYTES", 7 * 32 * 4)
    tensors = random_tensors(CONFIG)
    write_gguf(path, CONFIG, tensors)
    assert_same_tree(open_checkpoint(str(path)).load_params("float32"), manual_params(CONFIG, tensors))


def test_metadata_of_the_tokenizer_is_handed_on(path: Path):
    metadata = {
        "tokenizer.ggml.tokens": ["<s>", "é"],
        "tokenizer.ggml.token_type": [3, 1],
        "tokenizer.ggml.add_bos_token": False,
    }
    write_gguf(path, CONFIG, random_tensors(CONFIG), metadata=metadata)
    source = open_checkpoint(str(path)).tokenizer_source
    assert isinstance(source, dict)
    assert metadata.items() <= source.items()


def test_every_end_token_is_kept(path: Path):
    metadata = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2}
    write_gguf(path, CONFIG, random_tensors(CONFIG), metadata=metadata)
    assert open_checkpoint(str(path)).config.eos_token_ids == (2, 7)


def test_vocabulary_is_counted_where_its_size_is_not_given(path: Path):
    metadata = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(40)]}
    write_gguf(path, CONFIG, random_tensors(CONFIG), metadata=metadata, drop=("vocab_size", "attention.key_length"))
    with pytest.raises(ValueError, match=r"rope\.dimension_count must equal the head size 5, got 4"):
        open_checkpoint(str(path))
    write_gguf(path, CONFIG, random_tensors(CONFIG), metadata=metadata, drop=("vocab_size",))
    assert open_checkpoint(str(path)).config.vocab_size == 40


def rope_of(path: Path, **metadata: Any) -> RopeConfig:
    write_gguf(
        path,
        CONFIG,
        random_tensors(CONFIG),
        metadata={f"llama.rope.scaling.{key}": value for key, value in metadata.items()},
    )
    return open_checkpoint(str(path)).config.rope


def test_rope_scaling_metadata(path: Path):
    assert rope_of(path, type="none") == RopeConfig()
    assert rope_of(path, type="linear", factor=4.0) == RopeConfig(kind="linear", factor=4.0)
    assert rope_of(
        path, type="yarn", factor=4.0, original_context_length=64, yarn_beta_fast=16.0, yarn_attn_factor=1.0
    ) == RopeConfig(kind="yarn", factor=4.0, original_max_position=64, beta_fast=16.0)


def test_rope_scaling_that_is_not_known_is_refused(path: Path):
    with pytest.raises(ValueError, match="RoPE kind 'longrope' is not supported"):
        rope_of(path, type="longrope", factor=4.0)
    with pytest.raises(ValueError, match=r"llama\.rope\.scaling\.yarn_attn_factor = 0\.5 is not supported"):
        rope_of(path, type="yarn", factor=4.0, yarn_attn_factor=0.5)


def llama3_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """By how much Llama 3.1 stretches each wavelength: 1 below 8192/4 tokens, `factor` above 8192, a ramp between."""
    factors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recognised_by_its_factors(factor: float, path: Path):
    config = tiny_config(head_dim=64, rope_theta=5e5)
    tensors = random_tensors(config)
    add_and_write(path, config, tensors, "rope_freqs.weight", llama3_factors(5e5, 64, factor))
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.config.rope == RopeConfig(kind="llama3", theta=5e5, factor=factor, original_max_position=8192)
    assert_same_tree(checkpoint.load_params("float32"), manual_params(config, tensors))


def test_rope_factors_of_one_change_nothing_and_unknown_ones_are_refused(path: Path):
    config = tiny_config(head_dim=64, rope_theta=5e5)
    add_and_write(path, config, random_tensors(config), "rope_freqs.weight", np.ones(32, np.float32))
    assert open_checkpoint(str(path)).config.rope == RopeConfig(theta=5e5)
    add_and_write(path, config, random_tensors(config), "rope_freqs.weight", llama3_factors(5e5, 64, 16.0))
    with pytest.raises(
        ValueError, match=r"rope_freqs\.weight are not those of a known Llama 3 RoPE \(8/1/4/8192 or 32"
    ):
        open_checkpoint(str(path))


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        ({"factor": 4.0}, RopeConfig(kind="linear", factor=4.0)),
        ({"factor": 4.0, "type": "none"}, RopeConfig()),
        ({"factor": 1.0}, RopeConfig()),
        ({"factor": 0.0}, RopeConfig()),
        ({"type": "linear"}, RopeConfig()),
        ({"type": "none", "finetuned": True, "attn_factor": 1.0, "yarn_ext_factor": -1.0}, RopeConfig()),
    ],
)
def test_a_factor_means_what_llama_cpp_takes_it_for(metadata: dict[str, Any], rope: RopeConfig, path: Path):
    assert rope_of(path, **metadata) == rope


def test_the_old_name_of_the_linear_factor_is_read_where_the_new_one_is_absent(path: Path):
    write_gguf(path, CONFIG, random_tensors(CONFIG), metadata={"llama.rope.scale_linear": 4.0})
    assert open_checkpoint(str(path)).config.rope == RopeConfig(kind="linear", factor=4.0)
    both = {"llama.rope.scale_linear": 4.0, "llama.rope.scaling.factor": 2.0}
    write_gguf(path, CONFIG, random_tensors(CONFIG), metadata=both)
    assert open_checkpoint(str(path)).config.rope == RopeConfig(kind="linear", factor=2.0)


@pytest.mark.parametrize(
    ("name", "window", "context", "family"),
    [
        ("llama", 64, 64, "mistral"),
        ("qwen2", 64, 64, "qwen2"),
        ("qwen3", 64, 64, "qwen3"),
        ("llama", 0, 256, "llama"),
        ("qwen2", 512, 256, "qwen2"),
    ],
)
def test_the_context_ends_at_the_sliding_window(name: str, window: int, context: int, family: str, path: Path):
    config, tensors = CONFIGS[name], random_tensors(CONFIGS[name])
    metadata = {f"{name}.attention.sliding_window": window, f"{name}.attention.sliding_window_pattern": [True, False]}
    write_gguf(path, config, tensors, architecture=name, metadata=metadata)
    checkpoint = open_checkpoint(str(path))
    assert (checkpoint.config.max_context, checkpoint.config.architecture) == (context, family)
    assert checkpoint.warnings == ()
    assert_same_tree(checkpoint.load_params("float32"), manual_params(config, tensors))


@pytest.mark.parametrize("key", NEUTRAL_VALUES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_metadata_that_changes_the_function_is_refused_and_its_neutral_value_is_not(key: str, name: str, path: Path):
    config, tensors = CONFIGS[name], random_tensors(CONFIGS[name])
    for neutral in NEUTRAL_VALUES[key]:
        value = float(neutral) if "factor" in key else neutral
        write_gguf(path, config, tensors, architecture=name, metadata={f"{name}.{key}": value})
        assert open_checkpoint(str(path)).config == read_hf(config, source=name)
    other = {bool: lambda value: not value, str: lambda value: "gelu"}.get(type(neutral), lambda value: 7)(neutral)
    write_gguf(path, config, tensors, architecture=name, metadata={f"{name}.{key}": other})
    with pytest.raises(InputError, match=rf"model\.gguf: {name}\.{key} = {other!r} is not supported$"):
        open_checkpoint(str(path))


@pytest.mark.parametrize(("scale", "is_read"), [(0.0, True), (0.5, True), (0.4, False), (1.0, False)])
def test_the_scale_of_attention_must_be_that_of_the_head_size(scale: float, is_read: bool, path: Path):
    write_gguf(path, CONFIG, random_tensors(CONFIG), metadata={"llama.attention.scale": scale})
    if is_read:  # the head size is 4
        assert open_checkpoint(str(path)).config == read_hf(CONFIG, source="hf")
    else:
        with pytest.raises(InputError, match=rf"llama\.attention\.scale = {scale} is not supported, only head size"):
            open_checkpoint(str(path))


def test_metadata_that_nobody_knows_is_warned_of_once(path: Path, caplog: pytest.LogCaptureFixture):
    write_gguf(path, CONFIG, random_tensors(CONFIG), metadata={"llama.foo": [1, 2], "llama.attention.bar": "x"})
    checkpoint = open_checkpoint(str(path))
    line = "unknown metadata may change what the model computes and is ignored: "
    assert checkpoint.warnings == (f"{path}: {line}'llama.attention.bar' = 'x', 'llama.foo' = [1, 2]",)
    with caplog.at_level(logging.WARNING, "lserve_jax"):
        prepare(str(path), attention="dense").warn()
    assert [record.message for record in caplog.records] == list(checkpoint.warnings)


def test_what_files_say_of_their_origin_is_no_doubt(path: Path, embedded_gguf: Path):
    metadata = {"general.finetune": "x", "quantize.imatrix.file": "y", "llama.pooling_type": 0, "other.foo": 1}
    write_gguf(path, CONFIG, random_tensors(CONFIG), metadata=metadata)
    assert open_checkpoint(str(path)).warnings == ()
    assert open_checkpoint(str(embedded_gguf)).warnings == ()


def test_unknown_architecture_is_named_with_the_known_ones(path: Path):
    write_gguf(path, CONFIG, random_tensors(CONFIG), architecture="gemma2")
    with pytest.raises(
        ValueError, match=r"model\.gguf: architecture 'gemma2' is not supported; known: LlamaForCausalLM"
    ):
        open_checkpoint(str(path))


def test_missing_metadata_is_all_named(path: Path):
    write_gguf(path, CONFIG, random_tensors(CONFIG), drop=("embedding_length", "context_length"))
    with pytest.raises(ValueError, match=r"missing required metadata: llama\.embedding_length, llama\.context_length"):
        open_checkpoint(str(path))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, r"llama\.expert_count = 8 is not supported"),
        ({"llama.attention.head_count": 0}, r"llama\.attention\.head_count must be a positive integer, got 0"),
        ({"llama.block_count": "three"}, r"llama\.block_count must be a positive integer, got 'three'"),
        ({"llama.rope.dimension_count": 2}, r"llama\.rope\.dimension_count must equal the head size 4, got 2"),
        ({"llama.attention.head_count_kv": [3, 2, 3]}, r"llama\.attention\.head_count_kv differs between layers"),
        ({"split.count": 3}, "split GGUF files are not read; join them"),
    ],
)
def test_metadata_of_what_is_not_supported_is_refused(metadata: dict[str, Any], message: str, path: Path):
    write_gguf(path, CONFIG, random_tensors(CONFIG), metadata=metadata)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(str(path))


def test_one_value_for_each_layer_is_taken_where_all_agree(path: Path):
    write_gguf(path, CONFIG, random_tensors(CONFIG), metadata={"llama.attention.head_count_kv": [3, 3, 3]})
    assert open_checkpoint(str(path)).config.num_kv_heads == 3


def test_part_of_a_split_file_is_refused_by_its_name(tmp_path: Path):
    path = tmp_path / "model-00001-of-00002.gguf"
    write_gguf(path, CONFIG, random_tensors(CONFIG))
    with pytest.raises(ValueError, match="split GGUF files are not read"):
        open_checkpoint(str(path))


def test_missing_unexpected_and_misshapen_tensors_are_all_named_at_once(path: Path):
    tensors = random_tensors(CONFIG)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.ones(33, np.float32)
    add_and_write(path, CONFIG, tensors, "blk.0.attn_sinks.weight", np.ones(3, np.float32))
    with pytest.raises(ValueError, match="missing tensor") as caught:
        open_checkpoint(str(path)).load_params("float32")
    assert str(caught.value) == (
        f"{path}: missing tensor blk.1.ffn_up.weight [64, 32]; unexpected tensor blk.0.attn_sinks.weight; "
        "tensor output_norm.weight has shape [33], expected [32]"
    )


def test_tensor_of_a_type_that_is_not_read_is_named(path: Path):
    tensors = random_tensors(CONFIG)
    del tensors["model.norm.weight"]
    add_and_write(path, CONFIG, tensors, "output_norm.weight", np.ones(32, np.int8))
    with pytest.raises(ValueError, match=r"model\.gguf: tensor output_norm\.weight has type I8, which is not read$"):
        open_checkpoint(str(path)).load_params("float32")


def test_file_cut_short_anywhere_is_named(path: Path):
    metadata = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 1]}
    whole = write_gguf(path, CONFIG, random_tensors(CONFIG), metadata=metadata).read_bytes()
    header = whole.index(b"blk.2.ffn_down.weight") + 200
    cuts = [*range(0, header, 37), *range(header, len(whole) - 1, 9973), len(whole) - 1]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"model\.gguf: truncated or not a GGUF file") as caught:
            open_checkpoint(str(path))
        assert "\n" not in str(caught.value)


def test_embedded_file_loads_as_its_published_model(embedded_gguf: Path):
    checkpoint = open_checkpoint(str(embedded_gguf))
    config = checkpoint.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (576, 1536, 49152)
    assert config.tie_embeddings
    assert config.eos_token_ids == (2,)
    params = checkpoint.load_params("bfloat16")
    assert params["embed"]["embedding"].shape == (49152, 576)
    assert all(
        bool(np.isfinite(np.asarray(leaf, np.float32)).all())
        for leaf in params["layers_29"]["mlp"]["gate_up_proj"].values()
    )


def test_writer_of_these_tests_interleaves_as_llama_cpp_does(path: Path):
    """The rows of a head of 4 in the order 0, 2, 1, 3, read back without the loader."""
    tensors = random_tensors(CONFIG)
    write_gguf(path, CONFIG, tensors)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    rows = tensors["model.layers.0.self_attn.k_proj.weight"][4:8]
    np.testing.assert_array_equal(stored["blk.0.attn_k.weight"][4:8], rows[[0, 2, 1, 3]])


def test_arrays_of_metadata_are_what_the_library_reads(path: Path):
    metadata = {
        "tokenizer.ggml.tokens": ["a", "", "\u00fc\u0120", "x" * 300],
        "tokenizer.ggml.token_type": [1, 3, 6, 1],
        "tokenizer.ggml.scores": [0.5, -1.25, 0.0, 3.0],
    }
    write_gguf(path, CONFIG, random_tensors(CONFIG), metadata=metadata)
    found, expected = GGUFFile(path).metadata, gguf.GGUFReader(path).fields
    for name, value in metadata.items():
        assert found[name] == expected[name].contents() == value


def test_files_are_read_without_the_reader_of_the_library(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its reader is slow for vocabularies, and all that could be replaced is private and changes with versions."""
    tensors = random_tensors(CONFIG)
    write_gguf(path, CONFIG, tensors, kind="F16")
    monkeypatch.delattr(gguf, "GGUFReader")
    monkeypatch.delattr(gguf, "ReaderField")
    params = open_checkpoint(str(path)).load_params("float32")
    assert_same_tree(params, manual_params(CONFIG, dequantised(tensors, "F16")))


def test_values_of_every_type_are_what_the_library_reads(path: Path):
    writer = gguf.GGUFWriter(path, "llama")
    values = {"uint8": 200, "int8": -5, "uint16": 65000, "int16": -300, "uint32": 2**31, "int32": -(2**30)}
    values |= {"uint64": 2**40, "int64": -(2**40), "float32": 0.1, "float64": 0.1, "bool": True, "string": "é\0x"}
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_array("x.nested", [[1, 2], [3]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = GGUFFile(path).metadata
    for kind, value in values.items():
        assert metadata[f"x.{kind}"] == value
        assert type(metadata[f"x.{kind}"]) is type(value)
    assert metadata["x.nested"] == [[1, 2], [3]]


def edited(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    return path


def test_headers_that_are_not_those_of_a_gguf_file_are_refused_in_one_line(path: Path):
    def write() -> Path:
        return write_gguf(path, CONFIG, random_tensors(CONFIG), metadata={"llama.zz": 1, "llama.zy": 1})

    def error_of(file: Path) -> str:
        with pytest.raises(InputError, match=r"\A.*model\.gguf: .+\Z") as caught:
            open_checkpoint(str(file))
        return str(caught.value).split("gguf: ", 1)[1]

    begin = b"GGUF" + struct.pack("<I", 3)
    assert "version 1 of GGUF, only 2 and 3 are read" in error_of(
        edited(write(), begin, b"GGUF" + struct.pack("<I", 1))
    )
    assert "written in the other byte order" in error_of(edited(write(), begin, b"GGUF" + struct.pack(">I", 3)))
    assert "does not begin with GGUF" in error_of(edited(write(), begin, b"GGML" + struct.pack("<I", 3)))
    assert "metadata 'llama.zz' stands there twice" in error_of(edited(write(), b"llama.zy", b"llama.zz"))
    assert "tensor 'blk.0.attn_k.weight' stands there twice" in error_of(
        edited(write(), b"blk.0.attn_q.weight", b"blk.0.attn_k.weight")
    )
    assert "truncated or not a GGUF file" in error_of(edited(write(), b"llama.zy", b"llama.\xff\xfe"))
    path.write_bytes(b"")
    assert "truncated or not a GGUF file" in error_of(path)


def test_a_type_of_tensors_that_the_library_does_not_know_is_named(path: Path):
    write_gguf(path, CONFIG, random_tensors(CONFIG))
    place = b"output_norm.weight" + struct.pack("<IQI", 1, 32, 0)
    edited(path, place, place[:-4] + struct.pack("<I", 999))
    with pytest.raises(InputError, match=r"tensor output_norm\.weight has type 999, which is not read$"):
        open_checkpoint(str(path)).load_params("float32")


def test_a_file_that_may_not_be_read_is_named(path: Path, monkeypatch: pytest.MonkeyPatch):
    write_gguf(path, CONFIG, random_tensors(CONFIG))

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "memmap", refuse)  # tests may run as root, who may read everything
    with pytest.raises(InputError, match=r"model\.gguf: cannot be read \(Permission denied\)$"):
        open_checkpoint(str(path))
