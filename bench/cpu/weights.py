"""The weights of one model in the formats of the systems that `bench.cpu` measures, made once and kept."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, dequantize, quantize

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


TYPES = {
    "f16": (LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, GGMLQuantizationType.Q8_0),
}
"""The types of weights that a GGUF file is made with: of the file, and of its matrices."""


def as_gguf(gguf: Path, work: Path, kind: str) -> Path:
    """Returns the model as a GGUF file of the same values, with matrices of a type in `TYPES`."""
    return made(work / f"{gguf.stem}.{kind}.gguf", lambda temporary: write_gguf(gguf, temporary, kind))


def made(target: Path, write: Callable[[Path], None]) -> Path:
    """Returns a path, which is written atomically if it does not exist."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        write(Path(folder) / target.name)
        (Path(folder) / target.name).replace(target)
    return target


def write_gguf(source: Path, target: Path, kind: str) -> None:
    """Writes a GGUF file of the same metadata and values, matrices as a type in `TYPES`, vectors in float32."""
    file_type, matrix_type = TYPES[kind]
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = entry.types[-1] if entry.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, entry.contents(), entry.types[0], inner)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, GGMLQuantizationType(tensor.tensor_type))
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values.astype(np.float32))
        else:
            data = quantize(values, matrix_type)
            writer.add_tensor(tensor.name, data, raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
