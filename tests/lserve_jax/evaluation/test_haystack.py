"""Haystacks of a user's texts, the places of needles, the measures, and the search for the right length."""

import itertools
import random
import re
from pathlib import Path

import pytest

from lserve_jax.evaluation.haystack import Hay, cut, insert, open_haystack
from lserve_jax.evaluation.length import fit
from lserve_jax.evaluation.matching import matching_start, string_match_all, string_match_part
from lserve_jax.evaluation.rendering import word_render
from lserve_jax.evaluation.sample import Request, Sample
from lserve_jax.evaluation.tasks import TASKS


def request(length: int, source: str | Path = "prose") -> Request:
    return Request(length=length, index=1, seed=0, render=word_render, haystack=open_haystack(source))


def test_texts_of_a_folder_become_an_endless_stream_of_their_sentences(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("\ufeffThird one! Is this\nthe fourth?", encoding="utf-8")
    (tmp_path / "a.txt").write_text('First. "Second."  ', encoding="utf-8")
    (tmp_path / "c.json").write_text("{}", encoding="utf-8")
    (tmp_path / "d.txt").mkdir()
    stream = open_haystack(tmp_path)(random.Random(0))
    sentences = ["First.", '"Second."', "Third one!", "Is this the fourth?"]
    taken = list(itertools.islice(stream, 12))
    start = sentences.index(taken[0])
    assert taken == list(itertools.islice(itertools.cycle(sentences), start, start + 12))
    starts = {next(iter(open_haystack(tmp_path)(random.Random(seed)))) for seed in range(30)}
    assert starts == set(sentences)


def test_text_without_sentences_or_spaces_is_cut_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("字" * 2000 + "。" + "word " * 500, encoding="utf-8")
    pieces = list(itertools.islice(open_haystack(tmp_path)(random.Random(0)), 8))
    assert max(len(piece) for piece in pieces) <= 600
    assert {"字" * 600, "字" * 200 + "。"} <= set(pieces)
    assert {piece.replace("word", "").strip() for piece in pieces if piece[0] == "w"} == {""}


@pytest.mark.parametrize("name", ["niah_single_2", "copy"])
def test_tasks_hide_their_needles_in_the_users_texts(name: str, tmp_path: Path) -> None:
    lines = [f"Sentence {number} of {{the}} user says that {number * 7} is a number." for number in range(500)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    sample = TASKS[name].make(request(1000, tmp_path))
    assert "of {the} user says that" in sample.text
    assert 980 <= len(word_render(sample.text, sample.answer_prefix)) <= 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such folder (give 'prose' or a folder of .txt and .md files)"),
        ({}, "no text in it"),
        ({"a.txt": b" \n"}, "no text in it"),
        ({"a.txt": b"ok.", "b.md": b"ab\xff"}, "b.md is not UTF-8 text (byte 2)"),
        ({"a.txt": 32 * 2**20, "b.txt": 33 * 2**20}, "65 MiB of text, at most 64 MiB are read"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_a_line(
    content: dict[str, bytes | int] | None, message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "texts"
    if content is not None:
        folder.mkdir()
        for name, data in content.items():
            with (folder / name).open("wb") as file:
                if isinstance(data, int):  # a hole of so many bytes, which takes no room on the disk
                    file.truncate(data)
                else:
                    file.write(data)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        open_haystack(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_hay_grows_by_words_and_its_beginning_stays() -> None:
    hay = Hay(itertools.repeat("one two three"))
    taken = [" ".join(hay.take(size)) for size in range(60)]
    assert taken[0] == ""
    assert taken[13] == "one two three"
    assert taken[20] == "one two three one"
    assert all(len(text) <= size for size, text in enumerate(taken))
    assert all(longer.startswith(text) for text, longer in itertools.pairwise(taken))


def test_cut_keeps_whole_words() -> None:
    assert cut("alpha beta", 10) == "alpha beta"
    assert cut("alpha beta", 9) == "alpha"
    assert cut("alpha beta", 5) == "alpha"
    assert cut("alpha beta", 4) == ""
    assert cut(" alpha beta", 6) == " alpha"
    assert cut("日本語", 2) == "日本"
    assert cut("alpha", 0) == ""


def test_needles_stand_at_their_depth_in_their_order() -> None:
    pieces = ["aaaa"] * 10
    assert insert(pieces, [(0, "x"), (1, "y")]) == ["x", *pieces, "y"]
    assert insert(pieces, [(0.5, "x"), (0.5, "y"), (0.1, "z")]) == ["aaaa", "z", *pieces[:4], "x", "y", *pieces[5:]]
    assert insert([], [(0.7, "x"), (0.2, "y")]) == ["x", "y"]
    assert insert(["a" * 90, "b" * 10], [(0.7, "x")]) == ["a" * 90, "x", "b" * 10]


@pytest.mark.parametrize("tokens_a_unit", [0.01, 0.25, 40])
@pytest.mark.parametrize("jump", [0, 37])
def test_fit_finds_the_most_units_with_few_renderings(tokens_a_unit: float, jump: int) -> None:
    rendered = []

    def build(units: int) -> Sample:
        tokens = 30 + units * 0.21 + jump * (units // 700) + 3 * (units % 5 == 0)
        rendered.append(units)
        return Sample(text="w " * int(tokens), references=("r",), max_tokens=1)

    for length in (200, 1000, 9000):
        rendered.clear()
        units = fit("t", request(length), build, tokens_a_unit=tokens_a_unit)
        tokens = len(build(units).text.split())
        assert tokens <= length
        assert tokens >= length * 0.995 - jump
        assert len(rendered) <= 20


def test_fit_refuses_a_length_without_room() -> None:
    sample = Sample(text="w " * 50, references=("r",), max_tokens=1)
    with pytest.raises(ValueError, match=r"^task t: a prompt needs at least 50 tokens, got a length of 49$"):
        fit("t", request(49), lambda units: sample)
    assert fit("t", request(50), lambda units: sample) == 0


def test_matching_all_counts_and_matching_part_asks_for_any() -> None:
    assert string_match_all("It is ABC and d.", ("abc", "D", "e", "f")) == 0.5
    assert string_match_part("It is ABC and d.", ("x", "abc")) == 1
    assert string_match_part("It is", ("x", "abc")) == 0


def test_matching_start_counts_the_words_before_the_first_that_is_another() -> None:
    assert matching_start(" a b c d e", (" a b c d",)) == 1
    assert matching_start(" a b x d", (" a b c d",)) == 0.5
    assert matching_start("a b", ("a b c d",)) == 0.5
    assert matching_start("", ("a b",)) == 0
