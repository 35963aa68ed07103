"""Makes tiny quantised checkpoints with the library that owns each format, and what that library reads from them.

It runs under Python 3.11 in an environment of its own, never in the product's:

    python3.11 -m venv .venvq && .venvq/bin/pip install -r tests/golden/requirements_quantized.txt
    .venvq/bin/pip install --no-deps autoawq==0.2.9 gptqmodel==7.7.0
    .venvq/bin/python tests/golden/make_quantized_hf.py

(autoawq and gptqmodel name dependencies for training that nothing here imports; gptqmodel is built from its source
distribution, which needs no CUDA.) What it writes, with 2 layers, width 64, 96 in the MLP, one KV head of 32, V = 64:

    quantized/<name>/config.json             as the library writes it
    quantized/<name>/model.safetensors       the checkpoint
    quantized/<name>/expected.safetensors    some matrices [F, D] in float32, as the library dequantises them

Scales are widened to float32 before the library dequantises: its own rounding to the scales' type is left out. A random
group of every GPTQ and AWQ matrix is moved to one side of zero, where its zero point is 0 or 15.
"""

import argparse
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent / "quantized"
# The matrices in expected.safetensors, of different shapes; their layers may have different formats.
EXPECTED = ("self_attn.k_proj", "mlp.down_proj")
LINEAR = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]

Tensors = dict[str, torch.Tensor]


