"""Tests do not change what later tests run under."""

import logging

import pytest

from lserve_jax.cli.common import set_up_logging


@pytest.fixture(scope="module")
def quiet_command() -> None:
    set_up_logging(is_quiet=True)


@pytest.mark.usefixtures("quiet_command")
def test_a_command_run_once_for_many_tests_leaves_logging_as_it_was(caplog: pytest.LogCaptureFixture):
    logging.getLogger("lserve_jax").warning("heard")
    assert caplog.messages == ["heard"]
    assert all(type(handler) is not logging.StreamHandler for handler in logging.root.handlers)
