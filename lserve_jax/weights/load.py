"""Opens a model by name, file or folder: reads its configuration at once, its weights on request."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.generation import GENERATION_FILE
from lserve_jax.config.hf import read_hf
from lserve_jax.config.json_file import read_json
from lserve_jax.config.model import ModelConfig
from lserve_jax.models.known import known_configs
from lserve_jax.models.llama import Params
from lserve_jax.weights import embedded, orbax
from lserve_jax.weights.digest import content_digest
from lserve_jax.weights.forms import Forms, LayoutOf
from lserve_jax.weights.gguf import GGUFFile
from lserve_jax.weights.hf_quantized import read_quantization
from lserve_jax.weights.kept import KeptParams
from lserve_jax.weights.rules import HeadOrder, expected_tensors
from lserve_jax.weights.safetensors import SafetensorsFolder
from lserve_jax.weights.smoothing import Smoothing
from lserve_jax.weights.tensors import LoadParams, Progress, load_tensors, parameter_tree

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# The files to download from a hub repository: no pickles, no code, no copies of the weights in other formats.
HUB_PATTERNS = ("*.json", "*.jinja", "model*.safetensors", "tokenizer.model")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model whose metadata is read and whose weights are not.

    ``tokenizer_source`` is the folder with the tokenizer's files, a GGUF file's metadata, or None if only the shapes of
    the model are known. ``files`` returns the files of configuration and weights, in an order that does not depend on
    where they are. ``require_kept`` raises `InputError` if a quantised matrix cannot be kept as the files have it.
    ``warnings`` has one line for each doubt about what the files mean.
    """

    name: str
    config: ModelConfig
    hf_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer_source: Path | Mapping[str, Any] | None
    loader: LoadParams
    layout_of: LayoutOf
    files: Callable[[], Sequence[Path]]
    require_kept: Callable[[], None] = lambda: None
    warnings: tuple[str, ...] = ()

    def load_params(
        self,
        dtype: Any,
        heads: HeadOrder | None = None,
        progress: Progress | None = None,
        *,
        weight_dtype: str | None = None,
    ) -> Params:
        """Returns the parameter tree as jax arrays, loaded one parameter at a time.

        Args:
          dtype: type of numbers, bfloat16 or float32, as a name or a dtype.
          heads: the order of KV heads of each layer (`HeadClasses`): KV heads, the query heads of their groups, the
            inputs of the output projection and the biases are permuted together. None keeps the checkpoint's order.
          progress: called with the bytes done and the total; first with 0, after the check of all headers.
          weight_dtype: the form of matrices: "auto", "bfloat16", "float32", "int8" or "int4" (see
            `lserve_jax.weights.forms.Forms`); None makes numbers of ``dtype``.

        Raises:
          InputError: if tensors are missing, unexpected or misshapen, or files unreadable; all of them in one line.
        """
        return self.load(self.forms(dtype, weight_dtype), heads, progress)

    def load(self, forms: Forms, heads: HeadOrder | None = None, progress: Progress | None = None) -> Params:
        """Returns the parameter tree with the form of every parameter given, see `load_params`."""
        try:
            return self.loader(self.config, forms, heads, progress)
        except OSError as error:
            raise InputError(f"{error.filename or self.name}: cannot be read ({error.strerror or error})") from None

    def forms(self, dtype: Any, weight_dtype: str | None = None, smoothing: Smoothing | None = None) -> Forms:
        """Returns the form of every parameter, see `load_params`; only what becomes "int8" is smoothed.

        Raises:
          InputError: if ``weight_dtype`` is "auto" and a quantised matrix cannot be kept as the files have it.
        """
        if weight_dtype == "auto":
            self.require_kept()
        smoothing = None if weight_dtype != "int8" or self.is_w8a8 else smoothing
        return Forms(dtype=str(jnp.dtype(dtype)), weight_dtype=weight_dtype, smoothing=smoothing)

    @cached_property
    def is_w8a8(self) -> bool:
        """Returns whether the files have weights for products of integers: made for them, and smoothed if they were."""
        layouts = (self.layout_of(tensor) for tensor in expected_tensors(self.config) if tensor.is_matrix)
        return any(layout is not None and layout.input_bits is not None for layout in layouts)

    def require_weights(self) -> None:
        """Raises `InputError` if only the shapes of the model are known."""
        if not self.files():
            raise _only_shapes(self.name)

    @cached_property
    def digest(self) -> str:
        """Returns 16 hexadecimal digits that stand for configuration and weights (see `content_digest`).

        They stay the same if the model is copied, moved, touched or named in another way.

        Raises:
          InputError: if a file is missing or cannot be read.
        """
        return content_digest(self.files())

    @property
    def folder(self) -> Path | None:
        """Returns the folder of this model alone; None for a GGUF file, beside which others may lie."""
        return self.tokenizer_source if isinstance(self.tokenizer_source, Path) else None

    def kept(self) -> "Checkpoint":
        """Returns the same checkpoint, which reads its weights once and keeps them for all further loads."""
        return replace(self, loader=KeptParams(self.loader))

    def abstract_params(self, dtype: Any, weight_dtype: str | None = None) -> Params:
        """Returns the tree of `load_params` as `jax.ShapeDtypeStruct`, which suffices to compile programs."""
        return self.abstract(self.forms(dtype, weight_dtype))

    def abstract(self, forms: Forms) -> Params:
        """Returns the tree of `load` as `jax.ShapeDtypeStruct`."""
        return parameter_tree(self.config, lambda parameter: forms.abstract(parameter, self.layout_of))


