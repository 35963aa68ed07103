"""Which matrices of a Hugging Face checkpoint are quantised, and how: reads ``quantization_config`` of ``config.json``.

One row of `METHODS` per ``quant_method``. A method reads its keys once and returns a function that chooses the packing
of a module; whatever cannot be read is refused by name.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lserve_jax.config.errors import shown
from lserve_jax.config.model import ModelConfig
from lserve_jax.config.reader import Reader
from lserve_jax.weights.hf_packing import AwqCodes, GptqCodes, PackedCodes, Packing, StoredMatrix, WholeCodes
from lserve_jax.weights.rules import expected_tensors

# Scales with which some files quantise keys and values; we store those as the attention settings say.
CACHE_SCALES = re.compile(r".*\.(?:kv_scale|[qkv]_scale|[qkv]_zero_point|[qkv]_proj\.output_(?:scale|zero_point))")
COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
ADVICE = "use an unquantised or a GGUF checkpoint"
INT_INPUTS = "8-bit inputs are quantised per token, symmetric and dynamic, for weights in 8 bits per output, not "


class Module(NamedTuple):
    """A module of the model that has a matrix; ``kind`` is the name of its class."""

    name: str
    kind: str
    is_in_layer: bool
    has_bias: bool


type Choose = Callable[[Module], Packing | None]


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """The quantised matrices of a checkpoint by name, and one line for each setting that is ignored."""

    matrices: Mapping[str, StoredMatrix] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def owner(self, name: str) -> StoredMatrix | None:
        """Returns the quantised matrix of the module to which a tensor of the file belongs."""
        return self.matrices.get(f"{name.rpartition('.')[0]}.weight")

    def is_unused(self, name: str) -> bool:
        """Returns whether a tensor of the file belongs to quantisation and is not needed."""
        owner = self.owner(name)
        is_unused = owner is not None and name in owner.unused
        return is_unused or (bool(self.matrices) and CACHE_SCALES.fullmatch(name) is not None)


def read_quantization(hf_config: Mapping[str, Any], config: ModelConfig, *, source: str) -> Quantized:
    """Returns which matrices a checkpoint has in 8 or 4 bits; none without ``quantization_config``.

    Args:
      hf_config: the parsed ``config.json``.
      config: the model that it describes.
      source: the file's name, with which every error begins.

    Raises:
      InputError: if the method or one of its settings is not supported; one line names all of them.
    """
    key = next((key for key in ("quantization_config", "compression_config") if hf_config.get(key)), None)
    if key is None:
        return Quantized()
    reader = Reader(hf_config).section(key)
    method = reader.text("quant_method", "compressed-tensors" if key == "compression_config" else "")
    if method not in METHODS:
        reader.problems.append(
            f"{reader.name('quant_method')} {shown(method)} is not supported; known: {', '.join(METHODS)}; {ADVICE}"
        )
    choose = METHODS.get(method, _nothing)(reader)
    reader.raise_problems(source)
    warnings = []
    if reader.config.get("kv_cache_scheme"):
        name = reader.name("kv_cache_scheme")
        warnings.append(f"{source}: {name} is ignored: keys and values are stored as the attention settings say")
    return Quantized(matrices=_matrices(config, choose), warnings=tuple(warnings))


def _matrices(config: ModelConfig, choose: Choose) -> dict[str, StoredMatrix]:
    """Returns the matrices for which ``choose`` has a packing."""
    tensors = {tensor.names["hf"]: tensor for tensor in expected_tensors(config)}
    matrices = {}
    for name, tensor in tensors.items():
        if len(tensor.file_shape) == 2:
            rows, inputs = tensor.file_shape
            module = name.removesuffix(".weight")
            kind = "Embedding" if tensor.path[0] == "embed" else "Linear"
            packing = choose(Module(module, kind, tensor.layer is not None, f"{module}.bias" in tensors))
            if packing is not None:
                matrices[name] = StoredMatrix(name=name, shape=(rows, inputs), packing=packing)
    return matrices


def _nothing(reader: Reader) -> Choose:
    return lambda module: None


def _compressed_tensors(reader: Reader) -> Choose:
    """compressed-tensors: groups of modules, named, matched by ``re:…`` or by class, each with a scheme of its own."""
    if reader.section("sparsity_config").text("format", "dense") != "dense":
        reader.problems.append(f"{reader.name('sparsity_config')} is not supported, sparse weights are not; {ADVICE}")
    if reader.section("transform_config").config.get("config_groups"):
        reader.problems.append(f"{reader.name('transform_config')} is not supported: it changes the model; {ADVICE}")
    groups = reader.section("config_groups")
    if not groups.config:
        reader.missing.append(reader.name("config_groups"))
    by_target: dict[str, Packing | None] = {}
    for key in groups.config:
        scheme = groups.section(key)
        packing = _compressed_scheme(scheme, reader.text("format", ""))
        by_target |= dict.fromkeys(_names(scheme, "targets"), packing)
    ignored = _names(reader, "ignore")
    # Names win over patterns, these in the order of their text, and both over classes.
    targets = sorted(by_target, key=lambda target: (target.startswith("re:"), target))

    def choose(module: Module) -> Packing | None:
        if any(_matches(name, module.name) or name == module.kind for name in ignored):
            return None
        named = [target for target in targets if _matches(target, module.name)]
        return by_target[named[0]] if named else by_target.get(module.kind)

    return choose


def _compressed_scheme(scheme: Reader, default_format: str) -> Packing | None:
    """Returns the packing of one group of modules; None if its weights stay ordinary numbers."""
    if not scheme.config.get("weights"):
        return None
    weights = scheme.section("weights")
    form = scheme.text("format", default_format)
    bits, kind = weights.size("num_bits", 8), weights.text("type", "int")
    has_zeros = not weights.flag("symmetric", True)
    is_packed = form == "pack-quantized"
    if form not in COMPRESSED_FORMATS:
        known = ", ".join(COMPRESSED_FORMATS)
        scheme.problems.append(f"{scheme.name('format')} {shown(form)} is not supported; known: {known}; {ADVICE}")
    elif (kind, bits) not in (("int", 8), ("int", 4), ("float", 8)) or (kind == "float" and (is_packed or has_zeros)):
        what = f"{'asymmetric ' * has_zeros}{kind} weights of {bits} bits in {form}"
        scheme.problems.append(f"{weights.name('num_bits')}: {what} are not supported; {ADVICE}")
    block = _compressed_block(weights)
    if is_packed and has_zeros and block[0] != 1:
        scheme.problems.append(f"{weights.name('symmetric')}: zero points of blocks of outputs are not read; {ADVICE}")
    has_int_inputs, refusal = _compressed_inputs(scheme, is_row=block == (1, None) and not has_zeros and bits == 8)
    unused = tuple(f"{side}_{part}" for side in ("input", "output") for part in ("scale", "zero_point"))
    shared: dict[str, Any] = {
        "block": block,
        "has_zeros": has_zeros,
        "input_bits": 8 if has_int_inputs else None,
        "unused": unused,
        "refusal": refusal,
    }
    if is_packed:
        return PackedCodes(bits=4 if bits == 4 else 8, **shared)
    return WholeCodes(is_float=kind == "float", **shared)


def _compressed_block(weights: Reader) -> tuple[int | None, int | None]:
    """Returns how many outputs and inputs share a scale."""
    has_group = weights.config.get("group_size") not in (None, -1)
    inferred = "group" if has_group else "tensor" if weights.config.get("group_size") is None else "channel"
    strategy = weights.text("strategy", inferred)
    match strategy:
        case "tensor":
            return None, None
        case "channel":
            return 1, None
        case "group":
            return 1, weights.size("group_size")
        case "block":
            return _block(weights, "block_structure")
    weights.problems.append(f"{weights.name('strategy')} {shown(strategy)} is not supported; {ADVICE}")
    return None, None


def _compressed_inputs(scheme: Reader, *, is_row: bool) -> tuple[bool, str]:
    """Returns whether products quantise their inputs to 8 bits, and why that is not possible (empty if it is).

    Inputs that a file wants in float8 are not quantised: the product is only more exact.
    """
    inputs = scheme.section("input_activations")
    if scheme.config.get("output_activations"):
        return False, "quantised outputs are not supported"
    if not inputs.config or inputs.text("type", "int") == "float":
        return False, ""
    bits, strategy = inputs.size("num_bits", 8), inputs.text("strategy", "tensor")
    is_dynamic, is_symmetric = inputs.config.get("dynamic", False) is True, inputs.flag("symmetric", True)
    if is_row and is_dynamic and is_symmetric and (bits, strategy) == (8, "token"):
        return True, ""
    kind = f"{'dynamic' if is_dynamic else 'static'}, {'symmetric' if is_symmetric else 'asymmetric'}"
    weights = "" if is_row else ", for these weights"
    return False, f"{INT_INPUTS}{bits} bits per {strategy}, {kind}{weights}"


def _gptq(reader: Reader) -> Choose:
    """GPTQ: every linear map in the layers, except where ``dynamic`` and ``modules_in_block_to_quantize`` say else."""
    form = "marlin" if reader.flag("is_marlin_format", False) else reader.text("format", "gptq")
    form = reader.text("checkpoint_format", form)
    if form not in ("gptq", "gptq_v2"):
        reader.problems.append(
            f"{reader.name('checkpoint_format')} {shown(form)} is not supported; known: gptq, gptq_v2; {ADVICE}"
        )
    has_head = reader.flag("lm_head", False)
    inside = _names(reader, "modules_in_block_to_quantize")
    usual = _gptq_packing(reader, form)
    dynamic = reader.section("dynamic")
    changed: list[tuple[re.Pattern[str], Packing | None]] = []
    for key in dynamic.config:
        own = Reader({**reader.config, **dynamic.section(key).config}, f"{dynamic.name(key)}.", parent=reader)
        packing = None if key.startswith("-:") else _gptq_packing(own, form)
        changed.append((_pattern(dynamic, key, re.sub("^[+-]:", "", key)), packing))

    def choose(module: Module) -> Packing | None:
        is_named = module.is_in_layer and (not inside or any(module.name.endswith(f".{name}") for name in inside))
        if not is_named and not (has_head and module.name == "lm_head"):
            return None
        packing = next((packing for pattern, packing in changed if pattern.match(module.name)), usual)
        return packing and replace(packing, has_extra_bias=not module.has_bias)

    return choose


def _gptq_packing(reader: Reader, form: str) -> GptqCodes:
    bits = reader.size("bits")
    if bits not in (4, 8):
        reader.problems.append(f"{reader.name('bits')} {bits} is not supported, only 4 and 8; {ADVICE}")
    return GptqCodes(
        bits=4 if bits == 4 else 8,
        block=(1, _group_size(reader)),
        has_zeros=not reader.flag("sym", True),
        is_first_version=form == "gptq",
    )


def _awq(reader: Reader) -> Choose:
    """AWQ: every linear map in the layers that ``modules_to_not_convert`` does not name."""
    form = reader.text("version", reader.text("format", "gemm")).lower()
    if form != "gemm":
        reader.problems.append(f"{reader.name('version')} {shown(form)} is not supported, only gemm; {ADVICE}")
    if (bits := reader.size("bits")) != 4:
        reader.problems.append(f"{reader.name('bits')} {bits} is not supported, only 4; {ADVICE}")
    if not reader.flag("zero_point", True):
        reader.problems.append(f"{reader.name('zero_point')} False is not supported; {ADVICE}")
    kept = _names(reader, "modules_to_not_convert")
    packing = AwqCodes(bits=4, block=(1, _group_size(reader)), has_zeros=True)
    return lambda module: packing if module.is_in_layer and not _is_within(module.name, kept) else None


def _fp8(reader: Reader) -> Choose:
    """float8 with a scale per block (DeepSeek, Qwen) or per matrix (AutoFP8); inputs stay as they are."""
    if (fmt := reader.text("fmt", "e4m3")) != "e4m3":
        reader.problems.append(f"{reader.name('fmt')} {shown(fmt)} is not supported, only e4m3; {ADVICE}")
    if (scale := reader.text("scale_fmt", "float")) != "float":
        reader.problems.append(f"{reader.name('scale_fmt')} {shown(scale)} is not supported, only float; {ADVICE}")
    unused = ("input_scale", "activation_scale")
    if reader.config.get("weight_block_size") is None:
        packing = WholeCodes(is_float=True, block=(None, None), unused=unused)
    else:
        block = _block(reader, "weight_block_size")
        packing = WholeCodes(is_float=True, suffix="weight_scale_inv", block=block, unused=unused)
    kept = _names(reader, "modules_to_not_convert") or _names(reader, "ignored_layers") or ("lm_head",)
    return lambda module: packing if module.kind == "Linear" and not _is_within(module.name, kept) else None


METHODS: dict[str, Callable[[Reader], Choose]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
}


def _group_size(reader: Reader) -> int | None:
    """Returns how many inputs share a scale; None for all, which files write as -1."""
    return None if reader.config.get("group_size") == -1 else reader.size("group_size", 128)


def _block(reader: Reader, key: str) -> tuple[int | None, int | None]:
    """Returns the outputs and inputs of a block from a list of two sizes."""
    match reader.config.get(key):
        case [int(rows), int(inputs)] if rows > 0 and inputs > 0:
            return rows, inputs
        case wrong:
            reader.problems.append(f"{reader.name(key)} must be two positive integers, got {shown(wrong)}")
            return None, None


def _names(reader: Reader, key: str) -> tuple[str, ...]:
    """Returns the names in a list, which may hold lists; the patterns among them (``re:…``) are checked."""
    value = reader.config.get(key) or []
    items = value if isinstance(value, list) else [value]
    flat = [one for item in items for one in (item if isinstance(item, list) else [item])]
    names = tuple(name for name in flat if isinstance(name, str))
    if not isinstance(value, list) or len(names) < len(flat):
        reader.problems.append(f"{reader.name(key)} must be a list of names, got {shown(value)}")
    for name in names:
        if name.startswith("re:"):
            _pattern(reader, key, name.removeprefix("re:"))
    return names


def _pattern(reader: Reader, key: str, text: str) -> re.Pattern[str]:
    """Returns a regular expression; one that is none becomes a problem."""
    try:
        return re.compile(text)
    except re.error as error:
        reader.problems.append(f"{reader.name(key)} holds {shown(text)}, which is no regular expression ({error})")
        return re.compile("")


def _matches(target: str, name: str) -> bool:
    """Returns whether a target of compressed-tensors, a name or ``re:`` and a pattern, means the module ``name``."""
    return re.match(target.removeprefix("re:"), name) is not None if target.startswith("re:") else target == name


def _is_within(name: str, listed: tuple[str, ...]) -> bool:
    """Returns whether a list names the module, one that holds it, or the end of its name (``mlp.down_proj``)."""
    return any(_matches(one, name) if one.startswith("re:") else f".{one.strip('.')}." in f".{name}." for one in listed)
