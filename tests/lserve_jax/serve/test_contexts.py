"""Contexts of a server: one request saves a document, and after a restart nobody reads it again."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lserve_jax import LLM, InputError
from lserve_jax.engine import context_file
from lserve_jax.serve.contexts import load_contexts
from lserve_jax.serve.options import ServeOptions
from tests.lserve_jax.serve.running import MODEL, HeldEngine, Running, running

DOCUMENT = [5 + number % 100 for number in range(230)]  # two chunks of 96, and 38 tokens


@pytest.fixture(scope="module")
def own() -> LLM:
    """Unlike the model of the other tests, one with a prefix cache: chunks of whole pages."""
    sizes: dict[str, Any] = {"max_model_len": 400, "max_num_seqs": 2, "prefill_chunk": 96, "page_size": 16}
    return LLM(MODEL, attention="dense", sub_page_size=16, **sizes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contexts")


@pytest.fixture(scope="module")
def listening(own: LLM, folder: Path) -> Iterator[Running]:
    engine = HeldEngine(own)
    with running(engine, contexts=str(folder)) as server:
        yield server
    engine.stop()


@pytest.fixture
def server(listening: Running, folder: Path) -> Iterator[Running]:
    """A server without any context."""
    forget(listening.llm)
    for path in folder.iterdir():
        path.unlink()
    yield listening
    listening.engine.wait_until_idle()


def forget(llm: LLM) -> None:
    cache = llm.engine.scheduler.cache
    assert cache is not None
    cache.clear()


def cached(server: Running) -> int:
    """Tokens of the document and a question that the server has not to read."""
    body = {"prompt": [*DOCUMENT, 9, 8, 7], "max_tokens": 1}
    return server.post("/v1/completions", body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_document_is_saved_once_and_found_after_a_restart(server: Running, folder: Path):
    assert cached(server) == 0
    answer = server.post("/contexts/my-document_1.0", {"tokens": DOCUMENT})
    path = folder / "my-document_1.0.safetensors"
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "object": "context",
        "id": "my-document_1.0",
        "tokens": 230,
        "saved_tokens": 192,
        "bytes": path.stat().st_size,
    }
    assert list(folder.iterdir()) == [path]
    server.engine.wait_until_idle()
    forget(server.llm)
    assert load_contexts(server.llm, folder) == ["my-document_1.0"]
    assert cached(server) == 192


@pytest.mark.parametrize("kind", ["prompt", "messages"])
def test_a_text_or_a_conversation_becomes_the_tokens_that_tokenize_names(kind: str, server: Running, folder: Path):
    text = "The old lighthouse stood on a hill above the town. " * 8
    body: Any = {"prompt": text}
    if kind == "messages":
        body = {"messages": [{"role": "user", "content": text}], "continue_final_message": True}
        body["add_generation_prompt"] = False
    tokens = server.post("/tokenize", body).json()["tokens"]
    assert server.post("/contexts/a", body).json()["tokens"] == len(tokens)
    assert server.llm.contexts.read(folder / "a.safetensors").tokens == tuple(tokens)


@pytest.mark.parametrize("name", [".", "..", ".hidden", "a" * 65, "a b", "a%0Ab", "%00", "é", "a%5Cb", "$HOME", "~"])
def test_a_name_that_could_be_a_path_is_refused(name: str, server: Running, folder: Path):
    answer = server.post(f"/contexts/{name}", {"tokens": DOCUMENT})
    assert answer.status_code in (400, 404, 405)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["..%2Fup", "a%2Fb", "%2Fetc%2Fx"])
def test_a_path_is_no_name(name: str, server: Running, folder: Path):
    answer = server.post(f"/contexts/{name}", {"tokens": DOCUMENT})
    assert answer.status_code in (400, 404)
    assert list(folder.iterdir()) == []
    assert not (folder.parent / "up.safetensors").exists()


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "give one of tokens, prompt and messages"),
        ({"tokens": DOCUMENT, "prompt": "x"}, "give one of tokens, prompt and messages"),
        ({"tokens": "abc"}, "tokens"),
        ({"tokens": []}, "the prompt is empty"),
        ({"tokens": [128] * 100}, "outside the model's vocabulary"),
        ({"tokens": DOCUMENT[:95]}, "fewer than prefill_chunk=96"),
        ({"tokens": DOCUMENT * 2}, "but max_model_len is 400"),
    ],
)
def test_a_body_that_can_be_no_context_is_refused_before_anything_runs(
    body: Any, named: str, server: Running, folder: Path
):
    before = len(server.engine.submitted)
    answer = server.post("/contexts/a", body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert named in error["message"]
    assert error["param"] == ("tokens" if list(body) == ["tokens"] else "prompt")
    assert len(server.engine.submitted) == before
    assert list(folder.iterdir()) == []


def test_a_long_prompt_keeps_no_other_client_waiting(server: Running, monkeypatch: pytest.MonkeyPatch):
    """The event loop, which all clients share, checks no tokens: a million take a quarter of a second."""
    make, loops = server.llm.request, []

    def noted(*args: Any, **settings: Any) -> Any:
        loops.append(asyncio._get_running_loop())
        return make(*args, **settings)

    monkeypatch.setattr(server.llm, "request", noted)
    assert server.post("/contexts/a", {"tokens": DOCUMENT}).status_code == 200
    assert loops == [None]


def test_a_disk_that_is_full_is_the_servers_fault_and_says_no_path(
    server: Running, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(context_file.os, "fsync", full)
    answer = server.post("/contexts/a", {"tokens": DOCUMENT})
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "not_saved")
    assert str(folder) not in answer.text
    assert list(folder.iterdir()) == []


def test_files_that_do_not_fit_are_left_out_with_a_warning(
    server: Running, folder: Path, caplog: pytest.LogCaptureFixture
):
    for name in ("a", "b"):
        server.post(f"/contexts/{name}", {"tokens": [*DOCUMENT[:200], len(name), ord(name)]})
    data = bytearray((folder / "a.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "a.safetensors").write_bytes(data)
    (folder / "c.safetensors").write_bytes(b"nothing")
    (folder / "other.txt").write_text("no context")
    server.engine.wait_until_idle()
    forget(server.llm)
    with caplog.at_level(logging.WARNING):
        assert load_contexts(server.llm, folder) == ["b"]
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(": ")[0] for line in lines] == ["this context is left out"] * 2
    assert "a.safetensors: tensor" in lines[0] and "c.safetensors: is no saved context" in lines[1]
    assert cached(server) == 192


def test_what_the_cache_has_no_room_for_is_said(server: Running, folder: Path, caplog: pytest.LogCaptureFixture):
    for seed in range(5):  # 12 pages each, of 50
        server.post(f"/contexts/{seed}", {"tokens": [5 + (number * (seed + 1)) % 97 for number in range(192)]})
    server.engine.wait_until_idle()
    forget(server.llm)
    with caplog.at_level(logging.WARNING):
        assert load_contexts(server.llm, folder) == ["1", "2", "3", "4"]
    assert "the cache has room for 4 of 5 contexts" in caplog.text


def test_without_the_flag_there_is_no_such_route(server: Running):
    with running(server.engine) as other:
        assert other.post("/contexts/a", {"tokens": DOCUMENT}).status_code == 404


def test_the_key_is_asked_for(server: Running, tmp_path: Path):
    with running(server.engine, contexts=str(tmp_path), api_key="secret") as other:
        assert other.post("/contexts/a", {"tokens": DOCUMENT}).status_code == 401
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["", "no/such/folder", __file__])
def test_the_flag_names_a_folder(folder: str):
    with pytest.raises(InputError, match=r"contexts=.* must be a folder"):
        ServeOptions(contexts=folder)
