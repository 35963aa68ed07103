"""What `bench.cpu` measures: our settings and the peers, each as a worker process in its own environment."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cpu.process import Worker, WorkerError
from bench.cpu.weights import as_folder, as_gguf, gguf_of
from bench.provenance import ROOT
from lserve_jax.evaluation.variants import parse_variant

SCRIPTS = {"ours": "ours.py", "transformers": "torch_peer.py", "llama.cpp": "llama_peer.py"}

_WINDOWS = "sink=64+local=256+prefill_local=256"
OURS = {
    "dense": "dense",
    "dense_int8": "dense:kv_dtype=int8",
    "streaming": f"streaming:{_WINDOWS}",
    "streaming_int8": f"streaming:{_WINDOWS}+kv_dtype=int8",
    "lserve": f"lserve:{_WINDOWS}+token_budget=1024",
    "lserve_int8": f"lserve:{_WINDOWS}+token_budget=1024+kv_dtype=int8",
    "lserve_bf16": f"lserve:{_WINDOWS}+token_budget=1024+weight_dtype=bfloat16",
    "lserve_packed": f"lserve:{_WINDOWS}+token_budget=1024+weight_dtype=auto",
    "lserve_64": f"lserve:{_WINDOWS}+token_budget=1024+page_size=64+sub_page_size=16",
    "lserve_preset": "lserve",
}
"""Our settings as `parse_variant` reads them: windows that kept the embedded model's accuracy (docs/accuracy.md).

Weights are int8, the default on a CPU, where a setting names no other form.
"""
DEFAULT_OURS = ("dense", "lserve", "lserve_bf16", "lserve_int8")

PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformers bf16": ("transformers", {"dtype": "bfloat16"}),
    "transformers f32": ("transformers", {"dtype": "float32"}),
    "llama.cpp F16": ("llama.cpp", {"weights": "f16", "has_flash": False, "use_extra_bufts": True}),
    "llama.cpp F16 flash": ("llama.cpp", {"weights": "f16", "has_flash": True, "use_extra_bufts": True}),
    "llama.cpp Q8_0": ("llama.cpp", {"weights": "q8_0", "has_flash": False, "use_extra_bufts": False}),
    "llama.cpp Q8_0 flash": ("llama.cpp", {"weights": "q8_0", "has_flash": True, "use_extra_bufts": False}),
    # The kernels for AMX crash on quantised files of the embedded model (llama-cpp-python 0.3.36).
    "llama.cpp Q4_1": ("llama.cpp", {"weights": "shipped", "has_flash": False, "use_extra_bufts": False}),
    "llama.cpp Q4_1 flash": ("llama.cpp", {"weights": "shipped", "has_flash": True, "use_extra_bufts": False}),
}
"""Peers by name: the library, and its worker's settings."""


