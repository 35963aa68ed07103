"""Launch configurations from tables, and which devices are Hopper GPUs."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.core import launch
from pallas_kernels.core.hopper import require_hopper


@dataclass(frozen=True)
class Config:
    block: int
    stages: int


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"op": {"small": {"stages": 5}, "wrong": {"stage": 5}}}
    (tmp_path / "nvidia_h200.json").write_text(json.dumps(table))
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    monkeypatch.setattr(launch, "table", launch.table.__wrapped__)  # without the cache


@pytest.mark.usefixtures("tuned")
def test_a_table_replaces_fields_of_the_default() -> None:
    default = Config(block=64, stages=2)
    assert launch.configure("op", "NVIDIA H200", "small", default) == Config(block=64, stages=5)
    assert launch.configure("op", "NVIDIA H200", "large", default) == default
    assert launch.configure("other", "NVIDIA H200", "small", default) == default
    assert launch.configure("op", "NVIDIA H100", "small", default) == default


@pytest.mark.usefixtures("tuned")
def test_a_table_with_an_unknown_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"nvidia_h200.json: op has no field stage \(wrong\)"):
        launch.configure("op", "NVIDIA H200", "wrong", Config(block=64, stages=2))


@pytest.mark.parametrize(
    ("kind", "is_hopper"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H200", True),
        ("NVIDIA GH200 480GB", True),
        ("NVIDIA H20", True),
        ("NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA L40S", False),
        ("NVIDIA B200", False),
        ("TPU v5", False),
    ],
)
def test_hopper_is_known_by_name(kind: str, is_hopper: bool) -> None:
    device = AbstractDevice(device_kind=kind, platform="gpu", num_cores=114)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        if is_hopper:
            assert require_hopper() == (kind, 114)
        else:
            with pytest.raises(NotImplementedError, match=f"need a Hopper GPU .*; this device is '{kind}'"):
                require_hopper()
