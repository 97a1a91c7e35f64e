"""Names and addresses of hosts: how they are written, resolved and connected to."""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import Future, wait


def in_url(host: str) -> str:
    """The host as it stands in an address: an IPv6 one in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def addresses(host: str) -> tuple[str, ...]:
    """The numeric addresses of a host, the preferred first. Loopback needs no resolver, so that a root without /etc/hosts
    has it too (RFC 6761).

    Raises:
        OSError: the name does not resolve; the text has the name and the reason.
    """
    bare = host.removeprefix("[").removesuffix("]")
    if f".{bare.lower().rstrip('.')}".endswith(".localhost"):
        return "127.0.0.1", "::1"
    try:
        return tuple(
            dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM))
        )
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(f"host {bare!r} does not resolve: {error.args[-1]}") from error


def connect(host: str, port: int, timeout_seconds: float) -> socket.socket:
    """A TCP connection to the first address of the host that takes one, within `timeout_seconds`, its look-up included.

    An address that does not answer leaves those behind it their share of the time.

    Raises:
        OSError: the name does not resolve (in time), or why the first address took none.
    """
    deadline = time.monotonic() + timeout_seconds
    found = _addresses_within(host, timeout_seconds)
    refusals: list[OSError] = []
    for place, address in enumerate(found):
        left = max(0.001, deadline - time.monotonic())
        try:
            return socket.create_connection((address, port), left / (len(found) - place))
        except OSError as error:
            refusals.append(error)
    raise refusals[0]


def duplicate(descriptor: int) -> socket.socket | None:
    """Another descriptor of the same connection, for the caller to close; None where the number is no socket's (any more)."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        return None
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None


def ends(descriptor: int) -> tuple[tuple[str, int], tuple[str, int]]:
    """Numeric address and port of a TCP connection's own end, and of the other one; IPv4 is told as such on IPv6 sockets too.

    descriptor: somebody else's, who may have closed it; it is left as it is.

    Raises:
        OSError: the descriptor is no connection's by now.
    """
    connection = duplicate(descriptor)
    if connection is None:
        raise OSError(f"descriptor {descriptor} is no socket")
    with connection:
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            raise OSError(f"descriptor {descriptor} is no TCP connection")
        (own, own_port, *_), (other, other_port, *_) = connection.getsockname(), connection.getpeername()
    return (own.removeprefix("::ffff:"), own_port), (other.removeprefix("::ffff:"), other_port)


def _addresses_within(host: str, timeout_seconds: float) -> tuple[str, ...]:
    """`addresses`, for which nobody waits any longer. A resolver cannot be told how long it may take, so a thread asks it:
    one for each name, however many wait.

    Raises:
        OSError: as `addresses`; or the time was over.
    """
    with _asking:
        answer = _under_way.get(host)
        if answer is None:
            answer = Future()
            try:
                threading.Thread(target=_ask, args=(host, answer), name="lmcache-resolve", daemon=True).start()
            except RuntimeError as error:
                raise OSError(f"host {host!r} was not looked up: {error}") from error
            _under_way[host] = answer  # before its thread can take it away, which needs the lock
    if not wait([answer], timeout_seconds).done:
        raise OSError(
            f"host {host!r} was not resolved in {timeout_seconds:.3g} s: check the resolver, or give its address"
        )
    return answer.result()


def _ask(host: str, answer: Future[tuple[str, ...]]) -> None:
    found: tuple[str, ...] | Exception
    try:
        found = addresses(host)
    except Exception as error:  # the edge of the thread: who waits is told
        found = error
    with _asking:
        _under_way.pop(host, None)  # whoever comes now asks anew
    if isinstance(found, Exception):
        answer.set_exception(found)
    else:
        answer.set_result(found)


def _forget_look_ups() -> None:
    """In a forked child, where the threads that ask, and whoever had the lock, are not."""
    global _asking
    _asking = threading.Lock()
    _under_way.clear()


_asking = threading.Lock()
_under_way: dict[str, Future[tuple[str, ...]]] = {}
os.register_at_fork(after_in_child=_forget_look_ups)
