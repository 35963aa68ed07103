"""The parts of a tokenizer, built from the ``tokenizer.ggml.*`` metadata of a GGUF file.

A GGUF file stores the vocabulary, but only a name (``tokenizer.ggml.pre``) for how text is split; `PRE_TOKENIZERS` says
what each name means. The ids equal llama.cpp's, with two exceptions, for which they are those of the models' original
``tokenizer.json``: ``qwen2`` normalises to NFC, and ``tekken`` tells upper from lower case beyond ASCII. ``default`` is
what converters wrote before they knew a model's splitting; llama.cpp's expression for it is no model's own.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from lserve_jax.config.errors import InputError
from lserve_jax.text.parts import DEFAULT_TEMPLATE, TokenizerParts
from lserve_jax.weights.gguf_config import END_TOKENS

logger = logging.getLogger("lserve_jax")

# The special tokens by the names that Hugging Face files and chat templates use.
SPECIAL_TOKEN_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
# Many files have no ``eot_token_id``. A token with one of these names ends a turn in every family that has it.
END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")

_TEMPLATE = "tokenizer.chat_template"
_INSTEAD = "take the tokenizer from the model's original folder (--tokenizer FOLDER, in Python tokenizer=FOLDER)"
_SPACE = "\u2581"  # SentencePiece writes a space as this character
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, kw_only=True)
class _Splitting:
    """How a byte-level vocabulary's text is cut before merging.

    Attributes:
      splits: regular expressions or ``"digits"``; each cuts the pieces that the previous one left. May be empty.
      gpt2_regex: whether GPT-2's expression cuts last.
      normalizer: ``"nfc"`` or None.
      ignore_merges: whether a piece that equals a token becomes that token, whatever the merges say.
      add_bos: whether a text starts with the beginning token if the file does not say.
    """

    splits: tuple[str, ...] = ()
    gpt2_regex: bool = False
    normalizer: str | None = None
    ignore_merges: bool = False
    add_bos: bool = False


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = r"[^\r\n\p{L}\p{N}]?" + f"(?:{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*)"
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"

_DEFAULT = _Splitting(splits=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"))
_GPT2 = _Splitting(gpt2_regex=True)
_SMOLLM = _Splitting(splits=("digits",), gpt2_regex=True)
_LLAMA3 = _Splitting(splits=(_WORDS + r"|\p{N}{1,3}" + _REST,), ignore_merges=True, add_bos=True)
_QWEN2 = _Splitting(splits=(_WORDS + r"|\p{N}" + _REST,), normalizer="nfc")
_QWEN2_PLAIN = _Splitting(splits=_QWEN2.splits)
_TEKKEN = _Splitting(
    splits=(_CASED_WORDS + r"|\p{N}" + _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1),), ignore_merges=True, add_bos=True
)

_NAMES: Mapping[_Splitting, tuple[str, ...]] = {
    _DEFAULT: ("default",),
    _GPT2: ("gpt-2", "a.x-4.0", "mellum", "trillion", "granite-docling"),
    _SMOLLM: ("smollm", "minerva-7b"),
    _LLAMA3: ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    _QWEN2: ("qwen2", "deepseek-r1-qwen"),
    _QWEN2_PLAIN: ("kormo", "megrez"),
    _TEKKEN: ("tekken",),
}
PRE_TOKENIZERS = {name: splitting for splitting, names in _NAMES.items() for name in names}
"""Ways of splitting by llama.cpp's names, of those that models of our architectures use."""


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """The checked metadata; ``merges`` is for byte-level files, ``scores`` for SentencePiece files."""

    model: str
    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]
    scores: list[float]
    special_ids: dict[str, int]

    def tokens_of(self, *types: TokenType) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in types]


def read_metadata(metadata: Mapping[str, Any], *, source: str) -> TokenizerParts:
    """Returns the tokenizer that the metadata describes.

    Args:
      metadata: the file's key-values as plain Python values; only ``tokenizer.*`` is read.
      source: the file's name, for messages.

    Raises:
      InputError: if keys are missing, malformed or unknown; the message lists all of them.
    """
    vocabulary = _read_vocabulary(metadata, source=source)
    return TokenizerParts(
        backend=_build_backend(vocabulary, metadata, source=source),
        special_tokens={name: vocabulary.tokens[index] for name, index in vocabulary.special_ids.items()},
        eos_token_ids=_end_token_ids(vocabulary, metadata),
        chat_templates=_chat_templates(metadata, source=source),
    )


