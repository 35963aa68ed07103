"""Worker processes."""

import sys

import pytest

from bench.cpu.process import Worker, WorkerError


def test_an_interrupted_worker_is_ended():
    worker = Worker([sys.executable, "-c", "input()"], {}, {})
    with worker, pytest.raises(WorkerError, match="no answer within 0 s"):
        worker.ready(0.1)
    assert not worker.is_running
