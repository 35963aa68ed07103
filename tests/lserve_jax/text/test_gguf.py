import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lserve_jax.config.errors import InputError
from lserve_jax.text.gguf import PRE_TOKENIZERS
from lserve_jax.text.tokenizer import Tokenizer, open_tokenizer
from lserve_jax.weights.gguf_header import Metadata

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "sentencepiece_ids.json").read_text())
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
# The bytes' spellings in a byte-level vocabulary, of those that the tests use.
LETTERS = [
    *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,'!-<>|_/",
    "Ġ",
    "Ċ",
    "č",
    "ĉ",
    "Ã",
    "©",
    "Ì",
    "ģ",
    "ī",
]
SPECIALS = {"<|end|>": CONTROL, "<|eot_id|>": CONTROL, "<tool>": USER_DEFINED, "[PAD]": UNUSED, "<unk>": UNKNOWN}


def byte_level(pre: str | None, *joined: str, **more: Any) -> dict[str, Any]:
    """Metadata of a vocabulary of letters in which each of the words is joined up, letter by letter."""
    merges, tokens = [], [*SPECIALS, *LETTERS]
    for word in joined:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
                tokens.append(word[:end])
    types = [SPECIALS.get(token, NORMAL) for token in tokens]
    prefix = "tokenizer.ggml."
    keys = {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        "eos_token_id": 0,
        "bos_token_id": 0,
    }
    keys |= {} if pre is None else {"pre": pre}
    return {prefix + key: value for key, value in (keys | more).items()}


def pieces(metadata: dict[str, Any], text: str, **options: Any) -> list[str]:
    ids = Tokenizer.from_gguf(metadata).encode(text, **options)
    return [metadata["tokenizer.ggml.tokens"][index] for index in ids]


@pytest.mark.parametrize("case", GOLDEN["texts"], ids=lambda case: ascii(case["text"])[:30])
def test_sentencepiece_metadata_gives_sentencepieces_ids(case: dict[str, Any]):
    tokenizer = Tokenizer.from_gguf(GOLDEN["metadata"])
    assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["decoded"]


def test_sentencepiece_starts_with_the_beginning_token_unless_told_otherwise():
    metadata = GOLDEN["metadata"]
    assert Tokenizer.from_gguf(metadata).encode("a")[0] == metadata["tokenizer.ggml.bos_token_id"]
    without = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.add_bos_token": False})
    assert without.encode("a") == without.encode("a", add_special_tokens=False)


def test_sentencepiece_marks_the_first_word_unless_told_otherwise():
    tokens = GOLDEN["metadata"]["tokenizer.ggml.tokens"]
    plain = Tokenizer.from_gguf(GOLDEN["metadata"] | {"tokenizer.ggml.add_space_prefix": False})
    ids = plain.encode("a the", add_special_tokens=False)
    assert tokens[ids[0]] == "a"
    assert plain.decode(ids) == "a the"
    assert plain.decode(plain.encode(" a")) == " a"


# Every one of these words is a token, unless a cut goes through it.
@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "a 12", ["a", "Ġ", "1", "2"]),
        ("smollm", "a  12", ["a", "ĠĠ", "1", "2"]),
        ("gpt-2", "a 12", ["a", "Ġ12"]),
        ("gpt-2", "a  12", ["a", "Ġ", "Ġ12"]),
        ("default", "a 12", ["a", "Ġ", "12"]),
        ("default", "a  12", ["a", "Ġ", "Ġ", "12"]),
        ("default", "1234567", ["123", "456", "7"]),
        ("default", "a'S", ["a", "'", "S"]),
        ("default", "!\n\na", ["!", "Ċ", "Ċ", "a"]),
        ("default", "a don't", ["a", "Ġdon", "'", "t"]),
        ("gpt-2", "a don't", ["a", "Ġdon", "'t"]),
        ("tekken", "1234567", list("1234567")),
        ("tekken", "a 12", ["a", "Ġ", "1", "2"]),
        ("tekken", "a don't", ["a", "Ġdon", "'t"]),
        ("tekken", "abCD", ["ab", "CD"]),
        ("llama-bpe", "abCD", ["abCD"]),
        ("tekken", "CDab", ["CDab"]),
        ("tekken", "!\n\na", ["!ĊĊ", "a"]),
        ("tekken", "!/a", ["!/", "a"]),
        ("llama-bpe", "!/a", ["!/", "a"]),
        ("tekken", "!/\n/a", ["!/Ċ/", "a"]),
        ("qwen2", "!/\n/a", ["!/Ċ", "/", "a"]),
        ("kormo", "e\u0301", ["e", "Ì", "ģ"]),
        ("gpt-2", "1234567", ["1234567"]),
        ("llama-bpe", "1234567", ["123", "456", "7"]),
        ("llama3", "1234567", ["123", "456", "7"]),
        ("llama-v3", "a 12", ["a", "Ġ", "12"]),
        ("qwen2", "1234567", list("1234567")),
        ("deepseek-r1-qwen", "a 12", ["a", "Ġ", "1", "2"]),
        ("gpt-2", "a'S", ["a", "'", "S"]),
        ("llama-bpe", "a'S", ["a", "'S"]),
        ("qwen2", "a'S", ["a", "'S"]),
        ("gpt-2", "!\n\na", ["!", "Ċ", "Ċ", "a"]),
        ("llama-bpe", "!\n\na", ["!ĊĊ", "a"]),
        ("qwen2", "!\n\na", ["!ĊĊ", "a"]),
        ("qwen2", "e\u0301", ["Ã©"]),
        ("gpt-2", "e\u0301", ["e", "Ì", "ģ"]),
    ],
)
def test_each_pre_tokenizer_cuts_where_it_should(pre: str, text: str, expected: list[str]):
    words = ["ĠĠ", "Ġ12", "12", "1234567", "123", "456", "'S", "!ĊĊ", "Ã©", "Ġdon", "'t", "abCD", "CDab", "CD", "!/Ċ/"]
    metadata = byte_level(pre, *words)
    assert pieces(metadata, text, add_special_tokens=False) == expected


