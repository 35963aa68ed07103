"""The tokenizer files of a folder in Hugging Face's layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.generation import GENERATION_FILE
from lserve_jax.config.json_file import read_json
from lserve_jax.config.reader import Reader
from lserve_jax.text.errors import is_text, one_line, read_text
from lserve_jax.text.parts import DEFAULT_TEMPLATE, SPECIAL_NAMES, TokenizerParts

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_MAP_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_JSON_FILE = "chat_template.json"
TEMPLATE_FOLDER = "additional_chat_templates"
FILES = (TOKENIZER_FILE, CONFIG_FILE, SPECIAL_MAP_FILE, TEMPLATE_FILE, TEMPLATE_JSON_FILE)


def tokenizer_files(folder: Path) -> list[Path]:
    """Returns the files of a folder that make its tokenizer and chat templates, in an order of their names."""
    templates = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    return [*filter(Path.is_file, (folder / name for name in FILES)), *templates]


_ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_folder(folder: Path) -> TokenizerParts:
    """Returns what the files of a folder say; see `lserve_jax.text.tokenizer.Tokenizer.from_folder`."""
    problems: list[str] = []
    backend = _read_backend(folder, problems)
    config = _read_json(folder, CONFIG_FILE, problems)
    special_map = _read_json(folder, SPECIAL_MAP_FILE, problems)
    generation = _read_json(folder, GENERATION_FILE, problems)
    templates = _read_templates(folder, config, problems)
    special = _special_tokens(special_map, SPECIAL_MAP_FILE, problems)
    special |= _special_tokens(config, CONFIG_FILE, problems)
    ends = _read_ids(generation, "eos_token_id", GENERATION_FILE, problems)
    if config.get("eos_token_ids") != []:  # which `Tokenizer.save` writes if no token ends generation
        ends += _read_ids(config, "eos_token_ids", CONFIG_FILE, problems)
    if backend is not None:
        _add_tokens(backend, config, special, problems)
        ends += [index for index in [backend.token_to_id(special.get("eos_token", ""))] if index is not None]
    if problems or backend is None:
        raise InputError(f"{folder}: cannot read its tokenizer: {'; '.join(problems)}")
    ends = list(dict.fromkeys(ends))
    return TokenizerParts(backend=backend, special_tokens=special, eos_token_ids=ends, chat_templates=templates)


def _read_backend(folder: Path, problems: list[str]) -> tokenizers.Tokenizer | None:
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        has_other = (folder / "tokenizer.model").is_file()
        hint = " (tokenizer.model cannot be read: let transformers save the tokenizer first)" if has_other else ""
        problems.append(f"{TOKENIZER_FILE} is missing{hint}")
        return None
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
    except BaseException as error:  # the library raises bare Exception, or its BaseException when it panics
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        problems.append(f"{TOKENIZER_FILE} is not a tokenizer: {one_line(error)}")
        return None


def _read_json(folder: Path, name: str, problems: list[str]) -> dict[str, Any]:
    """Returns the object in a file, or an empty one if there is no such file."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except InputError as error:
        problems.append(str(error).removeprefix(f"{folder}/"))
        return {}


def _read_templates(folder: Path, config: Mapping[str, Any], problems: list[str]) -> dict[str, str]:
    """Returns the chat templates by name: those of files of their own go before those of configurations."""
    old = _read_json(folder, TEMPLATE_JSON_FILE, problems)
    templates = _named(config.get("chat_template"), CONFIG_FILE, problems)
    templates |= _named(old.get("chat_template"), TEMPLATE_JSON_FILE, problems)
    files = {DEFAULT_TEMPLATE: folder / TEMPLATE_FILE}
    files |= {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    for name, path in files.items():
        if path.is_file():
            try:
                templates[name] = read_text(path)
            except InputError as error:
                problems.append(str(error).removeprefix(f"{folder}/"))
    return templates


def _named(value: Any, name: str, problems: list[str]) -> dict[str, str]:
    """Returns the templates of a configuration: one text, a list of named ones, or texts by name."""
    if value is None:
        return {}
    found: Any = {DEFAULT_TEMPLATE: value} if isinstance(value, str) else value
    if isinstance(value, list):
        found = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        found = found if len(found) == len(value) else None
    if isinstance(found, dict) and all(isinstance(text, str) for pair in found.items() for text in pair):
        return found
    problems.append(
        f"{name}: chat_template must be a string, or a list of templates with different names, got {shown(value, 60)}"
    )
    return {}


def _special_tokens(config: Mapping[str, Any], name: str, problems: list[str]) -> dict[str, str]:
    """Returns the special tokens' texts by name; a file gives each as a text or as an object with ``content``."""
    special = {}
    for key in SPECIAL_NAMES:
        value = config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if is_text(text):
            special[key] = text
        elif value is not None:
            problems.append(f"{name}: {key} must be a string or an object with content, got {shown(value, 60)}")
    return special


def _read_ids(config: Mapping[str, Any], key: str, name: str, problems: list[str]) -> list[int]:
    reader = Reader(config, f"{name}: ")
    ids = [index for index in reader.token_ids(key, None) if index is not None]
    problems += reader.problems
    return ids


def _add_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str], problems: list[str]
) -> None:
    """Adds the tokens that only the configuration has, and makes the beginning and end of text special."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    decoder = config.get("added_tokens_decoder") or {}
    is_map = isinstance(decoder, dict) and all(
        i.isdecimal() and len(i) < 12 and isinstance(token, dict) for i, token in decoder.items()
    )
    if not is_map:
        problems.append(f"{CONFIG_FILE}: added_tokens_decoder must map ids to objects")
        return
    for index, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        content = token.get("content")
        if content in known:
            continue
        flags = {flag: token[flag] is True for flag in _ADDED_TOKEN_FLAGS if flag in token}
        if is_text(content):
            backend.add_tokens([AddedToken(content, **flags)])
        if not is_text(content) or backend.token_to_id(content) != int(index):
            problems.append(
                f"{CONFIG_FILE}: added token {shown(content)} does not get the id {index} that it should have"
            )
    for name in ("bos_token", "eos_token"):
        text = special.get(name)
        if text is not None and backend.token_to_id(text) is None:
            problems.append(f"{CONFIG_FILE}: {name} {text!r} is not in {TOKENIZER_FILE}")
        elif text is not None and text not in known:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
