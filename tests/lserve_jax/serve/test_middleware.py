"""What holds for every request: the key, the id, the count."""

import logging
import time
from collections.abc import Iterator

import pytest

from tests.lserve_jax.serve.running import HeldEngine, Running, running

ROUTES = [
    "/v1/models",
    "/v1/models/tiny",
    "/tokenizer_info",
    "/version",
    "/metrics",
    "/nothing",
    "/v1/completions",
    "/",
]


@pytest.fixture(scope="module")
def locked(engine: HeldEngine) -> Iterator[Running]:
    with running(engine, api_key="sesame-1") as server:
        yield server


def lines_of(caplog: pytest.LogCaptureFixture, count: int) -> list[str]:
    """The lines of the server's log, when there are so many: each is written after its response has been sent."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [record.getMessage() for record in caplog.records if record.name == "lserve_jax"]
        if len(found) >= count:
            return found
        time.sleep(0.01)
    raise AssertionError(f"fewer than {count} lines were logged")


def bearer(token: str) -> dict[str, bytes]:
    return {"Authorization": f"Bearer {token}".encode("latin-1")}


@pytest.mark.parametrize("path", [*ROUTES, "/health"])
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "[", ""]
)
def test_a_web_page_whose_name_leads_here_is_refused(shared: Running, host: str, path: str):
    found = shared.get(path, headers={"Host": host})
    assert (found.status_code, found.json()["error"]["code"]) == (403, "foreign_host")


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:80", "a.localhost", "127.0.0.1:5", "10.1.2.3", "[::1]:80", "[::1]"]
)
def test_who_names_this_machine_or_an_address_is_answered(shared: Running, host: str):
    assert shared.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("options", [{"host": "0.0.0.0"}, {"host": "gpu.example"}, {"api_key": "sesame-1"}])
def test_a_server_for_others_or_with_a_key_has_any_name(engine: HeldEngine, options: dict[str, str]):
    with running(engine, **options) as server:
        found = server.get("/version", headers={"Host": "evil.example", **bearer("sesame-1")})
    assert found.status_code == 200


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_needs_the_key(locked: Running, path: str):
    for headers in (
        {},
        bearer("sesame"),
        bearer("sesame-ö"),
        {"Authorization": b"Bearer"},
        {"Authorization": b"Basic sesame-1"},
        {"Authorization": b"\xff"},
    ):
        found = locked.get(path, headers=headers)
        assert found.status_code == 401
        assert found.json()["error"] | {"message": ""} == {
            "message": "",
            "type": "authentication_error",
            "param": None,
            "code": "invalid_api_key",
        }
        assert found.headers["www-authenticate"] == "Bearer"
        assert found.headers["x-request-id"]


def test_the_key_opens_and_health_needs_none(locked: Running):
    key = {"Authorization": "bearer  sesame-1"}
    assert locked.get("/v1/models", headers=key).status_code == 200
    assert locked.get("/nothing", headers=key).status_code == 404
    assert locked.get("/health").status_code == locked.get("/ping").status_code == 200
    assert locked.get("/healthy").status_code == locked.get("/health/").status_code == 401


def test_a_body_is_not_read_before_the_key(locked: Running):
    assert locked.post("/v1/completions", content=b"not JSON").status_code == 401


def test_the_clients_id_is_used_if_it_can_stand_in_a_header(server: Running, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="lserve_jax"):
        assert server.get("/version", headers={"X-Request-Id": "abc-1.2:3_4"}).headers["x-request-id"] == "abc-1.2:3_4"
        for bad in ("a b", "x" * 129, "<script>", ""):
            found = server.get("/version", headers={"X-Request-Id": bad}).headers["x-request-id"]
            assert found != bad and len(found) == 32
        assert any(line.startswith("abc-1.2:3_4 GET /version 200 ") for line in lines_of(caplog, 5))


def test_what_watches_a_server_fills_no_log(server: Running, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="lserve_jax"):
        for path in ("/health", "/ping", "/metrics", "/version"):
            assert server.get(path).status_code == 200
        assert [line.split()[2] for line in lines_of(caplog, 1)] == ["/version"]


def test_ids_differ_and_stand_in_answers(server: Running):
    found = [server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}) for _ in range(2)]
    ids = [one.headers["x-request-id"] for one in found]
    assert len(set(ids)) == 2
    assert [one.json()["id"] for one in found] == [f"cmpl-{one}" for one in ids]


def test_a_request_may_name_its_id_in_the_body(server: Running):
    found = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "request_id": "mine"})
    assert (found.headers["x-request-id"], found.json()["id"]) == ("mine", "cmpl-mine")


def test_ignored_fields_are_named_in_a_header_that_nobody_can_break(server: Running):
    body = {"prompt": "a", "max_tokens": 1, "max_token": 5, "x\r\nSet-Cookie: y": 1, "ö" * 100: 1}
    found = server.post("/v1/completions", body)
    assert found.status_code == 200
    assert found.headers["x-ignored-fields"] == f"max_token, x??Set-Cookie??y, {'?' * 64}"
    assert "set-cookie" not in found.headers
    many = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1} | {f"field{i}": 1 for i in range(99)})
    assert len(many.headers["x-ignored-fields"].split(", ")) == 20


@pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "streaming"])
@pytest.mark.parametrize("names", [[""], ["a", ""], ["", "a"], [" ", "\t"]], ids=repr)
def test_an_ignored_field_without_a_name_breaks_no_header(server: Running, names: list[str], is_stream: bool):
    body = {"prompt": "a", "max_tokens": 1, "stream": is_stream} | dict.fromkeys(names, 1)
    found = server.post("/v1/completions", body)
    assert found.status_code == 200
    assert found.headers["x-ignored-fields"] == ", ".join(name if name == "a" else "?" for name in names)


def test_responses_are_counted_by_route_and_no_path_of_a_client_becomes_a_label(server: Running):
    counted = server.engine.metrics.responses
    counted.clear()
    server.get("/v1/models/a/b/c")
    server.get("/x/y")
    server.get("/v1/completions")
    server.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
    server.post("/v1/completions", {"prompt": "a", "max_tokens": -1})
    assert counted == [
        ("/v1/models/{model}", 404),
        ("other", 404),
        ("other", 405),
        ("/v1/completions", 200),
        ("/v1/completions", 400),
    ]


def test_the_log_has_no_line_that_a_client_wrote(server: Running, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="lserve_jax"):
        server.get("/a%0Ab%1b" + "c" * 5000)
        (line,) = lines_of(caplog, 1)
    assert "\n" not in line and "\x1b" not in line and len(line) < 400


def test_no_other_origin_is_let_in(server: Running):
    asked = server.get("/v1/models", headers={"Origin": "http://evil.example"})
    assert not [name for name in asked.headers if name.startswith("access-control")]
