"""Our settings and the peers: names, what they are told, and why one is missing."""

import sys
from pathlib import Path

import pytest

from bench.cpu import systems
from tests.bench.cpu.fakes import TINY


def test_our_settings_have_names_or_are_written_out():
    named = systems.our_system("lserve_int8", "some model").settings
    assert named["attention"] == "lserve"
    assert named["kv_dtype"] == "int8"
    assert named["token_budget"] == 1024
    assert systems.our_system("dense:page_size=32", "some model").settings["page_size"] == 32
    for name in systems.OURS:
        systems.our_system(name, "some model")
    with pytest.raises(ValueError, match="preset 'fast'"):
        systems.our_system("fast", "some model")
    with pytest.raises(ValueError, match="a number of tokens"):
        systems.our_system("lserve:token_budget=25%", "some model")


def test_a_peer_that_cannot_be_measured_is_missing_with_the_reason(tmp_path: Path):
    pythons = {"transformers": str(tmp_path / "nowhere"), "llama.cpp": None}
    found, missing = systems.peer_systems(["transformers bf16", "llama.cpp"], TINY, pythons, tmp_path, 1)
    assert not found
    assert list(missing) == ["transformers bf16", *(name for name in systems.PEERS if name.startswith("llama.cpp"))]
    assert "No such file" in missing["transformers bf16"]
    assert missing["llama.cpp F16"] == "--llama-cpp-python names no environment that has it"
    with pytest.raises(ValueError, match="no peer is called 'vllm'"):
        systems.peer_systems(["vllm"], TINY, pythons, tmp_path, 1)


def test_an_environment_without_the_library_is_told_in_one_line(tmp_path: Path):
    _, missing = systems.peer_systems(["transformers f32"], TINY, {"transformers": sys.executable}, tmp_path, 1)
    assert "No module named 'torch'" in missing["transformers f32"]
    assert "\n" not in missing["transformers f32"]
