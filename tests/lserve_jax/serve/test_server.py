"""The port of the server: taken before anything is loaded, or one line says why not."""

import socket

import pytest

from lserve_jax.config.errors import InputError
from lserve_jax.serve.server import address_of, take_port


def test_a_free_port_is_taken_and_named():
    with take_port("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert address_of(taken) == f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(("host", "nearest"), [("0.0.0.0", "127.0.0.1"), ("localhost", "127.0.0.1")])
def test_the_address_is_one_that_a_client_here_can_use(host: str, nearest: str):
    with take_port(host, 0) as taken:
        assert address_of(taken) == f"http://{nearest}:{taken.getsockname()[1]}"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::1", "::"])
def test_an_ipv6_address_stands_in_brackets(host: str):
    with take_port(host, 0) as taken:
        assert address_of(taken) == f"http://[::1]:{taken.getsockname()[1]}"


def test_a_port_in_use_is_one_line():
    with take_port("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"^cannot listen at 127\.0\.0\.1:{port} \(Address already in use\)"):
            take_port("127.0.0.1", port)


def test_a_port_is_free_again_at_once():
    with take_port("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = taken.accept()
            accepted.close()  # this side closes first, and its port waits for late packets
            client.recv(1)
    take_port("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "x" * 70, "a\0b", ".."])
def test_a_host_that_is_not_this_machine_is_one_line(host: str):
    with pytest.raises(
        InputError, match=r"^(--host '.*' is not an address of this machine|cannot listen at )"
    ) as error:
        take_port(host, 0)
    assert "\n" not in str(error.value)
