"""Short digests, by which texts, values and files are told apart."""

import hashlib
import json
from typing import Any

DIGITS = 16
"""Hexadecimal digits of every digest: enough to tell apart what nobody made to collide."""


def text_digest(text: str) -> str:
    """Returns the digits that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def json_digest(value: Any) -> str:
    """Returns the digits that stand for a JSON value, whatever the order of its keys."""
    return text_digest(json.dumps(value, sort_keys=True))
