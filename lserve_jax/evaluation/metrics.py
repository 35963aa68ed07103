"""LongBench's metrics (arXiv 2308.14508, appendix): an answer and one reference → 0 … 1.

Values equal those of the benchmark's evaluation, including its quirks, so that they can be compared with published
values. A comment names each quirk.
"""

import difflib
import logging
import re
import string
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from lserve_jax.config.errors import InputError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHINESE_PUNCTUATION = str.maketrans(
    "",
    "",
    string.punctuation
    + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､"
    + "、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.",
)


def qa_f1(answer: str, reference: str) -> float:
    """Returns the F1 of words, without case, punctuation and articles."""
    return _f1(_words(answer), _words(reference))


def qa_f1_zh(answer: str, reference: str) -> float:
    """Returns the F1 of Chinese words, without case and punctuation."""
    return _f1(_chinese_words(answer), _chinese_words(reference))


def rouge_l(answer: str, reference: str) -> float:
    """Returns the F1 of Rouge-L (Lin, 2004), of words that are in the same order in both.

    As in the package `rouge` 1.0.1, which the benchmark uses, sentences end at full stops, blanks separate words, and
    words are counted as sets over all sentences. (That package recurses, and the benchmark gives 0 for a sentence that
    is too long for it; this function computes the value.)
    """
    answer_sentences, reference_sentences = _sentences(answer), _sentences(reference)
    if not answer_sentences or not reference_sentences:
        return 0.0
    common = {
        word
        for ours in reference_sentences
        for theirs in answer_sentences
        for word in _common_subsequence(ours, theirs)
    }
    precision = len(common) / len(set().union(*answer_sentences))
    recall = len(common) / len(set().union(*reference_sentences))
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l_zh(answer: str, reference: str) -> float:
    """Returns `rouge_l` of Chinese words."""
    return rouge_l(" ".join(_segment(answer)), " ".join(_segment(reference)))


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """Returns 1 / (number of classes that the answer names) if the right one is among them, else 0.

    A class whose name is part of the right one's does not count, unless, as published, it directly follows another such
    class.
    """
    named = [name for name in classes if name in answer]
    counted, is_skipped = [], False
    for name in named:
        is_part = not is_skipped and name in reference and name != reference
        if not is_part:
            counted.append(name)
        # The published loop removes from the list over which it iterates, and so skips the entry after a removed one.
        is_skipped = is_part
    return 1 / len(counted) if reference in counted else 0.0


def retrieval(answer: str, reference: str) -> float:
    """Returns the share of the numbers in the answer that equal the number of the reference, "Paragraph 7"."""
    return count(answer, _number("Paragraph ", reference))


def retrieval_zh(answer: str, reference: str) -> float:
    """Returns `retrieval` for a reference "段落7"."""
    return count(answer, _number("段落", reference))


def count(answer: str, reference: str) -> float:
    """Returns the share of the numbers in the answer that equal the reference."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def code_similarity(answer: str, reference: str) -> float:
    """Returns the similarity of the answer's first line of code and the reference, in whole percents.

    The benchmark uses `fuzzywuzzy.ratio`, which is Python's `difflib` unless python-Levenshtein is also installed.
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


METRICS: Mapping[str, Callable[..., float]] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge_l": rouge_l,
    "rouge_l_zh": rouge_l_zh,
    "classification": classification,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "count": count,
    "code_similarity": code_similarity,
}


def _f1(answer: list[str], reference: list[str]) -> float:
    common = (Counter(answer) & Counter(reference)).total()
    if not common:
        return 0.0
    precision, recall = common / len(answer), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def _chinese_words(text: str) -> list[str]:
    words = ("".join(word.lower().translate(_CHINESE_PUNCTUATION).split()) for word in _segment(text))
    return [word for word in words if word]


def _number(prefix: str, reference: str) -> str:
    found = re.search(prefix + r"(\d+)", reference)
    if found is None:
        raise InputError(f"the reference {reference!r:.60} does not name its paragraph, as in {prefix + '7'!r}")
    return found[1]


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _common_subsequence(x: list[str], y: list[str]) -> list[str]:
    """Returns the longest common subsequence that the benchmark takes, the last word first."""
    lengths = [[0] * (len(y) + 1)]  # [i][j]: for the first i words of x and the first j of y
    for word in x:
        above, row = lengths[-1], [0]
        for j, other in enumerate(y):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        lengths.append(row)
    i, j, common = len(x), len(y), []
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            common.append(x[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return common


def _segment(text: str) -> list[str]:
    """Returns the words of a Chinese text, as jieba separates them."""
    return list(_segmenter().cut(text))


@cache
def _segmenter() -> Any:
    """Returns jieba's tokenizer with its dictionary loaded (about a second)."""
    try:
        with warnings.catch_warnings(action="ignore"):  # old code: escapes in its source, pkg_resources
            import jieba
    except ImportError:
        raise InputError("Chinese metrics need jieba: pip install 'lserve_jax[eval]'") from None
    jieba.setLogLevel(logging.WARNING)
    segmenter: Any = jieba.Tokenizer()
    # It caches its marshalled dictionary in /tmp, where anyone may put another file; so it gets a private folder.
    with tempfile.TemporaryDirectory() as folder:
        segmenter.tmp_dir = folder
        segmenter.initialize()
    return segmenter
