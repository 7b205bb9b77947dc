"""Several launchers on one machine never take the same port."""

import socket

from cli.ports import Ports, is_free

HOST = "127.0.0.1"


def _listening() -> socket.socket:
    server = socket.socket()
    server.bind((HOST, 0))
    server.listen()
    return server


def test_a_free_port_is_taken_as_wanted() -> None:
    with Ports() as ports:
        port = ports.take(HOST, 0)
    with Ports() as ports:
        assert ports.take(HOST, port) == port


def test_a_busy_port_is_replaced() -> None:
    with _listening() as server, Ports() as ports:
        busy = server.getsockname()[1]
        assert not is_free(HOST, busy)
        assert ports.take(HOST, busy) not in (0, busy)


def test_two_launchers_do_not_share_a_port_before_anybody_listens() -> None:
    with Ports() as one, Ports() as other:
        port = one.take(HOST, 0)
        assert other.take(HOST, port) != port
        assert one.take(HOST, port) != port


def test_a_port_is_free_again_when_its_launcher_has_ended() -> None:
    with Ports() as one:
        port = one.take(HOST, 0)
    with Ports() as other:
        assert other.take(HOST, port) == port
