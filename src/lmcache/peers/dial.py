"""Finding and reaching other servers: their addresses, and new connections to them. Everything here blocks."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lmcache.config.hosts import addresses, in_url
from lmcache.engine.endpoint import Endpoint
from lmcache.engine.hello import say_hello
from lmcache.errors import LMCacheError, ServerRefused, ServerUnavailable
from lmcache.wire import messages as m
from lmcache.wire.carriers import ZmqCarrier

MAX_PEERS = 64
"""The most addresses of other servers that this one connects to."""
MAX_CONNECTIONS = 8
"""The most connections to each for payload. All peers of a server together leave room for engines at its port."""
Name = tuple[str, int]
"""Host and port. The host may be a name with several addresses."""


@dataclass(frozen=True)
class Myself:
    """Who connects to other servers. server_id: of this server. key_file: its key, which the others must have too. open_door:
    whether to use servers that have not proved themselves."""

    server_id: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    key_file: Path | None = None
    open_door: bool = False
    chunk_tokens: int = 0
    """The number of tokens of this server's chunks; 0 accepts peers with chunks of any size."""
    host: str = ""
    port: int = 0
    """Host and port are those on which this server listens for engines and peers."""
    address: str = ""
    """HOST:PORT by which others reach this server; "" if they use `host` and `port`."""
    devices: str = ""
    """The network devices by which a mover may read from other servers (`--peer-devices`); "": there is none."""


_WORDS = {
    "this engine": "this server",
    "the engine": "this server",
    "engine:": "this server:",
    "LMCACHE_AUTH_KEY_FILE": "--auth-key-file",
    "LMCACHE_INSECURE_NO_AUTH=1": "--insecure-no-auth",
}
"""What the errors of a hello say to users of engines, and what it is for this server."""


class Itself(LMCacheError):
    """The address is that of this server."""


@dataclass(frozen=True)
class Dialled:
    """New connections to one server. asks: for questions. pulls: for payload. meets: whether it may lend by a mover."""

    server: bytes
    asks: ZmqCarrier
    pulls: list[ZmqCarrier]
    meets: bool = False

    def close(self) -> None:
        _hang_up([self.asks, *self.pulls])


def dial(address: str, connections: int, myself: Myself) -> Dialled:
    """Connect to the server at HOST:PORT, with so many connections for payload and one for questions.

    Raises:
        Itself: it is this server.
        ServerUnavailable, ServerRefused, ConfigError: as `say_hello`.
    """
    try:
        return _dial(address, connections, myself)
    except (ServerUnavailable, ServerRefused) as error:
        text = str(error)
        for of_engines, of_servers in _WORDS.items():
            text = text.replace(of_engines, of_servers)
        raise type(error)(text) from error


def _dial(address: str, connections: int, myself: Myself) -> Dialled:
    made: list[ZmqCarrier] = []
    servers, meets = set[bytes](), True
    try:
        for number in range(connections + 1):
            endpoint = Endpoint(
                f"tcp://{address}",
                m.server_name(myself.server_id),
                m.PEER,
                number,
                transfer_mode="payload",
                auth_key_file=myself.key_file,
                insecure_no_auth=myself.open_door,
            )
            carrier, welcome, _ = say_hello(endpoint, secrets.token_bytes(16))
            assert isinstance(carrier, ZmqCarrier)
            made.append(carrier)
            if welcome.server == myself.server_id:
                raise Itself(f"{address} is this server")
            servers.add(welcome.server)
            meets = meets and welcome.meets
            if myself.chunk_tokens not in (0, welcome.chunk_tokens):
                raise ServerRefused(
                    f"its chunks have {welcome.chunk_tokens} tokens, and this server's {myself.chunk_tokens}, so none of them "
                    "have equal names: give both the same --chunk-size"
                )
        if len(servers) > 1:
            raise ServerUnavailable("several servers answer at this address: give the address of each of them")
    except BaseException:
        _hang_up(made)
        raise
    return Dialled(servers.pop(), made[0], made[1:], meets)


def _hang_up(carriers: Sequence[ZmqCarrier]) -> None:
    """Say goodbye and close: a server keeps a connection of which it hears nothing for 30 s."""
    for one in carriers:
        with suppress(ServerUnavailable):
            one.post(m.Bye())
        one.close()


def resolve(names: Sequence[Name]) -> dict[Name, list[str] | str]:
    """Return the numeric addresses HOST:PORT behind each name, or why the name has none."""
    found: dict[Name, list[str] | str] = {}
    for host, port in names:
        try:
            found[host, port] = [f"{in_url(address)}:{port}" for address in addresses(host)]
        except OSError as error:
            found[host, port] = str(error)
    return found