def _build_backend(vocabulary: _Vocabulary, metadata: Mapping[str, Any], *, source: str) -> tokenizers.Tokenizer:
    build = _build_byte_level if vocabulary.model == "gpt2" else _build_sentencepiece
    try:
        backend, add_bos = build(vocabulary, metadata)
    except Exception as error:  # the library raises bare Exception for merges that do not fit the vocabulary
        raise InputError(f"{source}: tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from error
    control = vocabulary.tokens_of(TokenType.CONTROL, TokenType.UNKNOWN)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    whole = vocabulary.tokens_of(TokenType.USER_DEFINED)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in whole])
    before = _added_id(metadata, vocabulary, "bos_token", "tokenizer.ggml.add_bos_token", default=add_bos)
    after = _added_id(metadata, vocabulary, "eos_token", "tokenizer.ggml.add_eos_token", default=False)
    backend.post_processor = _surround(vocabulary.tokens, before, after)
    return backend


def _end_token_ids(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> list[int]:
    """Returns the ids that end generation: end of text, turn or message, and the tokens in `END_OF_TURN`."""
    named = [int(metadata[key]) for key in END_TOKENS if metadata.get(key) is not None]
    turns = [index for index, token in enumerate(vocabulary.tokens) if token in END_OF_TURN]
    return list(dict.fromkeys(named + turns))


def _chat_templates(metadata: Mapping[str, Any], *, source: str) -> dict[str, str]:
    """Returns the chat templates by name; all but the default one have keys of their own."""
    keys = {DEFAULT_TEMPLATE: _TEMPLATE}
    keys |= {key.removeprefix(f"{_TEMPLATE}."): key for key in metadata if key.startswith(f"{_TEMPLATE}.")}
    found = {name: metadata[key] for name, key in keys.items() if metadata.get(key) is not None}
    for name, template in found.items():
        if not isinstance(template, str):
            raise InputError(f"{source}: {keys[name]} must be a string, got {type(template).__name__}")
    return found


def _read_vocabulary(metadata: Mapping[str, Any], *, source: str) -> _Vocabulary:
    problems: list[str] = []
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        problems.append(f"tokenizer.ggml.model must be gpt2 or llama, got {model!r}")
    pre = metadata.get("tokenizer.ggml.pre")
    if model == "gpt2" and pre not in PRE_TOKENIZERS:
        what = "is missing" if pre is None else f"{pre!r} is unknown (known: {', '.join(PRE_TOKENIZERS)})"
        problems.append(f"tokenizer.ggml.pre {what}, so it is not known how text is split: {_INSTEAD}")
    tokens = _strings(metadata, "tokenizer.ggml.tokens", problems)
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated:
        problems.append(f"tokenizer.ggml.tokens has {len(repeated)} repeated entries, first {repeated[0]!r}")
    types = _numbers(metadata, "tokenizer.ggml.token_type", len(tokens), problems)
    merges = _merges(metadata, problems) if model == "gpt2" else []
    scores = _numbers(metadata, "tokenizer.ggml.scores", len(tokens), problems) if model == "llama" else []
    special_ids = _special_ids(metadata, len(tokens), problems)
    if problems:
        raise InputError(f"{source}: cannot build its tokenizer: {'; '.join(problems)}")
    return _Vocabulary(
        model=str(model),
        tokens=tokens,
        types=_corrected([int(kind) for kind in types], tokens, source=source),
        merges=merges,
        scores=scores,
        special_ids=special_ids,
    )


def _corrected(types: list[int], tokens: Sequence[str], *, source: str) -> list[int]:
    """Returns the token types, in which the tokens of `END_OF_TURN` are control tokens whatever the file says."""
    wrong = [i for i, token in enumerate(tokens) if token in END_OF_TURN and types[i] != TokenType.CONTROL]
    if not wrong:
        return types
    names = ", ".join(repr(tokens[index]) for index in wrong)
    logger.warning(f"{source}: the type of token {names} is not that of a control token: corrected, it ends a turn")
    return [TokenType.CONTROL if index in wrong else kind for index, kind in enumerate(types)]


def _strings(metadata: Mapping[str, Any], key: str, problems: list[str]) -> list[str]:
    values: Any = metadata.get(key)
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_list or not all(isinstance(value, str) for value in values):
        problems.append(f"{key} must be a list of strings, got {type(values).__name__}")
        return []
    return list(values)


def _numbers(metadata: Mapping[str, Any], key: str, count: int, problems: list[str]) -> list[float]:
    values = metadata.get(key)
    if not isinstance(values, Sequence) or not all(isinstance(value, (int, float)) for value in values):
        problems.append(f"{key} must be a list of numbers, got {type(values).__name__}")
        return [0] * count
    if len(values) != count:
        problems.append(f"{key} must have {count} entries like tokenizer.ggml.tokens, got {len(values)}")
        return [0] * count
    return list(values)


def _merges(metadata: Mapping[str, Any], problems: list[str]) -> list[tuple[str, str]]:
    lines = _strings(metadata, "tokenizer.ggml.merges", problems)
    # The search for the separator starts at the second character, since a part may itself be a space.
    pairs = [(line[:cut], line[cut + 1 :]) for line in lines if (cut := line.find(" ", 1)) > 0]
    if len(pairs) != len(lines):
        problems.append(f"tokenizer.ggml.merges has {len(lines) - len(pairs)} entries without two parts")
    return pairs


def _special_ids(metadata: Mapping[str, Any], count: int, problems: list[str]) -> dict[str, int]:
    keys = (*SPECIAL_TOKEN_KEYS.values(), *END_TOKENS)
    named = {key: metadata[key] for key in keys if metadata.get(key) is not None}
    for key, value in named.items():
        if not isinstance(value, int) or not 0 <= value < count:
            problems.append(f"{key} must be an id below {count}, got {value!r}")
    return {name: named[key] for name, key in SPECIAL_TOKEN_KEYS.items() if key in named}


def _build_byte_level(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, bool]:
    """Returns GPT-2 style byte-level BPE, and whether a text starts with the beginning token by default."""
    splitting = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    model = models.BPE(vocab=ids, merges=vocabulary.merges, ignore_merges=splitting.ignore_merges)
    backend = tokenizers.Tokenizer(model)
    if splitting.normalizer == "nfc":
        backend.normalizer = normalizers.NFC()
    cuts = [_cut(split) for split in splitting.splits]
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.gpt2_regex))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    return backend, splitting.add_bos


