"""LongBench's metrics against values computed by hand, and by the benchmark's own functions where noted."""

import importlib.util
import sys

import pytest

from lserve_jax.evaluation import metrics

APPROX = {"rel": 0, "abs": 1e-12}


def rouge(common: int, answer: int, reference: int) -> float:
    precision, recall = common / answer, common / reference
    return 2 * precision * recall / (precision + recall + 1e-8)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The cat!", "a cat", 1.0),
        ("an ox", "ox", 1.0),
        ("cat cat dog", "cat dog dog", 2 / 3),  # 2 of 3 both ways: words are counted
        ("it is the big cat", "cat", 2 * (1 / 4) / (1 / 4 + 1)),
        ("dog", "cat", 0.0),
        ("the", "the", 0.0),  # nothing is left of either
        ("", "cat", 0.0),
    ],
)
def test_f1_of_words_knows_no_case_punctuation_or_articles(answer: str, reference: str, expected: float):
    assert metrics.qa_f1(answer, reference) == pytest.approx(expected, **APPROX)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("a b c d", "a c d", rouge(3, 4, 3)),
        ("a b c d", "d c b a", rouge(1, 4, 4)),
        ("x. x. x", "x x y", rouge(1, 1, 2)),  # words are sets, over sentences
        ("one two three . ", "one two three", rouge(3, 4, 3)),  # the empty sentence behind the stop is a word
        ("a b. c", "c. b", rouge(2, 3, 2)),  # each sentence of one against each of the other
        ("", "a", 0.0),
        ("...", "a", 0.0),
    ],
)
def test_rouge_l_counts_sets_of_words_in_order(answer: str, reference: str, expected: float):
    assert metrics.rouge_l(answer, reference) == pytest.approx(expected, **APPROX)


def test_of_two_subsequences_the_published_one_counts():
    # "b" or "a" is common to both; which of them matters as soon as another sentence has one of the two.
    assert metrics.rouge_l("a b. b", "b a") == pytest.approx(rouge(2, 2, 2), **APPROX)
    published = 0.5714285667120181
    reference = "It agreed on a budget of 3.5 million. The vote was close"
    assert metrics.rouge_l("The committee met. It agreed on a budget", reference) == pytest.approx(published, **APPROX)


def test_chinese_is_parted_into_words():
    # 我们|在|北京大学|学习 and 他|在|北京大学|学习
    pair = ("我们在北京大学，学习", "他在北京大学学习。")
    assert metrics.qa_f1_zh(*pair) == 3 / 4
    assert metrics.rouge_l_zh(*pair) == pytest.approx(rouge(3, 5, 5), **APPROX)  # here punctuation is a word


@pytest.mark.parametrize(
    ("answer", "reference", "classes", "expected"),
    [
        ("Type: Food", "Food", ("Food", "Animal"), 1.0),
        ("Food or Animal", "Food", ("Food", "Animal", "Sport"), 1 / 2),
        ("Animal", "Food", ("Food", "Animal"), 0.0),
        ("Other location", "Other location", ("location", "Other location"), 1.0),
        # As published: of two parts of the right name that follow each other, the second counts.
        ("abc", "abc", ("a", "ab", "abc"), 1 / 2),
        ("abc", "abc", ("a", "ab", "b", "abc"), 1 / 2),
    ],
)
def test_a_class_must_be_named_and_others_not(answer: str, reference: str, classes: tuple[str, ...], expected: float):
    assert metrics.classification(answer, reference, classes) == expected


def test_numbers_are_counted():
    assert metrics.count("3 of 4", "3") == 1 / 2
    assert metrics.count("none", "3") == 0.0
    assert metrics.retrieval("Paragraph 12", "Paragraph 12") == 1.0
    assert metrics.retrieval("Paragraph 12 or 1", "Paragraph 1") == 1 / 2
    assert metrics.retrieval_zh("段落3", "段落3") == 1.0
    with pytest.raises(ValueError, match=r"the reference 'number 3' does not name its paragraph, as in 'Paragraph 7'"):
        metrics.retrieval("3", "number 3")


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("abcd", "abcd", 1.0),
        ("abcd", "bcde", 0.75),  # 2 · 3 / 8
        ("\n\n```python\n# comment\n// comment\nabcd\nnext", "bcde", 0.75),
        ("abc", "abd", 0.67),  # whole percents
        ("a / b", "a / b", 1.0),
        ("x = foo(a, b)", "y = foo(b)", 0.78),  # difflib's; the edit distance would say otherwise
        ("# only a comment", "abc", 0.0),
        ("", "", 1.0),
    ],
)
def test_code_is_compared_by_its_first_line(answer: str, reference: str, expected: float):
    assert metrics.code_similarity(answer, reference) == expected


def test_without_jieba_chinese_metrics_say_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    spec = importlib.util.find_spec(metrics.__name__)
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)  # the module itself may have loaded jieba already
    spec.loader.exec_module(fresh)
    with pytest.raises(ValueError, match=r"pip install 'lserve_jax\[eval\]'"):
        fresh.qa_f1_zh("我们", "我们")
