"""`python -m lserve_jax.serve`: one line for what is wrong, one to try when it is ready, and an end in order."""

import http.client
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

from lserve_jax.serve import __main__ as command
from lserve_jax.serve.server import take_port

ROOT = Path(__file__).parents[3]
PATIENCE = 600.0


# --- what is wrong ---------------------------------------------------------------------------------------------------


def line_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the command ends."""
    assert command.main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--port 65536", "port=65536 must be 0 to 65535"),
        ("--host no.such.host.invalid", "--host 'no.such.host.invalid' is not an address of this machine"),
        ("--host 192.0.2.1 --port 0", "cannot listen at 192.0.2.1:0"),
        ("--metrics-prefix 1x", "metrics_prefix='1x' must be letters"),
        ("--max-queued-requests -1", "max_queued_requests"),
        ("--port 0 --model /no/such/model", "/no/such/model: no such"),
        ("--port 0 --max-num-seqs 0", "max_num_seqs"),
        ("--port 0 --page-size 3", "page_size=3"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: str, line: str, capsys: pytest.CaptureFixture[str]):
    assert line in line_of(capsys, *arguments.split())


def test_a_port_in_use_is_found_before_the_model_is_opened(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command, "_load", lambda args: pytest.fail("the model was opened"))
    with take_port("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        found = line_of(capsys, "--port", str(port))
    assert found.startswith(f"cannot listen at 127.0.0.1:{port} (Address already in use): another --port")


def test_an_empty_key_in_the_environment_is_not_no_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(command.KEY_VARIABLE, "")
    assert line_of(capsys, "--port", "0").startswith("LSERVE_API_KEY is set but empty")


def test_the_key_comes_from_the_flag_or_else_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    parse = command.build_parser().parse_args
    assert command._options(parse([])).api_key is None
    monkeypatch.setenv(command.KEY_VARIABLE, "from-environment")
    assert command._options(parse([])).api_key == "from-environment"
    assert command._options(parse(["--api-key", "from-flag"])).api_key == "from-flag"


@pytest.mark.parametrize(
    ("host", "key", "is_warned"),
    [("0.0.0.0", None, True), ("0.0.0.0", "sk-1", False), ("127.0.0.1", None, False)],
)
def test_a_server_that_others_reach_without_a_key_warns(
    host: str, key: str | None, is_warned: bool, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--host", host, "--port", "0", "--model", "/no/such/model", *(["--api-key", key] if key else [])]
    assert command.main(arguments) == 2
    warned = f"whoever reaches {host} can use this model: set LSERVE_API_KEY to ask for a key\n"
    assert (warned in capsys.readouterr().err) == is_warned


def test_without_the_extra_the_command_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "lserve_jax.serve.server", None)
    assert line_of(capsys).startswith("the server needs its extra: pip install 'lserve_jax[serve]'")


# --- a process -------------------------------------------------------------------------------------------------------


@contextmanager
def started(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "lserve_jax.serve", "--port", "0", "--max-num-seqs", "2", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def welcome_of(process: subprocess.Popen[str]) -> tuple[str, Request]:
    """The address that a ready server says, and the request of the line to try."""
    assert process.stdout is not None
    first, line = process.stdout.readline(), process.stdout.readline()
    assert re.match(
        r"serving smollm2-135m-instruct at http://127\.0\.0\.1:\d+ \(2 requests at once, 8192 tokens", first
    )
    program, flag, url, *options = shlex.split(line)
    assert (program, flag) == ("curl", "-sN")
    values = dict(zip(options[::2], options[1::2], strict=True))
    name, value = values["-H"].split(": ")
    return url.removesuffix("/v1/chat/completions"), Request(url, values["-d"].encode(), {name: value})


def with_changes(request: Request, **changes: Any) -> Request:
    assert isinstance(request.data, bytes)
    body = json.loads(request.data) | changes
    return Request(request.full_url, json.dumps(body).encode(), dict(request.headers))


def status_of(address: str, path: str) -> int | None:
    """The status of a route; None if nobody listens."""
    try:
        with urlopen(f"{address}{path}", timeout=PATIENCE) as answer:
            return answer.status
    except HTTPError as error:
        return error.code
    except URLError:
        return None


def data_lines(stream: Any) -> Iterator[str]:
    """The data of a stream of events, as they come."""
    for line in stream:
        if line.startswith(b"data: "):
            yield line.decode().removeprefix("data: ").strip()


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status of a process that is about to end, and what it said on stderr."""
    _, said = process.communicate(timeout=PATIENCE)
    return process.returncode, said


@pytest.mark.slow
def test_the_line_to_try_works_and_sigterm_lets_a_stream_end():
    with started("--drain-timeout", "600") as process:
        address, request = welcome_of(process)
        assert status_of(address, "/health") == 200
        with urlopen(request, timeout=PATIENCE) as answer:
            found = list(data_lines(answer))
        assert found[-1] == "[DONE]"
        assert "".join(json.loads(one)["choices"][0]["delta"].get("content", "") for one in found[:-1])
        with urlopen(with_changes(request, max_tokens=300, ignore_eos=True), timeout=PATIENCE) as stream:
            lines = data_lines(stream)
            begun = [next(lines) for _ in range(3)]
            process.send_signal(signal.SIGTERM)
            while status_of(address, "/health") == 200:
                pass
            assert status_of(address, "/health") == 503
            rest = list(lines)
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
        assert len(begun) + len(rest) > 30
        status, said = end_of(process)
        assert status == 0
        assert "Traceback" not in said


@pytest.mark.slow
def test_a_stream_that_does_not_end_in_time_is_told():
    with started("--drain-timeout", "0", "--quiet") as process:
        _, request = welcome_of(process)
        with urlopen(with_changes(request, max_tokens=8000, ignore_eos=True), timeout=PATIENCE) as stream:
            lines = data_lines(stream)
            begun = [next(lines) for _ in range(3)]
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert "error" not in json.loads(begun[-1])
        assert json.loads(rest[-1])["error"]["code"]
        assert end_of(process) == (0, "")


@pytest.mark.slow
def test_a_second_interrupt_ends_the_process_at_once():
    with started("--drain-timeout", "3600") as process:
        address, request = welcome_of(process)
        url = urlsplit(request.full_url)
        client = http.client.HTTPConnection(url.netloc, timeout=PATIENCE)
        changed = with_changes(request, max_tokens=8000, ignore_eos=True)
        assert isinstance(changed.data, bytes)
        client.request("POST", url.path, changed.data, dict(changed.headers))
        assert client.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        while status_of(address, "/health") == 200:
            pass
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        status, said = end_of(process)
        client.close()
        assert status == 128 + signal.SIGINT
        assert "Traceback" not in said


@pytest.mark.slow
def test_sigterm_while_it_is_loading_is_an_end_in_order():
    environment = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # so that loading takes long
    with started(**environment) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("compile "):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        status, said = end_of(process)
        assert status == 0
        assert "Traceback" not in said