def _cut(split: str) -> pre_tokenizers.PreTokenizer:
    if split == "digits":
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(split), behavior="isolated")


def _build_sentencepiece(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, bool]:
    """Returns SentencePiece BPE with byte fallback, and whether a text starts with the beginning token by default."""
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    unknown = vocabulary.special_ids.get("unk_token")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges_from_scores(vocabulary),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    # The prefix also stands after a control token and before a leading space, as in llama.cpp and Llama 2's
    # original tokenizer.json.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if has_prefix else spaces
    text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*text, decoders.Strip(" ", 1, 0)] if has_prefix else text)
    return backend, True


def _merges_from_scores(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Returns every pair of tokens that joins into a third token, the highest score of the third first.

    SentencePiece joins the neighbours whose union has the highest score, so the order of scores is the order of merges.
    """
    normal = set(vocabulary.tokens_of(TokenType.NORMAL, TokenType.USER_DEFINED))
    joins = [
        (score, left, right)
        for token, score in zip(vocabulary.tokens, vocabulary.scores, strict=True)
        if token in normal
        for cut in range(1, len(token))
        if (left := token[:cut]) in normal and (right := token[cut:]) in normal
    ]
    joins.sort(key=lambda join: (join[0], len(join[1]), len(join[2])), reverse=True)
    return [(left, right) for _, left, right in joins]


def _added_id(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary, name: str, flag: str, *, default: bool
) -> int | None:
    return vocabulary.special_ids.get(name) if metadata.get(flag, default) else None


def _surround(tokens: Sequence[str], before: int | None, after: int | None) -> processors.PostProcessor | None:
    """Returns what puts the token ``before`` in front of a text and ``after`` behind it; None if both are None."""
    if before is None and after is None:
        return None
    # Not the tokens' texts: these may hold blanks and colons, which have a meaning in a template.
    named = {"BOS": before, "EOS": after}
    present = [{"id": name, "ids": [i], "tokens": [tokens[i]]} for name, i in named.items() if i is not None]
    single = [*(["BOS"] if before is not None else []), "$A", *(["EOS"] if after is not None else [])]
    return processors.TemplateProcessing(single=single, pair=[*single, "$B:1"], special_tokens=present)
