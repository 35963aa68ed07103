"""The weights of one model in the formats of the systems that `bench.cpu` measures, made once and kept."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, dequantize

from lserve_jax.weights import embedded


def gguf_of(model: str) -> Path:
    """Returns the GGUF file of a model.

    Raises:
      ValueError: if it has none.
    """
    if model == embedded.MODEL_NAME:
        return embedded.path()
    if Path(model).suffix != ".gguf":
        raise ValueError(f"{model} is no GGUF file, which this peer needs")
    return Path(model)


def as_folder(gguf: Path, work: Path, export: Callable[[Path], None]) -> Path:
    """Returns the model as a folder of safetensors in bfloat16, the values that ours computes with.

    ``export`` writes it: `transformers` can, which is not installed here.
    """
    return made(work / f"{gguf.stem}.bf16", export)


def as_f16(gguf: Path, work: Path) -> Path:
    """Returns the model as a GGUF file of the same values in float16."""
    return made(work / f"{gguf.stem}.f16.gguf", lambda temporary: write_f16(gguf, temporary))


def made(target: Path, write: Callable[[Path], None]) -> Path:
    """Returns a path, which is written atomically if it does not exist."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        write(Path(folder) / target.name)
        (Path(folder) / target.name).replace(target)
    return target


def write_f16(source: Path, target: Path) -> None:
    """Writes a GGUF file of the same metadata and values, matrices in float16 and vectors in float32."""
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = entry.types[-1] if entry.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, entry.contents(), entry.types[0], inner)
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, GGMLQuantizationType(tensor.tensor_type))
        writer.add_tensor(tensor.name, values.astype(np.float32 if values.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
