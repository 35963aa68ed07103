"""Makes tiny GGUF files that llama.cpp quantised, and what llama.cpp computes with them.

It runs under Python 3.12 in an environment of its own; the first package compiles llama.cpp:

    python3.12 -m venv .venv_llama && .venv_llama/bin/pip install llama-cpp-python==0.3.36 gguf==0.19.0
    .venv_llama/bin/python tests/golden/make_quantized_gguf.py

The models are random, with the tokenizer of tiny/llama3. What it writes to quantized/gguf/, with T = 48 tokens:

    <kind>.gguf    Q4_K_M (with Q6_K, and Q5_0 where rows are no whole blocks of 256), Q5_K_M, Q8_0, Q4_0, Q4_1
    <kind>.npz     tokens [T];
                   logits [T, V] in float32, of the file that llama.cpp dequantises to float32;
                   quantized_logits [T, V] of the file itself, for which llama.cpp quantises activations too
    tensors.json   per file and tensor: its type, its shape, and the SHA-256 of the float32 numbers that llama.cpp
                   dequantises it to
    versions.json  what made them

The same versions give the same .gguf files again; logits may differ by rounding on another processor.
"""

import ctypes
import hashlib
import importlib.metadata
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

GOLDEN = Path(__file__).resolve().parent
FOLDER = GOLDEN / "quantized" / "gguf"
TOKENIZER = GOLDEN / "tiny" / "llama3" / "tokenizer.json"
TOKENS, VOCAB, LOGIT_STD = 48, 128, 2.5
NARROW = {"hidden": 64, "mlp": 128, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32, "tied": False}
MODELS: dict[str, dict[str, Any]] = {
    "Q8_0": NARROW,
    "Q4_0": NARROW,
    "Q4_1": NARROW,
    # Rows of attn_output have 128 numbers: llama.cpp stores them as Q5_0.
    "Q4_K_M": {"hidden": 256, "mlp": 256, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32, "tied": True},
    "Q5_K_M": {"hidden": 256, "mlp": 256, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 64, "tied": False},
}


def random_tensors(model: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Returns float32 tensors by llama.cpp's names; logits spread by about LOGIT_STD."""
    rng = np.random.default_rng(seed)
    hidden, mlp = model["hidden"], model["mlp"]
    queries, keys = model["heads"] * model["head_dim"], model["kv_heads"] * model["head_dim"]
    matrices = {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (mlp, hidden),
        "ffn_up": (mlp, hidden),
        "ffn_down": (hidden, mlp),
    }

    def matrix(outputs: int, inputs: int, std: float) -> np.ndarray:
        return rng.standard_normal((outputs, inputs), np.float32) * np.float32(std * inputs**-0.5)

    def norm() -> np.ndarray:
        return 0.5 + rng.random(hidden, np.float32)

    tensors = {"token_embd": matrix(VOCAB, hidden, LOGIT_STD), "output_norm": norm()}
    if not model["tied"]:
        tensors["output"] = matrix(VOCAB, hidden, LOGIT_STD)
    for layer in range(model["layers"]):
        for name, shape in matrices.items():
            tensors[f"blk.{layer}.{name}"] = matrix(*shape, 1.5 if name in ("attn_q", "attn_k") else 1)
        tensors |= {f"blk.{layer}.{name}": norm() for name in ("attn_norm", "ffn_norm")}
    return tensors


def write_float32(path: Path, model: dict[str, Any], seed: int) -> None:
    """Writes a random model in float32; its rows of q and k count as interleaved already."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(model["layers"])
    writer.add_context_length(512)
    writer.add_embedding_length(model["hidden"])
    writer.add_feed_forward_length(model["mlp"])
    writer.add_head_count(model["heads"])
    writer.add_head_count_kv(model["kv_heads"])
    writer.add_key_length(model["head_dim"])
    writer.add_value_length(model["head_dim"])
    writer.add_rope_dimension_count(model["head_dim"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    add_tokenizer(writer)
    for name, tensor in random_tensors(model, seed).items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    held = json.loads(TOKENIZER.read_text())
    special = {token["content"] for token in held["added_tokens"]}
    vocabulary = held["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    assert len(tokens) == VOCAB, len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in held["model"]["merges"]])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    writer.add_unk_token_id(tokens.index("<unk>"))
    writer.add_add_bos_token(False)


def requantize(source: Path, target: Path, kind: int) -> None:
    """Writes the file `source` in another of llama.cpp's kinds of files."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.allow_requantize = kind, 1, True
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings))
    assert status == 0, (source, target, kind, status)


def logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    """Returns logits [T, V] with keys and values in float32."""
    model = llama_cpp.Llama(
        str(path),
        n_ctx=64,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    model.eval(tokens.tolist())
    values = model.scores[: len(tokens)].copy()
    model.close()
    return values


def describe(packed: Path, dequantized: Path) -> dict[str, dict[str, Any]]:
    """Returns the rows of tensors.json of one file."""
    numbers = {tensor.name: tensor for tensor in gguf.GGUFReader(dequantized).tensors}
    rows = {}
    for tensor in gguf.GGUFReader(packed).tensors:
        assert numbers[tensor.name].tensor_type.name == "F32", numbers[tensor.name].tensor_type
        data = np.ascontiguousarray(numbers[tensor.name].data, "<f4")
        rows[tensor.name] = {
            "kind": tensor.tensor_type.name,
            "shape": list(data.shape),
            "sha256": hashlib.sha256(data.tobytes()).hexdigest(),
        }
    return rows


def make(name: str, seed: int, scratch: Path) -> dict[str, dict[str, Any]]:
    """Writes the files of one kind and returns its rows of tensors.json."""
    source, packed, dequantized = scratch / "float32.gguf", FOLDER / f"{name}.gguf", scratch / "dequantized.gguf"
    write_float32(source, MODELS[name], seed)
    requantize(source, packed, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}"))
    requantize(packed, dequantized, llama_cpp.LLAMA_FTYPE_ALL_F32)
    tokens = np.random.default_rng(seed).integers(5, VOCAB, TOKENS).astype(np.int32)
    exact, own = logits(dequantized, tokens), logits(packed, tokens)
    np.savez_compressed(FOLDER / f"{name}.npz", tokens=tokens, logits=exact, quantized_logits=own)
    rows = describe(packed, dequantized)
    kinds = sorted({row["kind"] for row in rows.values()})
    print(
        f"{name}: {packed.stat().st_size / 1e3:.0f} kB, {', '.join(kinds)}; logits std {exact.std():.2f}, "
        f"with quantised activations they differ by {np.abs(exact - own).max():.3f}, "
        f"with the original weights by {np.abs(exact - logits(source, tokens)).max():.3f}"
    )
    return rows


@llama_cpp.llama_log_callback
def be_quiet(level: int, text: bytes, user_data: Any) -> None:
    """Drops llama.cpp's own lines."""


def main() -> None:
    llama_cpp.llama_log_set(be_quiet, ctypes.c_void_p(0))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        rows = {name: make(name, seed, Path(scratch)) for seed, name in enumerate(MODELS)}
    (FOLDER / "tensors.json").write_text(json.dumps(rows, indent=1) + "\n")
    versions = {name: importlib.metadata.version(name) for name in ("llama-cpp-python", "gguf", "numpy")}
    versions["python"] = platform.python_version()
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