def test_tekken_tells_upper_from_lower_case_beyond_ascii():
    # llama.cpp's expression, which knows the case of ASCII alone, would keep both letters together.
    assert pieces(byte_level("tekken", "Ã©Ãī"), "éÉ", add_special_tokens=False) == ["Ã©", "Ã", "ī"]
    assert pieces(byte_level("llama-bpe", "Ã©Ãī"), "éÉ", add_special_tokens=False) == ["Ã©Ãī"]


@pytest.mark.parametrize(
    ("pre", "same"),
    [
        ("falcon3", "llama-bpe"),
        ("falcon-h1", "llama-bpe"),
        ("pixtral", "llama-bpe"),
        ("midm-2.0", "llama-bpe"),
        ("lfm2", "llama-bpe"),
        ("a.x-4.0", "gpt-2"),
        ("mellum", "gpt-2"),
        ("minerva-7b", "smollm"),
    ],
)
def test_names_that_llama_cpp_treats_alike_split_alike(pre: str, same: str):
    assert PRE_TOKENIZERS[pre] == PRE_TOKENIZERS[same]


@pytest.mark.parametrize(
    ("pre", "problem"), [(None, "is missing"), ("nope", "'nope' is unknown (known: default, gpt-2,")]
)
def test_a_file_that_does_not_say_how_it_splits_is_refused_with_the_way_out(pre: str | None, problem: str):
    with pytest.raises(InputError) as caught:
        Tokenizer.from_gguf(byte_level(pre), source="file.gguf")
    assert f"tokenizer.ggml.pre {problem}" in str(caught.value)
    assert "--tokenizer FOLDER" in str(caught.value)


def test_a_sentencepiece_file_needs_no_pre_tokenizer():
    assert "tokenizer.ggml.pre" not in GOLDEN["metadata"]
    assert Tokenizer.from_gguf(GOLDEN["metadata"]).encode("a")


def test_only_the_families_of_llama3_and_tekken_start_with_the_beginning_token_by_themselves():
    family = {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
    found = {pre for pre in PRE_TOKENIZERS if pieces(byte_level(pre), "a") == ["<|end|>", "a"]}
    assert found == family


@pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED, UNUSED])
def test_an_end_of_turn_token_of_the_wrong_type_ends_and_is_a_control_token(
    kind: int, caplog: pytest.LogCaptureFixture
):
    metadata = byte_level("gpt-2")
    metadata["tokenizer.chat_template"] = "{{ messages[0].content }}<|eot_id|>"
    metadata["tokenizer.ggml.token_type"][1] = kind
    with caplog.at_level(logging.WARNING, "lserve_jax"):
        tokenizer = Tokenizer.from_gguf(metadata, source="file.gguf")
    assert tokenizer.eos_token_ids == (0, 1)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a<|eot_id|>"}])[-1] == 1
    assert tokenizer.encode("<|eot_id|>") == [1]
    assert tokenizer.decode([1]) == ""
    (record,) = caplog.records
    assert record.getMessage().startswith("file.gguf: the type of token '<|eot_id|>' is not that of a control token")


def test_other_tokens_keep_their_type(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "lserve_jax"):
        assert Tokenizer.from_gguf(byte_level("gpt-2")).decode([2]) == "<tool>"
    assert not caplog.records


