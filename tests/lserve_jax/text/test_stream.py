import itertools
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from lserve_jax.text.stream import TextStream
from lserve_jax.text.tokenizer import Tokenizer

SPECIAL = 256  # the id of <eot> in the byte-level vocabulary


def byte_level() -> Tokenizer:
    """One token a byte, in the order of the bytes, and a special one."""
    # GPT-2's spelling of bytes: the printable ones as they are, the others from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelling = {byte: chr(byte) for byte in printable}
    spelling |= {byte: chr(0x100 + n) for n, byte in enumerate(b for b in range(256) if b not in spelling)}
    backend = tokenizers.Tokenizer(models.BPE(vocab={spelling[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eot>", special=True)])
    return Tokenizer(backend, special_tokens={}, eos_token_ids=[], chat_template=None, source="test")


def sentencepiece() -> Tokenizer:
    """Pieces with a leading space mark, and byte tokens (ids 0 to 255)."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "b", "▁a", "▁b", "é"]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[("▁", "a"), ("▁", "b")], byte_fallback=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend, special_tokens={}, eos_token_ids=[], chat_template=None, source="test")


BYTES, PIECES = byte_level(), sentencepiece()


def push_all(stream: TextStream, ids: Sequence[int]) -> list[str]:
    return [stream.push(index) for index in ids]


@given(ids=st.lists(st.integers(0, 256), max_size=80))
def test_any_bytes_come_out_as_if_decoded_at_once(ids: list[int]):
    stream = TextStream(BYTES)
    parts = [*push_all(stream, ids), stream.finish()]
    assert "".join(parts) == BYTES.decode(ids) == stream.text


@given(text=st.text(max_size=30))
def test_no_push_shows_half_a_character(text: str):
    ids = BYTES.encode(text)
    stream = TextStream(BYTES)
    parts = push_all(stream, ids)
    # Up to the last character, which may be a U+FFFD of the text itself and so look undecided.
    assert text.startswith("".join(parts))
    assert len("".join(parts)) >= len(text.rstrip("\ufffd"))
    assert "".join(parts) + stream.finish() == text


def test_a_character_appears_with_its_last_byte():
    stream = TextStream(BYTES)
    assert push_all(stream, "a€😀".encode()) == ["a", "", "", "€", "", "", "", "😀"]
    assert stream.finish() == ""


def test_an_unfinished_character_is_a_replacement_mark_at_the_end():
    stream = TextStream(BYTES)
    assert push_all(stream, [*b"x", *"😀".encode()[:3]]) == ["x", "", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.text == "x\ufffd"


def test_endless_invalid_bytes_are_not_held_back():
    stream = TextStream(BYTES)
    shown = "".join(push_all(stream, [0xFF] * 500))
    assert len(shown) >= 497
    assert shown + stream.finish() == "\ufffd" * 500


@given(ids=st.lists(st.one_of(st.integers(256, 261), st.sampled_from([[0xC3, 0xA9], [0xE2, 0x82, 0xAC]])), max_size=30))
def test_sentencepiece_spaces_and_byte_tokens_come_out_as_if_decoded_at_once(ids: list):
    flat = list(itertools.chain.from_iterable([index] if isinstance(index, int) else index for index in ids))
    stream = TextStream(PIECES)
    assert "".join([*push_all(stream, flat), stream.finish()]) == PIECES.decode(flat)


@given(ids=st.lists(st.integers(0x80, 261), max_size=40))
def test_sentencepiece_garbage_costs_no_piece(ids: list[int]):
    stream = TextStream(PIECES)
    text = "".join([*push_all(stream, ids), stream.finish()])
    assert text.count("a") == sum(index in (257, 259) for index in ids)
    assert text.count("é") >= ids.count(261)
    assert text == stream.text


def test_special_tokens_are_left_out_or_shown():
    ids = [*b"one", SPECIAL, *b" two"]
    hiding, showing = TextStream(BYTES), TextStream(BYTES, skip_special_tokens=False)
    assert "".join(push_all(hiding, ids)) == "one two"
    assert "".join(push_all(showing, ids)) == "one<eot> two"


def test_text_stops_before_a_stop_string_and_stays_so():
    stream = TextStream(BYTES, stop=["END"])
    assert "".join(push_all(stream, b"say: EN, E, END and more")) == "say: EN, E, "
    assert stream.stopped
    assert stream.text == "say: EN, E, "
    assert stream.push(ord("x")) == ""
    assert stream.finish() == ""


def test_what_may_become_a_stop_string_is_held_back_and_given_later():
    stream = TextStream(BYTES, stop=["abcd"])
    assert push_all(stream, b"xabcabz") == ["x", "", "", "", "abc", "", "abz"]
    assert not stream.stopped
    assert push_all(stream, b"abc") == ["", "", ""]
    assert stream.finish() == "abc"
    assert stream.text == "xabcabzabc"
    assert not stream.stopped


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text up to the stop string that is complete first when the text grows character by character."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], True
    return text, False


@given(text=st.text("ab\u20ac", max_size=25), stops=st.lists(st.text("ab\u20ac", min_size=1, max_size=4), max_size=3))
def test_stopping_is_that_of_a_text_that_grows_by_characters(text: str, stops: list[str]):
    stream = TextStream(BYTES, stop=stops)
    parts = push_all(stream, BYTES.encode(text))
    shown = "".join(parts)
    assert cut(text, stops)[0].startswith(shown)
    stream.finish()
    assert (stream.text, stream.stopped) == cut(text, stops)


class WholeWords:
    """A vocabulary whose tokens are long, so that a stop string may begin and end inside tokens."""

    WORDS = ("xab", "cab", "c", "b and abc", "aab")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.WORDS[index] for index in ids)


@given(
    ids=st.lists(st.integers(0, 4), max_size=8),
    stops=st.lists(st.sampled_from(["abc", "b", "bc", "aa", "b and", "cabc"]), max_size=3),
)
def test_stopping_does_not_depend_on_how_the_text_is_cut_into_tokens(ids: list[int], stops: list[str]):
    text = WholeWords().decode(ids)
    stream = TextStream(WholeWords(), stop=stops)
    push_all(stream, ids)
    stream.finish()
    assert (stream.text, stream.stopped) == cut(text, stops)


def texts_read(units: Sequence[str]) -> set[str]:
    """All texts of characters, and of any of the special tokens between them, from the first unit to the last."""
    texts = {""}
    for number, unit in enumerate(units):
        is_edge = number in (0, len(units) - 1)
        texts = {text + unit for text in texts} | (texts if len(unit) > 1 and not is_edge else set())
    return texts


def cut_units(units: Sequence[str], stops: Sequence[str]) -> tuple[str, bool]:
    """The shown text up to the stop string that is complete first, if special tokens may be read or passed over."""
    shown = ["" if unit == "<eot>" else unit for unit in units]
    for end in range(len(units) + 1):
        for start in range(end):
            if texts_read(units[start:end]) & set(stops):
                return "".join(shown[:start]), True
    return "".join(shown), False


@given(
    units=st.lists(st.sampled_from(["<eot>", *"ab<>t"]), max_size=12),
    stops=st.lists(
        st.sampled_from(["<eot>", "a<eot>", "<eot>b", "ab", "t>", "eot", "<eot><eot>", "b<eot>a", "<eot>ab"]),
        max_size=3,
    ),
)
def test_a_stop_string_may_contain_special_tokens_that_are_not_shown(units: list[str], stops: list[str]):
    stream = TextStream(BYTES, stop=stops)
    shown = "".join(push_all(stream, [SPECIAL if unit == "<eot>" else ord(unit) for unit in units]))
    assert cut_units(units, stops)[0].startswith(shown)
    assert (shown + stream.finish(), stream.stopped) == cut_units(units, stops)
    assert stream.text == cut_units(units, stops)[0]


def test_an_endless_row_of_special_tokens_costs_no_memory_and_a_stop_string_waits_for_its_end():
    stream = TextStream(BYTES, stop=["<eot>x", "end"])
    assert push_all(stream, [SPECIAL] * 1000) == [""] * 1000
    assert push_all(stream, b"so") == ["s", "o"]
    assert push_all(stream, [*b"e", SPECIAL, *b"n", SPECIAL, SPECIAL, *b"d"]) == [""] * 6
    assert (stream.stopped, stream.text) == (True, "so")


def test_a_token_that_ends_the_text_is_not_shown_and_may_complete_a_stop_string():
    for stop, text in ((["\n<eot>"], "one"), ([], "one\n")):
        stream = TextStream(BYTES, stop=stop, skip_special_tokens=False)
        push_all(stream, b"one\n")
        stream.push(SPECIAL, is_shown=False)
        stream.finish()
        assert (stream.text, stream.stopped) == (text, bool(stop))


def test_special_tokens_that_are_shown_are_text_like_any_other():
    stream = TextStream(BYTES, stop=["t> two"], skip_special_tokens=False)
    push_all(stream, [*b"one", SPECIAL, *b" two"])
    assert (stream.text, stream.stopped) == ("one<eo", True)


@pytest.mark.parametrize("stop", ["END", [""], [3]])
def test_stop_strings_must_be_a_sequence_of_texts(stop: object):
    with pytest.raises(ValueError, match="stop must be a sequence of non-empty strings"):
        TextStream(BYTES, stop=stop)  # type: ignore[arg-type]
