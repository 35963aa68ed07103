"""What a checkpoint says about its tokenizer, whatever its files are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tokenizers

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
DEFAULT_TEMPLATE = "default"
"""The name of the chat template that is taken if none is named."""


@dataclass(frozen=True, kw_only=True)
class TokenizerParts:
    """The parts of a tokenizer.

    Attributes:
      backend: the vocabulary and the rules of splitting, merging and decoding.
      special_tokens: texts by name (``bos_token``, …).
      eos_token_ids: the tokens that end generation.
      chat_templates: Jinja sources by name.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    eos_token_ids: Sequence[int]
    chat_templates: Mapping[str, str]