def test_a_file_may_have_several_chat_templates():
    named = {"tokenizer.chat_template": "one", "tokenizer.chat_template.rag": "two"}
    tokenizer = Tokenizer.from_gguf(byte_level("gpt-2") | named)
    assert tokenizer.chat_templates == {"default": "one", "rag": "two"}
    assert tokenizer.chat_template == "one"


def test_messages_name_the_file_that_the_metadata_comes_from():
    metadata = Metadata(byte_level("gpt-2", merges=None), "folder/file.gguf")
    with pytest.raises(InputError, match=r"^folder/file\.gguf: cannot build its tokenizer: tokenizer\.ggml\.merges"):
        open_tokenizer(metadata)


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_file_says_what_is_added_around_a_text(bos: bool, eos: bool):
    metadata = byte_level("llama-bpe", add_bos_token=bos, add_eos_token=eos, eos_token_id=1)
    assert pieces(metadata, "a") == ["<|end|>"] * bos + ["a"] + ["<|eot_id|>"] * eos
    assert pieces(metadata, "a", add_special_tokens=False) == ["a"]


def test_llama3_takes_a_piece_that_is_a_token_whatever_the_merges():
    # "ab" joins first, so "abc" is out of the merges' reach as a + bc.
    metadata = byte_level("llama-bpe", "ab", "bc")
    metadata["tokenizer.ggml.tokens"].append("abc")
    metadata["tokenizer.ggml.token_type"].append(NORMAL)
    assert pieces(metadata, "abc", add_special_tokens=False) == ["abc"]
    assert pieces(metadata | {"tokenizer.ggml.pre": "qwen2"}, "abc") == ["ab", "c"]


def test_token_types_decide_what_is_special():
    metadata = byte_level("gpt-2")
    tokenizer = Tokenizer.from_gguf(metadata)
    assert pieces(metadata, "a<|end|><tool><unk>b") == ["a", "<|end|>", "<tool>", "<unk>", "b"]
    assert tokenizer.decode(tokenizer.encode("a<|end|><tool><unk>b")) == "a<tool>b"
    literal = Tokenizer.from_gguf(metadata | {"tokenizer.chat_template": "{{ messages[0].content }}"})
    ids = literal.apply_chat_template([{"role": "user", "content": "<|end|><tool>"}])
    assert ids == [*(LETTERS.index(letter) + len(SPECIALS) for letter in "<|end|>"), 2]


def test_generation_ends_at_the_ends_of_text_turn_and_message():
    tokens = byte_level("gpt-2")
    assert Tokenizer.from_gguf(tokens).eos_token_ids == (0, 1)  # <|eot_id|> is known by its name
    more = {"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 8}
    assert Tokenizer.from_gguf(tokens | more).eos_token_ids == (0, 9, 8, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "rwkv"}, "tokenizer.ggml.model must be gpt2 or llama, got 'rwkv'"),
        ({"model": None}, "tokenizer.ggml.model must be gpt2 or llama, got None"),
        ({"tokens": None}, "tokenizer.ggml.tokens must be a list of strings, got NoneType"),
        ({"tokens": ["a", "b", "a"]}, "tokenizer.ggml.tokens has 1 repeated entries, first 'a'"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type must have"),
        ({"token_type": "x"}, "tokenizer.ggml.token_type must be a list of numbers"),
        ({"merges": None}, "tokenizer.ggml.merges must be a list of strings"),
        ({"merges": ["ab"]}, "tokenizer.ggml.merges has 1 entries without two parts"),
        ({"merges": ["a ZZ"]}, "tokenizer.ggml.merges do not fit tokenizer.ggml.tokens"),
        ({"eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id must be an id below"),
        ({"bos_token_id": -1}, "tokenizer.ggml.bos_token_id must be an id below"),
        ({"eot_token_id": "x"}, "tokenizer.ggml.eot_token_id must be an id below"),
    ],
)
def test_bad_metadata_gives_one_line_that_names_the_key(changes: dict[str, Any], message: str):
    metadata = byte_level("gpt-2") | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(ValueError, match=r"^file\.gguf: ") as caught:
        Tokenizer.from_gguf(metadata, source="file.gguf")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_bad_keys_are_named_at_once():
    metadata = byte_level("nope", token_type=[1], merges=None, bos_token_id=-5)
    with pytest.raises(ValueError, match=r"pre .*token_type .*merges .*bos_token_id "):
        Tokenizer.from_gguf(metadata)


def test_a_template_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template must be a string, got int"):
        Tokenizer.from_gguf(byte_level("gpt-2") | {"tokenizer.chat_template": 3})