@dataclass(frozen=True)
class System:
    """Something that is measured.

    Attributes:
      name: as results call it.
      kind: "ours", or a peer's library.
      command: what starts its worker, but for the settings.
      settings: its worker's settings in every part; of ours, the arguments of `prepare`.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def is_ours(self) -> bool:
        """Whether the system is a setting of lserve_jax."""
        return self.kind == "ours"

    def start(
        self, *, max_length: int, batch: int, threads: int, compiled: Path, expected_tokens: int | None = None
    ) -> Worker:
        """Returns a worker for ``batch`` sequences of ``max_length`` tokens, which begins to load.

        ``compiled`` is the folder of JAX's persistent compilation cache; ``expected_tokens`` those of the first prompt,
        where they are known before, as to `lserve_jax.generate`.
        """
        if self.is_ours:
            prepare = {**self.settings, "max_model_len": max_length, "max_num_seqs": batch}
            settings = {"prepare": prepare, "expected_tokens": expected_tokens}
        else:
            settings = {**self.settings, "max_length": max_length, "batch": batch}
        return Worker(self.command, {**settings, "threads": threads}, self.environment(threads, compiled))

    def open(self, threads: int, **settings: Any) -> Worker:
        """Returns a worker that loads what the settings name, or nothing without settings."""
        return Worker(self.command, {**settings, "threads": threads}, self.environment(threads, None))

    def environment(self, threads: int, compiled: Path | None) -> dict[str, str]:
        """Returns this process's environment without variables that change how a system runs."""
        changed = ("JAX_", "OMP_", "MKL_", "PYTHON", "PJRT_NPROC", "NPROC")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(changed)}
        if not self.is_ours:
            return {**kept, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        kept |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PJRT_NPROC": str(threads)}
        return kept | ({} if compiled is None else {"JAX_COMPILATION_CACHE_DIR": str(compiled)})


def our_system(name: str, model: str) -> System:
    """Returns one of `OURS`, or a setting written as a variant (``lserve:page_size=32``), on a model.

    Raises:
      ValueError: for a setting that cannot be, in one line.
    """
    variant = parse_variant(OURS.get(name, name))
    if isinstance(variant.options.get("token_budget"), float):
        raise ValueError(f"{name!r}: token_budget must be a number of tokens: one engine serves prompts of all lengths")
    variant.config(0)
    settings = {"model": model, "attention": variant.preset, "head_pattern": variant.head_pattern, "dtype": "bfloat16"}
    settings |= {"weight_dtype": variant.weight_dtype, **variant.options}
    return System(name, "ours", _command("ours", sys.executable), settings)


def peer_systems(
    names: list[str], model: str, pythons: Mapping[str, str | None], work: Path, threads: int
) -> tuple[list[System], dict[str, str]]:
    """Returns the peers that can take part, weights made for them, and why the others cannot, by name.

    Args:
      names: beginnings of names in `PEERS`.
      model: as ours.
      pythons: by library, the interpreter of an environment that has it; None where there is none.
      work: folder for weights in the peers' formats.
      threads: that a peer computes with.

    Raises:
      ValueError: for a name that no peer has.
    """
    if unknown := [name for name in names if not any(peer.startswith(name) for peer in PEERS)]:
        raise ValueError(f"no peer is called {unknown[0]!r}: there are {', '.join(PEERS)}")
    systems: list[System] = []
    missing: dict[str, str] = {}
    reasons: dict[str, str | None] = {}
    for name, (kind, settings) in PEERS.items():
        if not any(name.startswith(wanted) for wanted in names):
            continue
        python = pythons.get(kind)
        if python is None:
            missing[name] = f"--{kind.replace('.', '-')}-python names no environment that has it"
            continue
        library = System(kind, kind, _command(kind, python), {})
        if kind not in reasons:
            reasons[kind] = _why_missing(library, threads)
        if reason := reasons[kind]:
            missing[name] = reason
            continue
        try:
            path = _weights(library, settings, model, work, threads)
        except (WorkerError, ValueError) as error:
            missing[name] = " ".join(str(error).split())
            continue
        systems.append(System(name, kind, library.command, {**settings, "model": str(path)}))
    return systems, missing


def _command(kind: str, python: str) -> tuple[str, ...]:
    return python, str(Path(__file__).parent / "workers" / SCRIPTS[kind])


def _why_missing(library: System, threads: int) -> str | None:
    """Returns in one line why a library cannot be measured; None if it can."""
    try:
        with library.open(threads) as worker:
            worker.ready(300)
    except WorkerError as error:
        return str(error)
    return None


def _weights(library: System, settings: Mapping[str, Any], model: str, work: Path, threads: int) -> Path:
    """Returns the file or folder that a peer loads, and makes it if it does not exist."""
    if library.kind == "llama.cpp":
        gguf = gguf_of(model)
        return gguf if settings["weights"] == "shipped" else as_gguf(gguf, work, settings["weights"])
    if Path(model).is_dir():
        return Path(model)
    gguf = gguf_of(model)

    def export(target: Path) -> None:
        options = {"model": str(gguf), "dtype": "bfloat16", "export_to": str(target)}
        with library.open(threads, **options) as worker:
            worker.ready(1800)

    return as_folder(gguf, work, export)
