"""Flags that several commands share, and flags derived from the fields of a dataclass."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field
from pathlib import Path
from typing import Any

from lserve_jax.config.attention import PRESETS, AttentionConfig
from lserve_jax.config.errors import InputError
from lserve_jax.config.inference import DTYPES, WEIGHT_DTYPES
from lserve_jax.config.settings import KINDS, Texts, TextsOrTokens, describe_default, memory_size, read, settings
from lserve_jax.config.sizes import CacheSettings
from lserve_jax.engine.setup import DEFAULT_MODEL, IMPLEMENTATIONS

type Group = argparse.ArgumentParser | argparse._ArgumentGroup


def local(text: str) -> str:
    """Returns a path as it is; raises `argparse.ArgumentTypeError` for what is none, as ``gs://bucket/folder``."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} must be a path")
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r} must be a path on this machine, not an address")
    return text


def local_path(text: str) -> Path:
    """Returns the path that a text names on this machine, as `local`."""
    return Path(local(text))


def positive_memory_size(text: str) -> int:
    """Returns the bytes, at least one, that a text such as ``80GiB`` names."""
    with suppress(ValueError):
        if (size := memory_size(text)) > 0:
            return size
    raise argparse.ArgumentTypeError(f"{text!r} must be a number of bytes, or one with GB or GiB, such as 80GiB")


SHARED: dict[str, dict[str, Any]] = {
    "--model": {
        "default": DEFAULT_MODEL,
        "help": "folder, .gguf file, hub id or name (default: %(default)s)",
    },
    "--tokenizer": {
        "type": local,
        "metavar": "PATH",
        "help": "folder or .gguf file to take the tokenizer from (default: the model's own)",
    },
    "--dtype": {
        "choices": ("auto", *DTYPES),
        "default": "auto",
        "help": "type of activations, and of weights not quantised; auto is the checkpoint's (default: %(default)s)",
    },
    "--weight-dtype": {
        "choices": WEIGHT_DTYPES,
        "help": "form of matrices; auto keeps the file's (default: auto; on CPUs int8 if smoothing factors are known)",
    },
    "--max-model-len": {
        "type": int,
        "metavar": "N",
        "help": "the most tokens of a prompt and its answer together (default: the model's own)",
    },
    "--max-num-seqs": {
        "type": int,
        "metavar": "N",
        "help": "prompts that are processed together (default: %(default)s)",
    },
    "--prefill-chunk": {
        "type": int,
        "metavar": "N",
        "help": "prompt tokens per prefill call; fewer take less memory (default: what suits the device)",
    },
    "--implementation": {
        "choices": IMPLEMENTATIONS,
        "default": "auto",
        "help": "implementation of the kernels; auto takes the first that accepts (default: %(default)s)",
    },
    "--recall-interval": {
        "type": int,
        "metavar": "N",
        "help": "measure the recall of the page selection every N decode steps (default: never)",
    },
    "--attention": {
        "choices": tuple(PRESETS),
        "default": "lserve",
        "help": "preset (default: %(default)s)",
    },
    "--head-pattern": {
        "type": local,
        "metavar": "DIR",
        "help": "head gates in DuoAttention's format (default: the model's own, or those that ship)",
    },
    "--quiet": {"action": "store_true", "help": "print nothing but errors on stderr"},
}
"""The options of shared flags, which mean the same in every command."""


def whole(default: int, text: str) -> dict[str, Any]:
    """Returns the options of a flag for a whole number."""
    return {"type": int, "default": default, "metavar": "N", "help": f"{text} (default: {default})"}


def add_shared(group: Group, *names: str, **changes: Any) -> None:
    """Adds flags of `SHARED`.

    Args:
      group: a parser or a group of one.
      names: the flags; in a name with slashes, such as ``--max-num-seqs/--batch``, the first part is in `SHARED` and
        the others are its aliases.
      **changes: options of `argparse.ArgumentParser.add_argument` that replace those of `SHARED`.
    """
    for name in names:
        flags = name.split("/")
        group.add_argument(*flags, **{**SHARED[flags[0]], **changes})


def add_attention(group: Group) -> None:
    """Adds the preset, the head pattern and every field of `AttentionConfig`."""
    add_shared(group, "--attention", "--head-pattern")
    add_fields(group, AttentionConfig, default="the preset's, {} for lserve")


def add_fields(
    group: Group,
    cls: type,
    names: Sequence[str] | None = None,
    *,
    default: str = "{}",
    own: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Adds a flag for each setting of a dataclass: ``--token-budget`` for ``token_budget``.

    A flag that the user omits is None in the namespace, so that `given` returns only named settings.

    Args:
      group: a parser or a group of one.
      cls: the dataclass, see `lserve_jax.config.settings`.
      names: the settings to add; None adds all.
      default: how ``--help`` words a default; "{}" stands for the value.
      own: what this command has by setting: its "default", which `given` returns as if it were named, its default in
        "words", and its "help".
    """
    found = settings(cls)
    for name in found if names is None else names:
        setting, changed = found[name], (own or {}).get(name, {})
        usual = (
            describe_default(setting, setting.default, default)
            if "default" not in changed
            else describe_default(setting, changed["default"])
        )
        text = f"{changed.get('help', setting.metadata['help'])} (default: {changed.get('words', usual)})"
        group.add_argument(
            f"--{name.replace('_', '-')}",
            default=changed.get("default"),
            help=text.replace("%", "%%"),
            **_form(setting),
        )


def given(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Returns the settings of a dataclass that the user named, by name."""
    values = {name: getattr(args, name, None) for name in settings(cls)}
    return {name: value for name, value in values.items() if value is not None}


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `lserve_jax.engine.setup.prepare` that commands for one model have in common."""
    names = ("attention", "head_pattern", "dtype", "weight_dtype", "max_model_len", "prefill_chunk", "implementation")
    return {name: getattr(args, name) for name in names} | given(args, CacheSettings) | given(args, AttentionConfig)


def _form(setting: Field[Any]) -> dict[str, Any]:
    """Returns the options of `argparse` that define the form of a setting's value."""
    if setting.type is bool:
        return {"action": argparse.BooleanOptionalAction}
    if "choices" in setting.metadata:
        return {"choices": setting.metadata["choices"]}
    metavar = setting.metadata.get("metavar", KINDS[setting.type].metavar)
    if setting.type in (Texts, TextsOrTokens):
        return {"action": "append", "metavar": metavar}
    return {"type": _reader(setting), "metavar": metavar}


def _reader(setting: Field[Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return read(setting, text)
        except InputError as error:
            raise argparse.ArgumentTypeError(f"{text!r} {error}") from None

    return parse
