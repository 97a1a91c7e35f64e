"""The address of a server, and who connects to it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from lmcache.config.hosts import in_url
from lmcache.config.options import ids, switch
from lmcache.wire.sockets import UNIX

TRANSFER_MODES = ("auto", "engine_driven", "lmcache_driven", "payload")
MOST_DEADLINE_SECONDS = 3600.0
MOST_HEARTBEAT_SECONDS = 10.0
"""A server forgets an engine with payload frames after 30 s without a message."""


def server_address(host: str = "tcp://localhost", port: int = 5555) -> str:
    """Return tcp://host:port for a host with or without the scheme. An IPv6 address gets its brackets.

    Raises:
        ValueError: another scheme than tcp, or a port out of range.
    """
    scheme, _, bare = host.rpartition("://")
    if scheme not in ("", "tcp"):
        raise ValueError(f"host {host!r}: only tcp:// is spoken")
    if not 0 < int(port) < 65536:
        raise ValueError(f"port {port!r}: give one between 1 and 65535")
    return f"tcp://{in_url(bare)}:{port}"


def given_address(text: str) -> str:
    """Return tcp://host:port for one text that gives host and port.

    Raises:
        ValueError: host or port is missing, the scheme is not tcp, or the port is out of range.
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal():
        raise ValueError(f"address {text!r}: give tcp://host:port, such as tcp://localhost:5555")
    return server_address(host or "localhost", int(port))


@dataclass(frozen=True)
class Endpoint:
    """The server's address and the identity of the process that connects. An engine's scheduler and ranks share one `instance`.

    address: tcp://host:port, or for a server on this host unix:///path/of/its/socket or unix://@name.
    """

    address: str
    instance: str
    role: str
    rank: int = 0
    deadline_seconds: float = 2.0
    heartbeat_seconds: float = 10.0
    transfer_mode: str = "auto"
    auth_key_file: Path | None = field(default_factory=lambda: key_file())
    insecure_no_auth: bool = field(default_factory=lambda: _insecure())
    """Without a key, send payload frames even to a server that has not proved itself. Default: LMCACHE_INSECURE_NO_AUTH."""

    server_uids: tuple[int, ...] = field(default_factory=lambda: _server_uids())
    """Users beside this process's own to whose server on this host KV is given. Default: LMCACHE_ALLOW_SERVER_UID."""

    def __post_init__(self) -> None:
        if self.transfer_mode not in TRANSFER_MODES:
            raise ValueError(f"transfer mode {self.transfer_mode!r}: give one of {', '.join(TRANSFER_MODES)}")
        if self.transfer_mode == "payload" and self.is_unix:
            raise ValueError(f"payload frames do not travel over {self.address}: leave the transfer mode at auto")
        if not 0 < self.deadline_seconds < MOST_DEADLINE_SECONDS:
            raise ValueError(
                f"deadline of {self.deadline_seconds} seconds: give one between 0 and {MOST_DEADLINE_SECONDS:g}"
            )

    @property
    def is_unix(self) -> bool:
        """Whether the server is reached at a Unix socket only, as an engine's own server is."""
        return self.address.startswith(UNIX)


def key_file() -> Path | None:
    """Return the path of this process's key file, from LMCACHE_AUTH_KEY_FILE; None if it has none."""
    name = os.environ.get("LMCACHE_AUTH_KEY_FILE", "")
    return Path(name) if name else None


def _server_uids() -> tuple[int, ...]:
    text = os.environ.get("LMCACHE_ALLOW_SERVER_UID", "")
    try:
        return ids(text)
    except ValueError as error:
        raise ValueError(f"LMCACHE_ALLOW_SERVER_UID is {text!r}: it {error}") from None


def _insecure() -> bool:
    text = os.environ.get("LMCACHE_INSECURE_NO_AUTH") or "false"
    try:
        return switch(text)
    except ValueError as error:
        raise ValueError(f"LMCACHE_INSECURE_NO_AUTH is {text!r}: it {error}") from None