def make_model(dtype: torch.dtype) -> LlamaForCausalLM:
    """Returns a random Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def is_expected(module: str) -> bool:
    return module.endswith(EXPECTED) or module == "lm_head"


# compressed-tensors


def int_weights(bits: int, **changes: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel", **changes}


TOKEN_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FLOAT_WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True}
FLOAT_TOKENS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def linear(**scheme: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], **scheme}}


# name -> (dtype of the model and its scales, groups of modules, ignored modules)
COMPRESSED: dict[str, tuple[torch.dtype, dict[str, Any], list[str]]] = {
    "ct_w8a8": (torch.bfloat16, linear(weights=int_weights(8), input_activations=TOKEN_INPUTS), ["lm_head"]),
    "ct_w8a16_asymmetric": (torch.float16, linear(weights=int_weights(8, symmetric=False)), ["lm_head"]),
    "ct_w4a16": (
        torch.bfloat16,
        linear(weights=int_weights(4, strategy="group", group_size=32)),
        ["lm_head", "re:.*layers.1.mlp.(gate|up)_proj"],
    ),
    "ct_w4a16_asymmetric": (
        torch.float16,
        linear(weights=int_weights(4, strategy="group", group_size=32, symmetric=False)),
        ["lm_head"],
    ),
    "ct_mixed": (
        torch.float32,
        {
            "group_0": {
                "targets": ["re:.*mlp.*", "model.layers.1.self_attn.k_proj"],
                "weights": int_weights(4),
                "format": "pack-quantized",
            },
            "group_1": {
                "targets": ["Linear"],
                "weights": int_weights(8),
                "input_activations": TOKEN_INPUTS,
                "format": "int-quantized",
            },
        },
        [],
    ),
    "ct_fp8_channel": (
        torch.bfloat16,
        linear(weights={**FLOAT_WEIGHTS, "strategy": "channel"}, input_activations=FLOAT_TOKENS),
        ["lm_head"],
    ),
    "ct_fp8_tensor": (
        torch.bfloat16,
        linear(
            weights={**FLOAT_WEIGHTS, "strategy": "tensor"},
            input_activations={"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"},
        ),
        ["lm_head"],
    ),
    "ct_fp8_block": (
        torch.bfloat16,
        linear(
            weights={**FLOAT_WEIGHTS, "strategy": "block", "block_structure": [40, 48]},
            input_activations=FLOAT_TOKENS,
        ),
        ["lm_head"],
    ),
}


def set_qparams(module: torch.nn.Module) -> None:
    """Sets the scales and zero points of one module to the range of its weights."""
    args = module.quantization_scheme.weights
    weight = module.weight.detach().float()
    rows, inputs = weight.shape
    height, width = {
        "tensor": (rows, inputs),
        "channel": (1, inputs),
        "group": (1, args.group_size),
        "block": tuple(args.block_structure or (1, 1)),
    }[args.strategy]
    grid = [band.split(width, 1) for band in weight.split(height, 0)]
    least = torch.tensor([[block.min() for block in band] for band in grid])
    most = torch.tensor([[block.max() for block in band] for band in grid])
    scale, zero = calculate_qparams(least, most, args)
    with torch.no_grad():
        module.weight_scale.copy_(scale.reshape(module.weight_scale.shape))
        if getattr(module, "weight_zero_point", None) is not None:
            module.weight_zero_point.copy_(zero.reshape(module.weight_zero_point.shape))
        if getattr(module, "input_scale", None) is not None:
            module.input_scale.fill_(0.5)


def make_compressed(name: str, folder: Path) -> None:
    """Writes a checkpoint of compressed-tensors."""
    dtype, groups, ignore = COMPRESSED[name]
    model = make_model(dtype)
    status = QuantizationStatus.FROZEN
    config = QuantizationConfig(config_groups=groups, ignore=ignore, quantization_status=status)
    apply_quantization_config(model, config)
    quantized = {name: one for name, one in model.named_modules() if getattr(one, "quantization_scheme", None)}
    for module in quantized.values():
        set_qparams(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder, state_dict=model.state_dict())
    compressor.update_config(folder)
    held = load_file(folder / "model.safetensors")
    expected = {}
    for module, one in quantized.items():
        if is_expected(module):
            own = {key.removeprefix(f"{module}."): value for key, value in held.items() if key.startswith(f"{module}.")}
            own["weight_scale"] = own["weight_scale"].float()
            scheme = one.quantization_scheme
            decompressor = BaseCompressor.get_value_from_registry(scheme.format)
            expected[f"{module}.weight"] = decompressor.decompress(own, scheme)["weight"].float().contiguous()
    save_file(expected, folder / "expected.safetensors")


# GPTQ and AWQ


def qparams(weight: torch.Tensor, group: int, bits: int, *, is_symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scales in float16 and zero points, both [F, D // group], of a plain rounding to nearest."""
    grouped = weight.float().reshape(len(weight), -1, group)
    most = (1 << bits) - 1
    if is_symmetric:
        scale = grouped.abs().amax(-1) * 2 / most
        zero = torch.full_like(scale, (most + 1) // 2)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = (high - low) / most
        zero = torch.round(-low / scale)
    return scale.half().float(), zero


def one_sided(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Returns the weights with the first group of some outputs above or below zero."""
    weight = weight.clone()
    weight[3::8, :group] = weight[3::8, :group].abs() + 0.01
    weight[5::16, -group:] = -weight[5::16, -group:].abs() - 0.01
    return weight


# name -> (bits, group, symmetric, act-order, version of the format, further settings)
GPTQ: dict[str, tuple[int, int, bool, bool, str, dict[str, Any]]] = {
    "gptq": (4, 32, True, False, "gptq", {"lm_head": True}),
    "gptq_asymmetric": (4, 32, False, False, "gptq", {}),
    "gptq_v2": (4, -1, False, False, "gptq_v2", {}),
    "gptq_8bit": (
        8,
        32,
        False,
        False,
        "gptq",
        {"dynamic": {r"-:.*\.1\.self_attn\.k_proj": {}, r"+:.*down": {"bits": 4}}},
    ),
    "gptq_act_order": (4, 32, True, True, "gptq", {}),
}


def make_gptq(name: str, folder: Path) -> None:
    """Writes a checkpoint of gptqmodel."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import FORMAT, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    bits, group, is_symmetric, has_order, form, settings = GPTQ[name]
    settings = dict(settings)
    quantises_head = settings.pop("lm_head", False)
    common = {"group_size": group, "sym": is_symmetric, "desc_act": has_order}
    config = QuantizeConfig(bits=bits, format=FORMAT(form), lm_head=quantises_head, **common, **settings)
    model = make_model(torch.float16)
    tensors, expected = dict(model.state_dict()), {}
    modules = [f"model.layers.{layer}.{one}" for layer in range(2) for one in LINEAR] + ["lm_head"] * quantises_head
    for module in modules:
        if config.dynamic_get(module) is False:
            continue
        own_bits = config.dynamic_get(module, "bits", bits)
        weight = tensors.pop(f"{module}.weight").float()
        inputs = weight.shape[1]
        size = inputs if group == -1 else group
        order = torch.arange(inputs) // size
        if not is_symmetric:
            weight = one_sided(weight, size)
        if has_order:
            order = order[torch.randperm(inputs, generator=torch.Generator().manual_seed(len(module)))]
        scale, zero = qparams(weight[:, order.argsort(stable=True)], size, own_bits, is_symmetric=is_symmetric)
        module_linear = torch.nn.Linear(inputs, len(weight), bias=False)
        module_linear.weight.data = weight
        layer = TorchLinear(bits=own_bits, in_features=inputs, out_features=len(weight), **common)
        layer.pack_original(module_linear, scale, zero, order.to(torch.int32))
        packed_scales = layer.scales
        if is_expected(module):
            layer.post_init()
            layer.eval()
            layer.scales = layer.scales.float()
            expected[f"{module}.weight"] = layer.dequantize_weight().T.float().contiguous()
        if form == "gptq":
            convert_gptq_v2_to_v1_format_module(layer, config)
        tensors |= {
            f"{module}.qweight": layer.qweight,
            f"{module}.qzeros": layer.qzeros,
            f"{module}.scales": packed_scales,
            f"{module}.g_idx": layer.g_idx.to(torch.int32),
        }
    settings = config.to_dict()
    settings["meta"].pop("offload_to_disk_path", None)  # a random name
    write(folder, model, settings, tensors, expected)


def make_awq(name: str, folder: Path) -> None:
    """Writes a checkpoint of AutoAWQ."""
    from awq.models._config import AwqConfig
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    group = 32
    model = make_model(torch.float16)
    tensors, expected = dict(model.state_dict()), {}
    for module in [f"model.layers.{layer}.{one}" for layer in range(2) for one in LINEAR]:
        if module == "model.layers.1.mlp.gate_proj":
            continue
        weight = one_sided(tensors.pop(f"{module}.weight").float(), group)
        scale, zero = qparams(weight, group, 4, is_symmetric=False)
        nearest = torch.round(weight.reshape(*scale.shape, group) / scale[..., None]) + zero[..., None]
        weight = ((nearest.clamp(0, 15) - zero[..., None]) * scale[..., None]).reshape(weight.shape)
        module_linear = torch.nn.Linear(weight.shape[1], len(weight), bias=False)
        module_linear.weight.data = weight
        layer = WQLinear_GEMM.from_linear(module_linear, 4, group, False, scale.T.contiguous(), zero.T.contiguous())
        parts = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales}
        tensors |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
        if is_expected(module):
            wide = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, group)
            expected[f"{module}.weight"] = wide.T.contiguous()
    config = AwqConfig(q_group_size=group, modules_to_not_convert=["layers.1.mlp.gate_proj"]).to_transformers_dict()
    write(folder, model, config, tensors, expected)


