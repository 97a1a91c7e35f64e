"""Names and addresses of hosts: how they are written, resolved and connected to."""

from __future__ import annotations

import socket


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
    """A TCP connection to the first address of the host that takes one; `timeout_seconds` is for each of them.

    Raises:
        OSError: the name does not resolve, or why the first address took none.
    """
    refusals: list[OSError] = []
    for address in addresses(host):
        try:
            return socket.create_connection((address, port), timeout_seconds)
        except OSError as error:
            refusals.append(error)
    raise refusals[0]
