"""What the tests of whole models share: a model of one layer, and no second spent on repeats."""

from collections.abc import Iterator

import pytest

from bench.e2e import __main__ as command
from bench.e2e import decode, models, points, run, values


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(models.TINY_MODEL, "num_hidden_layers", 1)
    monkeypatch.setattr(points, "MEASURE_SECONDS", 0.0)
    for module in (decode, run):
        monkeypatch.setattr(module, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(command, "peer_process", lambda args: print("the peer's process"))
    monkeypatch.setattr(values, "VALUES_PROMPT", 600)
    monkeypatch.setattr(values, "VALUES_STEPS", 6)
    monkeypatch.delitem(values.VALUES_ATTENTION, "dense")
    _forget_configurations()
    yield
    _forget_configurations()


def _forget_configurations() -> None:
    models.model_config.cache_clear()
    models.inference_config.cache_clear()
