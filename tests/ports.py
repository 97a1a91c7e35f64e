"""TCP ports for what tests start: never one that another test, another run or the kernel may take in between."""

from __future__ import annotations

import itertools
import os
import socket

FIRST, END = 10_240, 32_000  # below what Linux gives to outgoing connections (from 32,768 on)
_order = itertools.count(os.getpid() * 257)
_claims: list[socket.socket] = []


def free_port() -> int:
    """A port of loopback that is free now, and this process's own until it ends.

    Asking the kernel for any free port and letting it go does not do: it may give the same one to the next who asks, or to an
    outgoing connection, before the server binds it, or while a server that is killed is not yet started again.
    """
    for number in itertools.islice(_order, END - FIRST):
        port = FIRST + number % (END - FIRST)
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0lmcache-test-port-{port}")  # an abstract name: the kernel lets it go with this process
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        return port
    raise AssertionError(f"no free port from {FIRST} to {END}")
