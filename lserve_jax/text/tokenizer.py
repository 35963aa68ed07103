"""Text to token ids and back, with the checkpoint's vocabulary and chat template."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from lserve_jax.config.errors import InputError
from lserve_jax.text import gguf
from lserve_jax.text.chat_template import ChatTemplate
from lserve_jax.text.literals import ControlTexts, Literals
from lserve_jax.weights.load import open_checkpoint

type TokenizerSource = Path | Mapping[str, Any] | None

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_MAP_FILE = "special_tokens_map.json"
_ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """A vocabulary, its special tokens and its chat template.

    Args:
      backend: the vocabulary and the rules of splitting, merging and decoding. Truncation and padding are switched off.
      special_tokens: texts by name (``bos_token``, ``eos_token``, …), as a chat template reads them.
      eos_token_ids: the tokens that end generation.
      chat_template: Jinja source, or None.
      source: where all this came from, for messages.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: Sequence[int],
        chat_template: str | None,
        source: str,
    ):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._chat_template = chat_template
        self._source = source
        self._compiled_template: ChatTemplate | None = None
        self._control_texts: ControlTexts | None = None
        self.eos_token_ids = tuple(eos_token_ids)

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Returns the tokenizer of a folder in Hugging Face's layout.

        Reads ``tokenizer.json`` and, if present, ``tokenizer_config.json``, ``special_tokens_map.json``,
        ``chat_template.jinja`` and ``generation_config.json`` (its ``eos_token_id`` comes first in ``eos_token_ids``).

        Raises:
          InputError: if a file is missing or malformed; the message names all such files and keys.
        """
        folder = Path(path)
        problems: list[str] = []
        backend = _read_backend(folder, problems)
        config = _read_json(folder, CONFIG_FILE, problems)
        special_map = _read_json(folder, SPECIAL_MAP_FILE, problems)
        generation = _read_json(folder, GENERATION_FILE, problems)
        template = _read_template(folder, config, problems)
        special = _special_tokens(special_map, SPECIAL_MAP_FILE, problems)
        special |= _special_tokens(config, CONFIG_FILE, problems)
        ends = _read_ids(generation, "eos_token_id", GENERATION_FILE, problems)
        ends += _read_ids(config, "eos_token_ids", CONFIG_FILE, problems)
        if backend is not None:
            _add_tokens(backend, config, special, problems)
            ends += [index for index in [backend.token_to_id(special.get("eos_token", ""))] if index is not None]
        if problems or backend is None:
            raise InputError(f"{folder}: cannot read its tokenizer: {'; '.join(problems)}")
        ends = list(dict.fromkeys(ends))
        return cls(backend, special_tokens=special, eos_token_ids=ends, chat_template=template, source=str(folder))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, source: str = "GGUF metadata") -> "Tokenizer":
        """Returns the tokenizer that a GGUF file's metadata (plain Python values) describes.

        Args:
          metadata: key-values of the file; ``tokenizer.*`` is read.
          source: the file's name, for messages.

        Raises:
          InputError: if keys are missing, malformed or unknown; the message lists all of them.
        """
        backend = gguf.build_backend(metadata, source=source)
        template = metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise InputError(f"{source}: tokenizer.chat_template must be a string, got {type(template).__name__}")
        return cls(
            backend,
            special_tokens=gguf.special_tokens(metadata),
            eos_token_ids=gguf.end_token_ids(metadata),
            chat_template=template,
            source=source,
        )

    @property
    def vocab_size(self) -> int:
        """The number of tokens, special ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, or None."""
        return self._backend.token_to_id(self._special_tokens.get("bos_token", ""))

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can be used."""
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of a text, in which the texts of special tokens mean those tokens.

        Bytes that the vocabulary lacks are dropped, as other libraries do (SmolLM2 lacks U+0004, for example).

        Args:
          text: anything that UTF-8 can encode.
          add_special_tokens: whether to add the tokens that the tokenizer puts around a text (usually the beginning
            token).
        """
        _check_text(text)
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # a vocabulary may name an unknown token that it does not have
            raise InputError(f"{self._source}: the tokenizer cannot encode a text: {_one_line(error)}") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of the ids; bytes that are not UTF-8 become U+FFFD, unknown ids add nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template, or None."""
        return self._chat_template

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as text, in which the text of a special token in a message means that token.

        `apply_chat_template` keeps such text literal; use this only for programs that need text.
        """
        _check_messages(messages)
        return self._template().render(messages, add_generation_prompt=add_generation_prompt)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Returns the ids of a conversation as the checkpoint's chat template writes it.

        The template alone decides on a beginning token: none is added. Text in a message that looks like a special
        token stays text.

        Args:
          messages: mappings ``{"role": …, "content": …}``; the template may read further keys.
          add_generation_prompt: whether to end with the head of the assistant's answer.

        Raises:
          InputError: if there is no template, the messages are malformed, or the template refuses them or fails.
        """
        _check_messages(messages)
        template = self._template()
        if self._control_texts is None:
            self._control_texts = ControlTexts(self._backend)
        literals = Literals()
        guarded = self._control_texts.guard(messages, literals)
        rendered = template.render(guarded, add_generation_prompt=add_generation_prompt)
        _check_text(rendered)
        if literals.texts:
            return self._control_texts.encode(rendered, literals)
        return self.encode(rendered, add_special_tokens=False)

    def _template(self) -> ChatTemplate:
        if self._chat_template is None:
            raise InputError(f"{self._source}: the model has no chat template; give the prompt as plain text (--raw)")
        if self._compiled_template is None:
            self._compiled_template = ChatTemplate(
                self._chat_template, source=self._source, variables=self._special_tokens
            )
        return self._compiled_template

    def save(self, folder: str | Path) -> None:
        """Writes the ``tokenizer.json`` and ``tokenizer_config.json`` of the same tokenizer, for `from_folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            # Not Hugging Face's key: there, generation_config.json has these ids, and it belongs to the model.
            "eos_token_ids": list(self.eos_token_ids),
            **self._special_tokens,
        }
        if self._chat_template is not None:
            config["chat_template"] = self._chat_template
        (folder / TOKENIZER_FILE).write_text(self._backend.to_str(), encoding="utf-8")
        (folder / CONFIG_FILE).write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _read_backend(folder: Path, problems: list[str]) -> tokenizers.Tokenizer | None:
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        has_other = (folder / "tokenizer.model").is_file()
        hint = " (tokenizer.model cannot be read: let transformers save the tokenizer first)" if has_other else ""
        problems.append(f"{TOKENIZER_FILE} is missing{hint}")
        return None
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except BaseException as error:  # the library raises bare Exception, or its BaseException when it panics
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        problems.append(f"{TOKENIZER_FILE} is not a tokenizer: {_one_line(error)}")
        return None


def _read_json(folder: Path, name: str, problems: list[str]) -> dict[str, Any]:
    """Returns the object in a file, or an empty one if there is no such file."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        problems.append(f"{name} is not JSON: {_one_line(error)}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{name} must hold an object, got {type(value).__name__}")
        return {}
    return value


