"""The servers: their commands, how they want requests, and which can take part."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from bench.serve.systems import OURS, PEERS, Sizes, System, flags, given_system, our_system, peer_systems
from lserve_jax.cli.flags import add_attention, add_shared
from lserve_jax.engine.setup import DEFAULT_MODEL

MESSAGES = [{"role": "user", "content": "hello"}]


def follows(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


@pytest.mark.parametrize("name", [*OURS, "lserve:dense_layers=0,1+is_sink_forced=false"])
def test_our_settings_are_flags_of_our_commands(name: str, tmp_path: Path):
    system = our_system(name, DEFAULT_MODEL, 2, tmp_path)
    parser = argparse.ArgumentParser()
    add_shared(parser, "--model", "--dtype", "--weight-dtype", "--max-model-len", "--max-num-seqs", "--prefill-chunk")
    add_attention(parser)
    for own in ("--served-model-name", "--host", "--port"):
        parser.add_argument(own)
    command = system.command(Sizes(4, 2048, 256), 5000)
    assert command[:3] == [sys.executable, "-m", "lserve_jax.serve"]
    args = vars(parser.parse_args(command[3:]))
    assert (args["max_num_seqs"], args["max_model_len"], args["prefill_chunk"]) == (4, 2048, 256)
    assert (args["host"], args["port"], args["served_model_name"]) == ("127.0.0.1", "5000", "bench")
    assert system.base is not None
    for field, value in system.base.settings.items():
        assert value is None or args[field] == value
    assert "--prefill-chunk" not in system.command(Sizes(4, 2048), 5000)
    assert system.environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)


def test_flags_write_lists_and_switches():
    settings = {"dense_layers": (0, 1), "is_sink_forced": False, "head_pattern": None, "sink": 4}
    assert flags(settings) == ["--dense-layers", "0,1", "--no-is-sink-forced", "--sink", "4"]


def test_each_server_is_asked_as_it_wants_it():
    body = System("a", "llama.cpp").body(MESSAGES, 7)
    assert body == {
        "model": "bench",
        "messages": MESSAGES,
        "max_tokens": 7,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    body = System("a", "transformers", model="folder").body(MESSAGES, 7)
    assert body["model"] == "folder"
    assert not body.keys() & {"stream_options", "ignore_eos"}, "it refuses the one and ignores the other"
    assert json.loads(body["generation_config"])["eos_token_id"] == -1
    given = given_system("http://127.0.0.1:1/", "m", {"top_k": 1})
    body = given.body(MESSAGES, 7)
    assert given.url == "http://127.0.0.1:1"
    assert (body["model"], body["top_k"], "ignore_eos" in body) == ("m", 1, False)


def test_llama_cpp_has_a_whole_context_per_slot():
    command = System("a", "llama.cpp", ("llama-server", "--flash-attn", "on")).command(Sizes(4, 512), 5000)
    assert (follows(command, "--parallel"), follows(command, "--ctx-size")) == ("4", "2048")
    assert follows(command, "--port") == "5000"


def test_peers_that_are_not_there_are_told_in_one_line_each(tmp_path: Path):
    programs = {"llama.cpp": "/no/such/llama-server", "transformers": None}
    able, missing = peer_systems(list(PEERS), DEFAULT_MODEL, programs, tmp_path, 1)
    assert able == []
    assert missing.keys() == PEERS.keys()
    assert "No such file or directory" in missing["llama.cpp F16"]
    assert missing["transformers bf16"] == "--transformers-python names none"
    assert not any("\n" in reason for reason in missing.values())
    with pytest.raises(ValueError, match=r"^no peer is called 'vllm': there are llama\.cpp F16, "):
        peer_systems(["vllm"], DEFAULT_MODEL, {}, tmp_path, 1)


def test_a_python_without_transformers_is_missing(tmp_path: Path):
    _, missing = peer_systems(["transformers bf16"], DEFAULT_MODEL, {"transformers": sys.executable}, tmp_path, 1)
    assert "No module named 'torch'" in missing["transformers bf16"]


def test_llama_cpp_that_is_there_gets_weights_and_says_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bench.serve.systems.as_gguf", lambda gguf, work, kind: work / "f16.gguf")
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho 'version: 9 (abc)' >&2\necho built >&2\n")
    program.chmod(0o755)
    names = ["llama.cpp F16", "llama.cpp F16 flash b512"]
    able, missing = peer_systems(names, DEFAULT_MODEL, {"llama.cpp": str(program)}, tmp_path, 3)
    assert (missing, [one.name for one in able]) == ({}, names)
    command = able[1].command(Sizes(2, 512), 5000)
    assert follows(command, "--model") == str(tmp_path / "f16.gguf")
    assert (follows(command, "--threads"), follows(command, "--batch-size")) == ("3", "512")
    assert able[0].facts == {"llama.cpp": "version: 9 (abc)"}
    assert able[0].environment["OMP_NUM_THREADS"] == "3"
