"""The settings of the server: what is wrong is said at once, and the key is shown nowhere."""

from typing import Any

import pytest

from lserve_jax.config.errors import InputError
from lserve_jax.serve.options import ServeOptions


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": 65536}, r"^port=65536 must be 0 to 65535$"),
        ({"port": -1}, r"^port=-1 must be 0 to 65535$"),
        ({"port": 80.0}, r"^port=80\.0 must be 0 to 65535$"),
        ({"max_queued_requests": -1}, "max_queued_requests"),
        ({"max_queued_tokens": 1.5}, "max_queued_tokens"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"default_max_tokens": 0}, "default_max_tokens"),
        ({"request_timeout": -1.0}, "request_timeout=-1.0 must be a number of seconds, not below 0"),
        ({"stuck_after": float("nan")}, "stuck_after=nan must be a number of seconds"),
        ({"drain_timeout": float("inf")}, "drain_timeout=inf must be a number of seconds"),
        ({"api_key": ""}, "api_key must be of letters, digits and signs of ASCII, without spaces, and not empty"),
        ({"port": 65536, "max_body_bytes": 0}, r"max_body_bytes.*; port=65536"),
    ],
)
def test_what_is_out_of_range_is_named(values: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        ServeOptions(**values)


@pytest.mark.parametrize("key", ["two words", "schlüssel", "line\n", " secret"])
def test_a_key_that_no_header_can_bring_is_refused_without_showing_it(key: str):
    with pytest.raises(InputError) as refused:
        ServeOptions(api_key=key)
    assert key.strip() not in str(refused.value)


def test_the_key_is_not_in_the_words_for_the_settings():
    assert "sk-hidden" not in repr(ServeOptions(api_key="sk-hidden"))


def test_the_defaults_are_valid_and_reach_this_machine_alone():
    assert ServeOptions().host == "127.0.0.1"
    assert ServeOptions().api_key is None
