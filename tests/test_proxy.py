"""The tests' own TCP proxy does what it says."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from proxy import Proxy
from servers import PATIENCE, eventually


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
        assert (proxy.accepted, proxy.questions.passed) == (1, len(sent))


def test_a_rate_takes_its_time(echo: int) -> None:
    with Proxy(echo) as proxy, connect(proxy) as client:
        proxy.rate = 1e6
        began = time.monotonic()
        client.sendall(bytes(100_000))
        assert len(receive(client, 100_000)) == 100_000 and time.monotonic() - began >= 0.1


def test_one_way_is_held_at_a_byte_until_its_release(echo: int) -> None:
    with Proxy(echo) as proxy, connect(proxy) as client:
        proxy.questions.after(3, proxy.questions.hold)
        client.sendall(b"abcdef")
        assert receive(client, 3) == b"abc"
        assert (proxy.questions.arrived, proxy.questions.passed, proxy.answers.passed) == (6, 3, 3)
        proxy.questions.release()
        assert receive(client, 3) == b"def"


def test_a_freeze_holds_both_ways_until_the_thaw(echo: int) -> None:
    with Proxy(echo) as proxy, connect(proxy) as client:
        frozen = threading.Event()
        proxy.answers.after(1, lambda: (proxy.freeze(), frozen.set()))
        client.sendall(b"ab")
        assert receive(client, 1) == b"a" and frozen.wait(PATIENCE)
        client.sendall(b"c")
        eventually(lambda: proxy.questions.arrived == 3)
        assert (proxy.questions.passed, proxy.answers.passed) == (2, 1)
        proxy.thaw()
        assert receive(client, 2) == b"bc"


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
    for way in ("questions", "answers"):
        with Proxy(echo) as proxy, connect(proxy) as client:
            watched = getattr(proxy, way)
            watched.after(70_000, proxy.cut_for_good)
            writer = threading.Thread(target=send_all, args=(client, bytes(200_000)))
            writer.start()
            with contextlib.suppress(OSError):
                assert len(receive(client, 200_000)) <= 70_000
            writer.join()
            assert watched.passed == 70_000
            with connect(proxy) as another:
                assert another.recv(1) == b""


def send_all(client: socket.socket, what: bytes) -> None:
    with contextlib.suppress(OSError):
        client.sendall(what)
