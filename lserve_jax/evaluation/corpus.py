"""Natural text to continue and to measure perplexity on."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lserve_jax.config.errors import InputError
from lserve_jax.text.tokenizer import Tokenizer

_TEXT_FILES = (".txt", ".md", ".rst")


def python_reference() -> str:
    """Returns the reference of the Python language, about 500 KB of English that every Python includes."""
    from pydoc_data.topics import topics

    return "\n\n\n".join(dict.fromkeys(topics.values()))


def read_texts(path: str | Path) -> str:
    """Returns the text of a file, or of all text files of a folder in the order of their names.

    Raises:
      InputError: if there is no file, or one is not UTF-8, in one line that names it.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in _TEXT_FILES and file.is_file()]
    elif not path.is_file():
        raise InputError(f"{path}: no such file or folder of texts")
    texts = [_read(file) for file in files]
    if not any(text.strip() for text in texts):
        raise InputError(f"{path}: holds no text (of a folder, files that end in {', '.join(_TEXT_FILES)} are read)")
    return "\n\n\n".join(texts)


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start})") from None


@dataclass(frozen=True)
class Windows:
    """A text cut into windows of tokens that do not overlap, in an order drawn from a seed.

    Each window begins with the tokenizer's beginning token if there is one.
    """

    text: str
    tokenizer: Tokenizer
    seed: int

    @cached_property
    def _tokens(self) -> NDArray[np.int32]:
        return np.asarray(self.tokenizer.encode(self.text, add_special_tokens=False), np.int32)

    @cached_property
    def _head(self) -> tuple[int, ...]:
        bos = self.tokenizer.bos_token_id
        return (bos,) if bos is not None and self.tokenizer.encode("a")[0] == bos else ()

    def count(self, length: int) -> int:
        """Returns the number of windows of ``length`` tokens."""
        return len(self._tokens) // max(length - len(self._head), 1)

    def get(self, length: int, index: int) -> NDArray[np.int32]:
        """Returns window number ``index`` [length] int32 of the drawn order."""
        size = length - len(self._head)
        place = np.random.default_rng((self.seed, length)).permutation(self.count(length))[index]
        return np.concatenate([self._head, self._tokens[place * size : (place + 1) * size]]).astype(np.int32)
