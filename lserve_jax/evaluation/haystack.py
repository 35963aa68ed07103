"""The text in which needles are hidden: RULER's noise, generated prose, or the user's texts."""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from lserve_jax.config.errors import InputError
from lserve_jax.evaluation.sample import Request
from lserve_jax.text import prose

type Haystack = Callable[[random.Random], Iterator[str]]
"""Seed → an endless stream of sentences."""

PROSE = "prose"
"""Name of the haystack of generated prose."""

_DEPTHS = 10
_DEPTH_STRIDE = 3
"""Coprime to the number of depths, so that a few samples are spread over all depths."""

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SUFFIXES = (".txt", ".md")
_MAX_BYTES = 64 * 2**20
_MAX_SENTENCE = 600
"""Characters; longer sentences are cut, so that a needle finds a place near its depth."""
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"')\]”’]*\s+|(?<=[。！？])")


def sample_rng(task: str, request: Request, purpose: str = "") -> random.Random:
    """Returns the random numbers of one sample for one purpose."""
    return random.Random(f"{task} {request.length} {request.index} {request.seed} {purpose}")


def nominal_depth(index: int) -> float:
    """Returns the depth of a sample's needle, 0 (the beginning) … 1; ten samples have ten evenly spaced depths."""
    return index * _DEPTH_STRIDE % _DEPTHS / (_DEPTHS - 1)


def open_haystack(source: str | Path = PROSE) -> Haystack:
    """Returns the haystack that a command line names: ``prose``, or a folder of .txt and .md files.

    Raises:
      InputError: if the folder is missing or holds no text, too much text, or a file that is not UTF-8.
    """
    return prose.sentences if source == PROSE else _folder_haystack(Path(source))


def noise(rng: random.Random) -> Iterator[str]:
    """Yields RULER's line of five short sentences for ever."""
    del rng
    return itertools.repeat(_NOISE)


class Lazy:
    """A stream whose beginning can be read repeatedly."""

    def __init__(self, stream: Iterator[str]) -> None:
        self._stream = stream
        self._taken: list[str] = []

    def take(self, count: int) -> list[str]:
        """Returns the first ``count`` items."""
        self._taken += itertools.islice(self._stream, max(0, count - len(self._taken)))
        return self._taken[:count]


class Hay:
    """The beginning of a stream in any length; a longer one continues a shorter one.

    Args:
      stream: endless pieces of text: sentences or lines.
      separator: text between pieces.
    """

    def __init__(self, stream: Iterable[str], separator: str = " ") -> None:
        self._stream = iter(stream)
        self._pieces: list[str] = []
        self._ends: list[int] = []
        self.separator = separator

    def take(self, characters: int) -> list[str]:
        """Returns pieces of at most ``characters``, separators included; the last piece may be cut between words."""
        while not self._ends or self._ends[-1] < characters:
            start = self._ends[-1] if self._ends else 0
            self._pieces.append(next(self._stream))
            self._ends.append(start + len(self._pieces[-1]) + len(self.separator))
        pieces = []
        left = characters
        for piece in self._pieces:
            if len(piece) > left:
                pieces.append(cut(piece, left))
                break
            pieces.append(piece)
            left -= len(piece) + len(self.separator)
        return [piece for piece in pieces if piece]


def insert(pieces: Sequence[str], needles: Sequence[tuple[float, str]]) -> list[str]:
    """Returns the pieces with needles between them.

    A needle's depth is the share of the characters before it, 0 … 1. Needles of the same depth keep their order.
    """
    ends = list(itertools.accumulate((len(piece) for piece in pieces), initial=0))
    placed = [(min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1])), text) for depth, text in needles]
    result: list[str] = []
    done = 0
    for place, text in sorted(placed, key=lambda one: one[0]):
        result += (*pieces[done:place], text)
        done = place
    return [*result, *pieces[done:]]


def cut(text: str, characters: int) -> str:
    """Returns the whole words in the first ``characters``; cuts inside a word only if the text has no spaces there."""
    head = text[: max(characters, 0)]
    if len(text) <= len(head) or text[len(head)].isspace():
        return head.rstrip()
    words, space, _ = head.rpartition(" ")
    return words if space else ("" if " " in text else head)


def _folder_haystack(folder: Path) -> Haystack:
    sentences = _read_sentences(folder)

    def haystack(rng: random.Random) -> Iterator[str]:
        start = rng.randrange(len(sentences))
        return itertools.islice(itertools.cycle(sentences), start, None)

    return haystack


def _read_sentences(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise InputError(f"haystack {folder}: no such folder (give '{PROSE}' or a folder of .txt and .md files)")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.is_file())
    size = sum(path.stat().st_size for path in files)
    if size > _MAX_BYTES:
        raise InputError(f"haystack {folder}: {size >> 20} MiB of text, at most {_MAX_BYTES >> 20} MiB are read")
    sentences = []
    for path in files:
        sentences += _split(_read_text(path))
    if not sentences:
        raise InputError(f"haystack {folder}: no text in it: it needs .txt or .md files with text")
    return sentences


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"haystack file {path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"haystack file {path}: {error.strerror}") from None


def _split(text: str) -> Iterator[str]:
    for sentence in _SENTENCE_END.split(" ".join(text.split())):
        rest = sentence.strip()
        while rest:
            head = rest if len(rest) <= _MAX_SENTENCE else cut(rest, _MAX_SENTENCE) or rest[:_MAX_SENTENCE]
            yield head
            rest = rest[len(head) :].lstrip()
