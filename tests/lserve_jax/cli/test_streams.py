"""Standard streams that are narrow, closed or full: no answer is lost, and no command ends with a traceback."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from lserve_jax import calibrate, convert, demo, evaluate, generate
from lserve_jax.cli.common import run_command
from lserve_jax.cli.streams import to_json_line
from lserve_jax.config.errors import InputError
from lserve_jax.serve import __main__ as serve

ROOT = Path(__file__).parents[3]
TEXT = "naïve – 你好 😀"
FULL = Path("/dev/full")
GENERATE = (
    *("-m", "lserve_jax.generate", "--model", str(ROOT / "tests/golden/tiny/llama3"), "--prompt", "hello"),
    *("--max-model-len", "128", "--prefill-chunk", "64", "--max-tokens", "4"),
)
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    module.__name__: module.main for module in (generate, calibrate, convert, evaluate, demo, serve)
}


def say(text: str) -> Callable[[], None]:
    return lambda: print(text)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_a_character_that_stdout_lacks_becomes_an_escape(encoding: str, monkeypatch: pytest.MonkeyPatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", narrow)
    assert run_command(say(TEXT)) == 0
    assert narrow.buffer.getvalue() == f"{TEXT}\n".encode(encoding, "backslashreplace")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "utf-16"])
def test_json_is_json_whatever_the_encoding_of_stdout(encoding: str, monkeypatch: pytest.MonkeyPatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert run_command(lambda: print(to_json_line({"text": TEXT}))) == 0
    written = stream.buffer.getvalue().decode(encoding)
    assert json.loads(written) == {"text": TEXT}
    assert (TEXT in written) == encoding.startswith("utf")


@contextmanager
def closed(*names: str) -> Iterator[None]:
    """Closes streams of this process by name, as Python finds them if the caller has closed them."""
    before = {name: getattr(sys, name) for name in names}
    for name in names:
        setattr(sys, name, None)
    try:
        yield
        for name in names:
            getattr(sys, name).close()  # its replacement
    finally:
        for name in names:
            setattr(sys, name, before[name])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_stdout_and_stderr_does_its_work(command: str):
    with closed("stdin", "stdout", "stderr"):
        with pytest.raises(SystemExit) as helped:
            COMMANDS[command](["--help"])
        with pytest.raises(SystemExit) as refused:
            COMMANDS[command](["--no-such-flag"])
    assert (helped.value.code, refused.value.code) == (0, 2)


def test_an_error_without_stderr_is_a_status():
    def command() -> None:
        raise InputError("wrong")

    with closed("stderr"):
        assert run_command(command) == 2


def test_the_prompt_of_a_closed_stdin_is_empty(capsys: pytest.CaptureFixture[str]):
    with closed("stdin"):
        assert generate.main(["--prompt-file", "-"]) == 2
    assert capsys.readouterr().err == "error: the prompt is empty: give some text\n"


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("is_flushed", [False, True])
def test_a_full_disk_under_stdout_is_one_line(
    is_flushed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with FULL.open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run_command(lambda: print(TEXT, flush=is_flushed)) == 2
        full.flush()  # as at exit, where an error would be a traceback
    assert capsys.readouterr().err == "error: input or output: No space left on device\n"


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_stdout_does_not_hide_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def command() -> None:
        print(TEXT)
        raise InputError("wrong")

    with FULL.open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run_command(command) == 2
        full.flush()
    assert capsys.readouterr().err == "error: wrong\n"


def test_a_full_disk_under_stderr_leaves_the_status(monkeypatch: pytest.MonkeyPatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    def command() -> None:
        raise InputError("wrong")

    monkeypatch.setattr(sys, "stderr", Full())
    assert run_command(command) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("redirection", "stream"), [(">&-", "stderr"), ("2>&-", "stdout"), (">&- 2>&- <&-", None)])
def test_an_answer_survives_streams_that_the_shell_has_closed(redirection: str, stream: str | None):
    shell = f'exec "$0" "$@" {redirection}'
    result = subprocess.run(
        ["sh", "-c", shell, sys.executable, *GENERATE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    written = {"stdout": result.stdout, "stderr": result.stderr}
    assert {name for name, text in written.items() if text} == ({stream} if stream else set())


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.slow
def test_a_program_whose_disk_is_full_ends_with_one_line():
    with FULL.open("w") as full:
        command = [sys.executable, *GENERATE, "--quiet"]
        result = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, "error: input or output: No space left on device\n")