def make_fp8(name: str, folder: Path) -> None:
    """Writes a checkpoint in float8 with blocks, as DeepSeek and Qwen publish them, with transformers."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    kept = ["lm_head", "model.layers.1.self_attn"]
    config = FineGrainedFP8Config(weight_block_size=[32, 16], modules_to_not_convert=kept)
    quantizer = SimpleNamespace(quantization_config=config)
    model = make_model(torch.bfloat16)
    tensors, expected = dict(model.state_dict()), {}
    for module in [f"model.layers.{layer}.{one}" for layer in range(2) for one in LINEAR]:
        if module.startswith(kept[1]):
            continue
        name = f"{module}.weight"
        made = Fp8Quantize(quantizer).convert({name: tensors.pop(name)})
        tensors |= made
        if is_expected(module):
            scales = made[f"{module}.weight_scale_inv"]
            expected[name] = Fp8Dequantize(quantizer)._dequantize_one(made[name], scales, torch.float32)
            again = FP8BlockDequantizer(weight_block_size=(32, 16), dtype=torch.float32)
            assert torch.equal(expected[name], again._create_dequantized_weight(made[name], scales))
    write(folder, model, config.to_dict(), tensors, expected)


def write(folder: Path, model: LlamaForCausalLM, config: dict[str, Any], tensors: Tensors, expected: Tensors) -> None:
    """Writes a checkpoint whose tensors were made one by one."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    text = json.loads(path.read_text()) | {"architectures": ["LlamaForCausalLM"], "quantization_config": config}
    path.write_text(json.dumps(text, indent=2, default=str) + "\n")
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    save_file(expected, folder / "expected.safetensors")


MAKERS: dict[str, Callable[[str, Path], None]] = {
    **dict.fromkeys(COMPRESSED, make_compressed),
    **dict.fromkeys(GPTQ, make_gptq),
    "awq": make_awq,
    "fp8_block": make_fp8,
}
LIBRARIES = ("autoawq", "compressed-tensors", "gptqmodel", "safetensors", "torch", "transformers")


def main() -> None:
    """Makes the checkpoints that the command line names, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="checkpoints to make; all if none is named")
    for name in parser.parse_args().names or MAKERS:
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        MAKERS[name](name, folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        print(name, sum(file.stat().st_size for file in folder.iterdir()), "bytes")
    versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