def _read_template(folder: Path, config: Mapping[str, Any], problems: list[str]) -> str | None:
    """Returns the chat template of its file, or else of the configuration (there a text or a list of named ones)."""
    path = folder / TEMPLATE_FILE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (ValueError, OSError) as error:
            problems.append(f"{TEMPLATE_FILE} cannot be read: {_one_line(error)}")
            return None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        problems.append(f"{CONFIG_FILE}: chat_template must be a string, got {type(template).__name__}")
        return None
    return template


def _special_tokens(config: Mapping[str, Any], name: str, problems: list[str]) -> dict[str, str]:
    """Returns the special tokens' texts by name; a file gives each as a text or as an object with ``content``."""
    special = {}
    for key in SPECIAL_NAMES:
        value = config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            special[key] = text
        elif value is not None:
            problems.append(f"{name}: {key} must be a string or an object with content, got {value!r:.60}")
    return special


def _read_ids(config: Mapping[str, Any], key: str, name: str, problems: list[str]) -> list[int]:
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in ids):
        return ids
    problems.append(f"{name}: {key} must be a token id or a list of them, got {value!r:.60}")
    return []


def _add_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str], problems: list[str]
) -> None:
    """Adds the tokens that only the configuration has, and makes the beginning and end of text special."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    decoder = config.get("added_tokens_decoder") or {}
    is_map = isinstance(decoder, dict) and all(
        i.isdecimal() and isinstance(token, dict) for i, token in decoder.items()
    )
    if not is_map:
        problems.append(f"{CONFIG_FILE}: added_tokens_decoder must map ids to objects")
        return
    for index, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        content = token.get("content")
        if content in known:
            continue
        flags = {flag: token[flag] is True for flag in _ADDED_TOKEN_FLAGS if flag in token}
        if isinstance(content, str):
            backend.add_tokens([AddedToken(content, **flags)])
        if not isinstance(content, str) or backend.token_to_id(content) != int(index):
            problems.append(f"{CONFIG_FILE}: added token {content!r} does not get the id {index} that it should have")
    for name in ("bos_token", "eos_token"):
        text = special.get(name)
        if text is not None and backend.token_to_id(text) is None:
            problems.append(f"{CONFIG_FILE}: {name} {text!r} is not in {TOKENIZER_FILE}")
        elif text is not None and text not in known:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise InputError(f"a text must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"a text must be valid Unicode, got a lone surrogate at character {error.start}") from None


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("messages must be a list of at least one {'role': …, 'content': …}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"messages[{index}] must be a mapping with a string 'role', got {message!r:.80}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def tokenizer_source(source: TokenizerSource, named: str | None = None) -> TokenizerSource:
    """Returns where `open_tokenizer` reads: a folder or the metadata of a GGUF file; None for nowhere."""
    if named is None:
        return source
    return open_checkpoint(named).tokenizer_source if Path(named).suffix == ".gguf" else Path(named)


def open_tokenizer(source: TokenizerSource, named: str | None = None) -> Tokenizer | None:
    """Returns the tokenizer that ``named`` names, or else the checkpoint's; None if it has none.

    Args:
      source: where the checkpoint's tokenizer is: a folder, the metadata of its GGUF file, or None.
      named: folder or GGUF file to take the tokenizer from instead.
    """
    source = tokenizer_source(source, named)
    if source is None:
        return None
    if isinstance(source, Mapping):
        return Tokenizer.from_gguf(source)
    if named is None and not (source / TOKENIZER_FILE).is_file():
        return None
    return Tokenizer.from_folder(source)
