"""The tests' own TCP proxy does what it says."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from proxy import Proxy
from servers import PATIENCE


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that sends back what it gets; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_echo, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def _echo(listener: socket.socket) -> None:
    def serve(client: socket.socket) -> None:
        with client:
            try:
                while piece := client.recv(1 << 16):
                    client.sendall(piece)
            except OSError:
                pass

    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=serve, args=(client,), daemon=True).start()


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE)


def receive(client: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count and (piece := client.recv(count - len(got))):
        got += piece
    return got


def test_bytes_pass_unchanged_both_ways(echo: int) -> None:
    sent = bytes(range(256)) * 4000
    with Proxy(echo) as proxy, connect(proxy) as client:
        writer = threading.Thread(target=client.sendall, args=(sent,))
        writer.start()
        assert receive(client, len(sent)) == sent
        writer.join()
        assert (proxy.accepted, proxy.sent) == (1, len(sent))


def test_delay_and_rate_take_their_time(echo: int) -> None:
    with Proxy(echo) as proxy, connect(proxy) as client:
        proxy.delay = 0.05
        began = time.monotonic()
        client.sendall(b"x")
        assert receive(client, 1) == b"x" and time.monotonic() - began >= 0.1
        proxy.delay, proxy.rate = 0.0, 1e6
        began = time.monotonic()
        client.sendall(bytes(100_000))
        assert len(receive(client, 100_000)) == 100_000 and time.monotonic() - began >= 0.1


def test_a_freeze_holds_bytes_back_until_the_thaw(echo: int) -> None:
    with Proxy(echo) as proxy, connect(proxy) as client:
        proxy.freeze()
        client.sendall(b"x")
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(1)
        proxy.thaw()
        client.settimeout(PATIENCE)
        assert receive(client, 1) == b"x"


def test_cuts_end_connections_and_new_ones_are_served_unless_refused(echo: int) -> None:
    with Proxy(echo) as proxy:
        with connect(proxy) as client:
            client.sendall(b"x")
            assert receive(client, 1) == b"x"
            proxy.cut()
            assert client.recv(1) == b""
        with connect(proxy) as client:
            client.sendall(b"y")
            assert receive(client, 1) == b"y"
        proxy.refuse = True
        with connect(proxy) as client:
            assert client.recv(1) == b""


def test_a_cut_comes_at_the_byte_it_was_asked_for(echo: int) -> None:
    with Proxy(echo) as proxy, connect(proxy) as client:
        proxy.cut_after(70_000)
        try:
            client.sendall(bytes(200_000))
            receive(client, 200_000)
        except OSError:
            pass
        assert proxy.sent == 70_000
