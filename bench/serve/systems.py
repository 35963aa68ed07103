"""The servers that `bench.serve` compares: how each is started, and how it wants a request."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.cpu import systems as cpu
from bench.cpu.weights import as_gguf, gguf_of
from bench.serve.client import Messages

OURS = cpu.OURS
DEFAULT_OURS = ("dense", "lserve")
SERVED = "bench"
"""The name by which requests ask for the model, where a server can be told."""

PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama.cpp F16": ("llama.cpp", ("--flash-attn", "off")),
    "llama.cpp F16 flash": ("llama.cpp", ("--flash-attn", "on")),
    # A prompt's share of a batch is what a stream waits for: 2,048 tokens by default.
    "llama.cpp F16 flash b512": ("llama.cpp", ("--flash-attn", "on", "--batch-size", "512")),
    "transformers bf16": ("transformers", ()),
    "transformers bf16 batching": ("transformers", ("--continuous-batching",)),
}
"""Peers by name: the library, and its server's options. Prompts are cached where the server does so by default."""
DEFAULT_PEERS = ("llama.cpp F16 flash", "llama.cpp F16 flash b512", "transformers bf16 batching")
_END_OF_NOTHING = -1
"""A token that never comes: with it as the end of a text, `transformers` goes on to the last token asked for."""


@dataclass(frozen=True)
class Sizes:
    """What a server is started for: slots, tokens of each, and prompt tokens per prefill call (0: the server's own)."""

    slots: int
    context: int
    chunk: int = 0


@dataclass(frozen=True)
class System:
    """A server.

    Attributes:
      name: as results call it.
      kind: "ours", a peer's library, or "given" for a server that runs already.
      program: what starts it, but for the sizes and the port.
      environment: its environment.
      model: the name by which requests ask for the model.
      facts: versions.
      url: of a server that runs already.
      extra: fields of every request to it.
      base: of ours, what `bench.cpu` calls the same setting.
    """

    name: str
    kind: str
    program: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    model: str = SERVED
    facts: Mapping[str, Any] = field(default_factory=dict)
    url: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    base: cpu.System | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the server is a setting of lserve_jax."""
        return self.kind == "ours"

    def command(self, sizes: Sizes, port: int) -> list[str]:
        """Returns what starts the server."""
        match self.kind:
            case "ours":
                chunk = ["--prefill-chunk", str(sizes.chunk)] if sizes.chunk else []
                numbers = ["--max-num-seqs", str(sizes.slots), "--max-model-len", str(sizes.context), *chunk]
            case "llama.cpp":
                numbers = ["--parallel", str(sizes.slots), "--ctx-size", str(sizes.slots * sizes.context)]
            case _:
                numbers = []  # transformers takes what comes
        return [*self.program, *numbers, "--host", "127.0.0.1", "--port", str(port)]

    def body(self, messages: Messages, max_tokens: int) -> dict[str, Any]:
        """Returns a request for a greedy answer of exactly so many tokens, as far as the server can be told."""
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0.0, "stream": True}
        if self.kind == "transformers":  # it refuses fields that it does not know, and says the usage unasked
            settings = {"do_sample": False, "eos_token_id": _END_OF_NOTHING, "pad_token_id": 0}
            return {**body, "generation_config": json.dumps(settings)}
        own = {} if self.kind == "given" else {"ignore_eos": True}
        return {**body, "stream_options": {"include_usage": True}, **own, **self.extra}


def our_system(name: str, model: str, threads: int, compiled: Path) -> System:
    """Returns our server with one of `OURS`, or with a setting written as a variant.

    ``compiled`` is the folder of JAX's persistent compilation cache.

    Raises:
      ValueError: for a setting that cannot be, in one line.
    """
    base = cpu.our_system(name, model)
    python, _ = base.command
    program = (python, "-m", "lserve_jax.serve", *flags(base.settings), "--served-model-name", SERVED)
    return System(name, "ours", program, base.environment(threads, compiled), base=base)


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Returns the arguments of `prepare` as flags of our commands."""
    found: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            found += [f"--{flag}", ",".join(map(str, value))]
        elif value is not None:
            found += [f"--{flag}", str(value)]
    return found


def given_system(url: str, model: str, extra: Mapping[str, Any]) -> System:
    """Returns a server that runs already and is not ended."""
    return System(url, "given", model=model, url=url.rstrip("/"), extra=extra)


def peer_systems(
    names: Sequence[str], model: str, programs: Mapping[str, str | None], work: Path, threads: int
) -> tuple[list[System], dict[str, str]]:
    """Returns the peers that can take part, weights made for them, and why the others cannot, by name.

    Args:
      names: of `PEERS`.
      model: as ours.
      programs: "llama.cpp": llama-server; "transformers": the interpreter of an environment that has it; or None.
      work: folder for weights in the peers' formats.
      threads: that a peer computes with.

    Raises:
      ValueError: for a name that no peer has.
    """
    if unknown := [name for name in names if name not in PEERS]:
        raise ValueError(f"no peer is called {unknown[0]!r}: there are {', '.join(PEERS)}")
    makers = {"llama.cpp": _llama_cpp, "transformers": _transformers}
    systems: list[System] = []
    missing: dict[str, str] = {}
    opened: dict[str, System | str] = {}
    for name in names:
        kind, options = PEERS[name]
        if kind not in opened:
            program = programs.get(kind)
            opened[kind] = makers[kind](program, model, work, threads) if program else _not_named(kind)
        found = opened[kind]
        if isinstance(found, str):
            missing[name] = found
        else:
            systems.append(System(name, kind, (*found.program, *options), found.environment, found.model, found.facts))
    return systems, missing


def _not_named(kind: str) -> str:
    return {"llama.cpp": "--llama-server names no program", "transformers": "--transformers-python names none"}[kind]


def _llama_cpp(program: str, model: str, work: Path, threads: int) -> System | str:
    """Returns llama.cpp's server without options, or in one line why it cannot be measured."""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        weights = as_gguf(gguf_of(model), work, "f16")
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        return " ".join(str(error).split())
    words = next((line for line in (said.stdout + said.stderr).splitlines() if line.startswith("version")), "")
    command = (program, "--model", str(weights), "--alias", SERVED, "--threads", str(threads), "--no-webui")
    environment = cpu.System("llama.cpp", "llama.cpp", (), {}).environment(threads, None)
    return System("llama.cpp", "llama.cpp", command, environment, facts={"llama.cpp": words})


def _transformers(program: str, model: str, work: Path, threads: int) -> System | str:
    """Returns `transformers serve` without options, or in one line why it cannot be measured."""
    able, missing = cpu.peer_systems(["transformers bf16"], model, {"transformers": program}, work, threads)
    if not able:
        return next(iter(missing.values()))
    found, folder = able[0], able[0].settings["model"]
    with found.open(threads) as worker:
        versions = worker.ready(300)["facts"]
    command = (str(Path(program).with_name("transformers")), "serve", folder, "--device", "cpu", "--dtype", "bfloat16")
    return System("transformers", "transformers", command, found.environment(threads, None), folder, versions)
