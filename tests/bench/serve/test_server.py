"""Servers as processes: ready, not ready, ended, and gone with all that they started."""

import os
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from bench.serve.server import Server, ServerError, free_port
from bench.serve.systems import Sizes, System


def started(system: System, folder: Path) -> Server:
    port = free_port()
    command = system.command(Sizes(2, 512), port)
    return Server(command, system.environment, f"http://127.0.0.1:{port}", folder / "logs" / "log.txt")


def run(code: str, folder: Path) -> Server:
    return Server([sys.executable, "-c", code], dict(os.environ), "http://127.0.0.1:1", folder / "log.txt")


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_server_is_ready_when_its_health_is_200_and_gone_after(tmp_path: Path, fake: System):
    with started(fake, tmp_path) as server:
        assert server.wait(300) > 0
        with urllib.request.urlopen(server.url + "/health") as answer:
            assert answer.status == 200
        assert server.peak_bytes is None or server.peak_bytes > 2**20
    with pytest.raises(OSError, match=r"refused"):
        urllib.request.urlopen(server.url + "/health")


def test_a_server_that_ends_says_why(tmp_path: Path):
    server = run("import sys; print('loading'); sys.exit('no such model')", tmp_path)
    with pytest.raises(ServerError, match=r"^ended with status 1: no such model$"):
        server.wait(300)
    server = run("pass", tmp_path)
    with pytest.raises(ServerError, match=r"^ended with status 0: nothing was said$"):
        server.wait(300)


def test_a_server_that_is_never_ready_is_ended(tmp_path: Path):
    server = run("import time; time.sleep(3600)", tmp_path)
    with pytest.raises(ServerError, match="not ready within 0 s"):
        server.wait(0.3)
    server.close()


def test_a_program_that_is_not_there_is_one_line(tmp_path: Path):
    with pytest.raises(ServerError, match=r"^/no/such/program: No such file or directory$"):
        Server(["/no/such/program"], {}, "http://127.0.0.1:1", tmp_path / "log.txt")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_what_a_server_started_ends_with_it(tmp_path: Path):
    note = tmp_path / "pid"
    child = f"import os,time,pathlib; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(3600)"
    server = run(f"import subprocess,sys; subprocess.run([sys.executable, '-c', {child!r}])", tmp_path)
    while not (note.exists() and note.read_text()):
        time.sleep(0.01)
    pid = int(note.read_text())
    assert is_running(pid)
    server.close()
    while is_running(pid):  # init reaps it; the test's own limit of time ends this if it lives on
        time.sleep(0.01)
