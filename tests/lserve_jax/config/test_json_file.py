import os
from pathlib import Path
from typing import Any

import pytest

from lserve_jax.config import json_file
from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.json_file import read_json


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


def test_a_byte_order_mark_is_no_part_of_the_text(path: Path):
    path.write_text('{"a": "ü"}', encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert read_json(path) == {"a": "ü"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "must hold a JSON object, got list"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b'{"a": "\xe9"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "key 'a' has two different values; remove one"),
        (b'{"b": [{"a": 1, "c": 0, "a": null}]}', "key 'a' has two different values; remove one"),
        (b'{"a\\nb": 1, "a\\nb": 2}', r"key 'a\nb' has two different values"),
    ],
)
def test_a_broken_file_is_named_in_one_line(data: bytes, reason: str, path: Path):
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(caught.value)


def test_a_key_that_is_repeated_with_its_value_is_read(path: Path):
    path.write_text('{"a": [1], "a": [1.0]}')
    assert read_json(path) == {"a": [1]}


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_waited_for(make: Any, path: Path):
    make(path)
    with pytest.raises(InputError, match=r"config\.json: is not a file$"):
        read_json(path)


def test_a_file_that_is_missing_or_may_not_be_read_is_named(path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r"config\.json: cannot be read \(No such file or directory\)$"):
        read_json(path)
    path.write_text("{}")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # tests may run as root, who may read everything
    with pytest.raises(InputError, match=r"config\.json: cannot be read \(Permission denied\)$"):
        read_json(path)


def test_a_file_without_end_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch):
    path.write_text('{"a": 1}')
    monkeypatch.setattr(json_file, "LARGEST_FILE", 8)
    assert read_json(path) == {"a": 1}
    monkeypatch.setattr(json_file, "LARGEST_FILE", 7)
    with pytest.raises(InputError, match=r"config\.json: has 8 bytes, more than 7"):
        read_json(path)


def test_long_values_are_cut():
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown(list(range(1000)))) == 81
