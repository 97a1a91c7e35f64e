"""Names and addresses of hosts: formatting, resolving and connecting."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from concurrent.futures import Future, wait


def in_url(host: str) -> str:
    """Return the host as written in an address, an IPv6 one in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def addresses(host: str) -> tuple[str, ...]:
    """Return the numeric addresses of a host, the preferred first. Loopback names need no resolver (RFC 6761), so they also
    work in a root file system without /etc/hosts.

    Raises:
        OSError: the name does not resolve; the message has the name and the reason.
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
    """Connect over TCP to the first address of the host that accepts, within `timeout_seconds` including name resolution.

    The time left is divided among the remaining addresses, so one that does not answer leaves time for the others.

    Raises:
        OSError: the name does not resolve (in time), or the error of the first address when all of them failed.
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


def is_quiet(connection: socket.socket) -> bool:
    """Return whether nothing has arrived, as an idle connection requires. One that the other side has closed is not quiet."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return not poll.poll(0)


def seconds_left(deadline: float) -> float:
    """Return the positive number of seconds until `deadline` of `time.monotonic`. Raises TimeoutError when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer within the deadline")
    return left


def duplicate(descriptor: int) -> socket.socket | None:
    """Return a new socket for the same connection, which the caller closes; None where `descriptor` is not a socket."""
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
    """Return (numeric address, port) of a TCP connection's own end and of its peer. IPv4 addresses are never IPv6-mapped.

    descriptor: may belong to other code, which may have closed it; it is left as it is.

    Raises:
        OSError: the descriptor is no longer that of a connection.
    """
    connection = duplicate(descriptor)
    if connection is None:
        raise OSError(f"descriptor {descriptor} is not a socket")
    with connection:
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            raise OSError(f"descriptor {descriptor} is not a TCP connection")
        (own, own_port, *_), (other, other_port, *_) = connection.getsockname(), connection.getpeername()
    return (own.removeprefix("::ffff:"), own_port), (other.removeprefix("::ffff:"), other_port)


def _addresses_within(host: str, timeout_seconds: float) -> tuple[str, ...]:
    """Return `addresses(host)`, waiting at most `timeout_seconds`. A resolver has no deadline, so one thread for each name calls
    it, however many callers wait.

    Raises:
        OSError: as `addresses`, or the time ran out.
    """
    with _asking:
        answer = _under_way.get(host)
        if answer is None:
            answer = Future()
            try:
                threading.Thread(target=_ask, args=(host, answer), name="lmcache-resolve", daemon=True).start()
            except RuntimeError as error:
                raise OSError(f"host {host!r} could not be looked up: {error}") from error
            _under_way[host] = answer  # the thread cannot remove it before this, since it needs the lock
    if not wait([answer], timeout_seconds).done:
        raise OSError(
            f"host {host!r} was not resolved in {timeout_seconds:.3g} s: check the resolver, or give its address"
        )
    return answer.result()


def _ask(host: str, answer: Future[tuple[str, ...]]) -> None:
    found: tuple[str, ...] | Exception
    try:
        found = addresses(host)
    except Exception as error:  # the thread must not end silently: the error goes to those who wait
        found = error
    with _asking:
        _under_way.pop(host, None)  # a later caller starts a new look-up
    if isinstance(found, Exception):
        answer.set_exception(found)
    else:
        answer.set_result(found)


def _forget_look_ups() -> None:
    """Reset the state in a forked child, in which neither the resolving threads nor the lock's owner exist."""
    global _asking
    _asking = threading.Lock()
    _under_way.clear()


_asking = threading.Lock()
_under_way: dict[str, Future[tuple[str, ...]]] = {}
os.register_at_fork(after_in_child=_forget_look_ups)