def open_checkpoint(model: str) -> Checkpoint:
    """Returns the checkpoint that ``model`` names; reads its metadata, not its weights.

    ``model`` is a folder in Hugging Face's layout or written by `lserve_jax.convert`, a ``.gguf`` file, the name of the
    embedded model (fetched on first use), the name of a model of which only the shapes are known, or, if none of these,
    a hub id ``org/name``.

    Raises:
      InputError: if nothing has that name, the configuration is missing or unsupported, or a file cannot be read.
    """
    try:
        return _open(model)
    except OSError as error:
        raise InputError(f"{error.filename or model}: cannot be read ({error.strerror or error})") from None


def _open(model: str) -> Checkpoint:
    path = _local_path(model)
    if model == embedded.MODEL_NAME:
        return _open_gguf(embedded.path(), model)
    if path.is_dir():
        return _open_folder(path, model)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{model}: a model is a folder or a .gguf file; pass the folder that holds config.json")
        return _open_gguf(path, model)
    if model in known_configs():
        return _open_known(model)
    if HUB_ID.fullmatch(model) and path.suffix != ".gguf":
        return _open_folder(_download(model), model)
    raise InputError(
        f"{model}: no such file or folder, nor a hub id (org/name); models known by name: {embedded.MODEL_NAME}, "
        f"and for memory plans only {', '.join(known_configs())}"
    )


def _local_path(model: str) -> Path:
    """Returns the path that ``model`` would be on this machine; raises `InputError` for what can be none."""
    if not isinstance(model, str):
        raise InputError(f"a model is named by a text, got {shown(model)}")
    if not model:
        raise InputError("the name of the model is empty: name a folder, a .gguf file, a hub id or a known model")
    scheme, is_address, rest = model.partition("://")
    if is_address:
        site, _, hub_id = rest.partition("/")
        if site in ("huggingface.co", "hf.co") and HUB_ID.match(hub_id):
            raise InputError(f"{model}: an address, where a hub id is taken: {'/'.join(hub_id.split('/')[:2])}")
        raise InputError(f"{model}: nothing is read from {scheme}:// addresses; download the model and pass its folder")
    try:
        return Path(model).expanduser()
    except RuntimeError:
        raise InputError(f"{model}: there is no such home folder; pass the whole path") from None


def _open_gguf(path: Path, name: str) -> Checkpoint:
    file = GGUFFile(path)
    hf_config = file.hf_config()
    return Checkpoint(
        name=name,
        config=read_hf(hf_config, source=str(path)),
        hf_config=hf_config,
        generation_config={},
        tokenizer_source=file.metadata,
        loader=partial(load_tensors, file),
        layout_of=file.layout,
        warnings=file.warnings,
        files=lambda: [path],
    )


def _open_folder(folder: Path, name: str) -> Checkpoint:
    config_path = folder / "config.json"
    if not config_path.exists():
        ggufs = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"; to use {ggufs[0]}, pass that file" if ggufs else ""
        raise InputError(f"{config_path}: missing, so this is no model folder{hint}")
    hf_config = read_json(config_path)
    generation_path = folder / GENERATION_FILE
    generation_config = read_json(generation_path) if generation_path.exists() else {}
    config = read_hf(hf_config, source=str(config_path), generation_config=generation_config)
    if orbax.is_orbax_folder(folder):
        source, own = orbax.OrbaxFolder(folder), {}
    else:
        quantized = read_quantization(hf_config, config, source=str(config_path))
        source = SafetensorsFolder(folder, quantized)
        own = {"require_kept": source.require_kept, "warnings": quantized.warnings}
    return Checkpoint(
        name=name,
        config=config,
        hf_config=hf_config,
        generation_config=generation_config,
        tokenizer_source=folder,
        loader=partial(load_tensors, source),
        layout_of=source.layout,
        files=lambda: [*filter(Path.is_file, (config_path, generation_path)), *source.files()],
        **own,
    )


def _only_shapes(name: str) -> InputError:
    return InputError(f"only the shapes of {name} are known, for --dry-run; pass the folder of a checkpoint to load it")


def _open_known(name: str) -> Checkpoint:
    def refuse(config: ModelConfig, forms: Forms, heads: HeadOrder | None, progress: Progress | None) -> Params:
        raise _only_shapes(name)

    hf_config = known_configs()[name]
    return Checkpoint(
        name=name,
        config=read_hf(hf_config, source=name),
        hf_config=hf_config,
        generation_config={},
        tokenizer_source=None,
        loader=refuse,
        layout_of=lambda tensor: None,
        files=list,
    )


def _download(hub_id: str) -> Path:
    """Returns the folder into which huggingface_hub downloaded the repository, now or earlier."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise InputError(
            f"{hub_id}: no such folder; to fetch it from the hub install the extra: pip install 'lserve_jax[hub]'"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(HUB_PATTERNS)))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise InputError(f"{hub_id}: no such folder, and the hub did not give it ({reason})") from None
