"""Text to token ids and back, with the checkpoint's vocabulary and chat template."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import tokenizers

from lserve_jax.config.digest import text_digest
from lserve_jax.config.errors import InputError
from lserve_jax.text import gguf
from lserve_jax.text.chat import ChatFormat, ChatOptions, Message
from lserve_jax.text.errors import one_line
from lserve_jax.text.folder import CONFIG_FILE, TOKENIZER_FILE, read_folder
from lserve_jax.text.literals import ControlTexts, encode
from lserve_jax.text.parts import DEFAULT_TEMPLATE, TokenizerParts
from lserve_jax.weights.load import open_checkpoint

logger = logging.getLogger("lserve_jax")

type TokenizerSource = Path | Mapping[str, Any] | None


class Tokenizer:
    """A vocabulary, its special tokens and its chat template.

    Args:
      backend: the vocabulary and the rules of splitting, merging and decoding. Truncation and padding are switched off.
      special_tokens: texts by name (``bos_token``, ``eos_token``, …), as a chat template reads them.
      eos_token_ids: the tokens that end generation.
      chat_template: Jinja source; or sources by name, of which "default" needs no choice; or None.
      source: where all this came from, for messages.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: Sequence[int],
        chat_template: str | Mapping[str, str] | None,
        source: str,
    ):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._source = source
        self._has_warned = False
        templates = {DEFAULT_TEMPLATE: chat_template} if isinstance(chat_template, str) else chat_template or {}
        self._control_texts = ControlTexts(backend)
        self._chat = ChatFormat(self._control_texts, templates=templates, variables=self._special_tokens, source=source)
        self.eos_token_ids = tuple(eos_token_ids)

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Returns the tokenizer of a folder in Hugging Face's layout.

        Reads ``tokenizer.json`` and, if present, ``tokenizer_config.json``, ``special_tokens_map.json``,
        ``generation_config.json`` (its ``eos_token_id`` comes first in ``eos_token_ids``) and the chat templates:
        ``chat_template.jinja`` goes before ``chat_template.json``, and that before ``tokenizer_config.json``; templates
        in ``additional_chat_templates`` have names.

        Raises:
          InputError: if a file is missing or malformed; the message names all such files and keys.
        """
        return cls._of(read_folder(Path(path)), str(path))

    @classmethod
    def _of(cls, parts: TokenizerParts, source: str) -> "Tokenizer":
        return cls(
            parts.backend,
            special_tokens=parts.special_tokens,
            eos_token_ids=parts.eos_token_ids,
            chat_template=parts.chat_templates,
            source=source,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, source: str | None = None) -> "Tokenizer":
        """Returns the tokenizer that a GGUF file's metadata (plain Python values) describes.

        Args:
          metadata: key-values of the file; ``tokenizer.*`` is read.
          source: the file's name, for messages; None takes that of `lserve_jax.weights.gguf.Metadata`.

        Raises:
          InputError: if keys are missing, malformed or unknown; the message lists all of them.
        """
        name = source or getattr(metadata, "location", "GGUF metadata")
        return cls._of(gguf.read_metadata(metadata, source=name), name)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, special ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The texts of special tokens by name (``bos_token``, ``eos_token``, …), as far as they are named."""
        return self._special_tokens

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, or None."""
        return self._backend.token_to_id(self._special_tokens.get("bos_token", ""))

    @cached_property
    def digest(self) -> str:
        """Returns 16 hexadecimal digits that stand for the vocabulary and its rules, not for chat templates."""
        return text_digest(self._backend.to_str())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of a text, in which the texts of special tokens mean those tokens.

        Bytes that the vocabulary lacks are dropped, as other libraries do (SmolLM2 lacks U+0004, for example). The
        first text that itself begins with the tokens that are added before it is warned of.

        Args:
          text: anything that UTF-8 can encode.
          add_special_tokens: whether to add the tokens that the tokenizer puts around a text (usually the beginning
            token).
        """
        _check_text(text)
        ids = self._encoded(lambda: encode(self._backend, text, add_special_tokens=add_special_tokens))
        if add_special_tokens and self._leading:
            self._warn_of_repetition(ids)
        return ids

    @cached_property
    def _leading(self) -> list[int]:
        """The tokens that are added before a text."""
        for text in ("a", " ", "1"):  # the first of which the vocabulary has a token
            around, alone = (self._backend.encode(text, add_special_tokens=adds).ids for adds in (True, False))
            for start in range(len(around)):
                if alone and around[start : start + len(alone)] == alone:
                    return around[:start]
        return []

    def _warn_of_repetition(self, ids: Sequence[int]) -> None:
        count = len(self._leading)
        if self._has_warned or list(ids[count : 2 * count]) != self._leading:
            return
        self._has_warned = True
        text = self.decode(self._leading, skip_special_tokens=False)
        logger.warning(
            f"{self._source}: the prompt begins with {text}, which is added to every prompt, so that it stands there "
            "twice: leave it out of the text (a chat is best given as messages), or give token ids"
        )

    def _encoded(self, encode: Callable[[], list[int]]) -> list[int]:
        try:
            return encode()
        except Exception as error:  # a vocabulary may name an unknown token that it does not have
            raise InputError(f"{self._source}: the tokenizer cannot encode a text: {one_line(error)}") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of the ids; bytes that are not UTF-8 become U+FFFD, unknown ids add nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @property
    def chat_template(self) -> str | None:
        """The source of the default chat template, or None."""
        return self.chat_templates.get(DEFAULT_TEMPLATE)

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The sources of all chat templates, by name."""
        return self._chat.templates

    def decide_chat_format(self, advice: str) -> bool:
        """Returns whether a command writes prompts as messages; if there is no chat template, warns once and does not.

        Args:
          advice: what the command's user can do if there is no default template, for messages.

        Raises:
          InputError: if there are chat templates, but none is the default.
        """
        return self._chat.decide(advice)

    def render_chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> str:
        """Returns a conversation as text, in which the text of a special token in a message means that token.

        `apply_chat_template` can keep such text literal; use this only for programs that need text.

        Args:
          messages: as for `apply_chat_template`.
          **options: as for `apply_chat_template`; ``literal_roles`` is without effect.
        """
        return self._chat.render(messages, options)

    def apply_chat_template(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> list[int]:
        """Returns the ids of a conversation as the checkpoint's chat template writes it.

        The template alone decides on a beginning token: none is added. Text in a message that looks like a special
        token stays text, unless ``literal_roles`` leaves out the message's role.

        Args:
          messages: mappings ``{"role": …, "content": …}``; the template may read further keys. The content is a text or
            a list of parts, and may be missing in a message with ``tool_calls``.
          **options: see `lserve_jax.text.chat.ChatOptions`.

        Raises:
          InputError: if there is no template, messages or options are malformed, or the template refuses them or fails.
        """
        rendered, literals = self._chat.render_guarded(messages, options)
        _check_text(rendered)
        return self._encoded(lambda: self._control_texts.encode(rendered, literals))

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
        if self.chat_templates.keys() == {DEFAULT_TEMPLATE}:
            config["chat_template"] = self.chat_template
        elif self.chat_templates:
            named = self.chat_templates.items()
            config["chat_template"] = [{"name": name, "template": text} for name, text in named]
        (folder / TOKENIZER_FILE).write_text(self._backend.to_str(), encoding="utf-8")
        (folder / CONFIG_FILE).write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise InputError(f"a text must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"a text must be valid Unicode, got a lone surrogate at character {error.start}") from None


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
    found = tokenizer_source(source, named)
    if isinstance(found, Mapping):
        return Tokenizer.from_gguf(found)
    if found is None or (named is None and not (found / TOKENIZER_FILE).is_file()):
        return None
    return Tokenizer.from_folder(found)
