"""Which server has which keys: one server, the primaries of a cluster, or the primary that Sentinels name."""

from __future__ import annotations

import binascii
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from lmcache.tiers.redis.resp import Login, Node, Reply, ReplyError
from lmcache.tiers.tier import TierError

_SLOTS = 16384
_MOST_NODES = 1024
"""Redis Cluster is made for 1000."""
_ASKED_AT_ONCE = 3
"""A server that does not answer takes this part of the time that is left, so that others can be asked."""


class Nodes:
    """One server, and what the tier asks of every kind of deployment."""

    is_cluster: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    """Whether another server may have the keys later, so that `refresh` must ask for it after a failure."""

    def __init__(self, host: str, port: int, login: Login, limit: int) -> None:
        self._login, self._limit = login, limit
        self._lock = threading.Lock()
        self._nodes = {(host, port): Node(host, port, login, limit)}
        self._seed = self._nodes[host, port]
        self.stale = self.moves

    def all(self) -> list[Node]:
        """Return the servers that hold keys."""
        return [self._seed]

    def of(self, tag: bytes) -> Node:
        """Return the server of the keys with this hash tag, which includes its braces.

        Raises:
            TierError: there is none at the moment.
        """
        return self._seed

    def refresh(self, deadline: float) -> None:
        """Ask who has the keys now. Raises TierError when nobody answers."""

    def close(self) -> None:
        for node in list(self._nodes.values()):
            node.close()

    def _node(self, host: str, port: int) -> Node:
        if (host, port) not in self._nodes:
            self._nodes[host, port] = Node(host, port, self._login, self._limit)
        return self._nodes[host, port]


class Cluster(Nodes):
    """The primaries of a Redis Cluster and the hash slots of each."""

    is_cluster = moves = True

    def __init__(self, host: str, port: int, login: Login, limit: int) -> None:
        super().__init__(host, port, login, limit)
        self._ranges: list[tuple[int, int, Node]] = []

    def all(self) -> list[Node]:
        return list({id(node): node for _, _, node in self._ranges}.values())

    def of(self, tag: bytes) -> Node:
        slot = binascii.crc_hqx(tag[1:-1], 0) % _SLOTS
        for first, last, node in self._ranges:
            if first <= slot <= last:
                return node
        self.stale = True  # somebody may have it soon
        raise TierError(
            "not ready",
            f"Redis Cluster at {self._seed.host}:{self._seed.port}: no node has slot {slot};"
            " `redis-cli --cluster check HOST:PORT` names all such slots",
        )

    def refresh(self, deadline: float) -> None:
        """Ask any node of the cluster for the map of hash slots."""
        with self._lock:
            trouble: TierError | None = None
            others = [node for node in self._nodes.values() if node is not self._seed]
            for node, until in _in_turn([self._seed, *others], deadline):
                try:
                    with node.connection(until) as connection:
                        connection.queue(b"CLUSTER", b"SLOTS")
                        self._ranges = self._parse(node, connection.answer())
                except TierError as error:
                    trouble = trouble or error
                else:
                    self.stale = False
                    self._forget_others()
                    return
            assert trouble
            raise trouble

    def _forget_others(self) -> None:
        """Keep the servers that have keys, and the one that the user has named."""
        kept = {id(node) for node in (self._seed, *self.all())}
        for name, node in list(self._nodes.items()):
            if id(node) not in kept:
                self._nodes.pop(name).close()

    def _parse(self, asked: Node, slots: Reply) -> list[tuple[int, int, Node]]:
        ranges = []
        for entry in slots if isinstance(slots, list) else [slots]:
            match entry:
                case [int(first), int(last), [host, int(port), *_], *_]:
                    name = host if isinstance(host, bytes) else b""
                    ranges.append((first, last, _address(asked, name, port)))
                case _:
                    raise TierError(
                        "protocol", f"{asked.host}:{asked.port} does not describe its cluster: {entry!r:.80}"
                    )
        if len({address for _, _, address in ranges}) > _MOST_NODES:
            raise TierError("protocol", f"{asked.host}:{asked.port} names more nodes than a cluster can have")
        return [(first, last, self._node(*address)) for first, last, address in ranges]


class Sentinels(Nodes):
    """The primary that Sentinels name. They are asked at the start, and again after any failure: one of them is enough.

    login: for the primary. sentinel_login: for the Sentinels. name: what the Sentinels call the primary.
    """

    moves = True

    def __init__(
        self, addresses: Sequence[tuple[str, int]], login: Login, limit: int, name: str, sentinel_login: Login
    ) -> None:
        super().__init__(*addresses[0], login, limit)
        self._name = name
        self._sentinels = [Node(host, port, sentinel_login, 1) for host, port in addresses]
        self._nodes.clear()  # a Sentinel holds no keys
        self._primary: Node | None = None

    def all(self) -> list[Node]:
        return [self._primary] if self._primary else []

    def of(self, tag: bytes) -> Node:
        if not self._primary:
            raise TierError("not ready", f"no Sentinel has named the primary {self._name!r} yet")
        return self._primary

    def refresh(self, deadline: float) -> None:
        with self._lock:
            trouble: TierError | None = None
            for sentinel, until in _in_turn(self._sentinels, deadline):
                try:
                    primary = self._node(*self._ask(sentinel, until))
                except TierError as error:
                    trouble = trouble or error
                    continue
                for name, node in list(self._nodes.items()):
                    if node is not primary:
                        self._nodes.pop(name).close()
                self._primary, self.stale = primary, False
                return
            assert trouble
            raise trouble

    def close(self) -> None:
        super().close()
        for sentinel in self._sentinels:
            sentinel.close()

    def _ask(self, sentinel: Node, deadline: float) -> tuple[str, int]:
        at = f"{sentinel.host}:{sentinel.port}"
        try:
            with sentinel.connection(deadline) as connection:
                connection.queue(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._name)
                reply = connection.reply()
                if isinstance(reply, ReplyError) and "unknown command" in reply.text:
                    raise TierError(
                        "refused", f"Redis at {at} is no Sentinel: name a Sentinel, or leave out ?sentinel="
                    )
                if isinstance(reply, ReplyError):
                    raise connection.refused(reply)
                match reply:
                    case [bytes(host), bytes(port)] if re.fullmatch(rb"[0-9]{1,5}", port):
                        return _address(sentinel, host, int(port))
                    case None:
                        connection.queue(b"SENTINEL", b"MASTERS")
                        known = _names(connection.answer())
                        raise TierError(
                            "refused",
                            f"the Sentinel at {at} knows no primary {self._name!r}; it knows: {known or 'none'}",
                        )
                raise TierError("protocol", f"the Sentinel at {at} answered {reply!r:.80}")
        except TierError as error:
            if error.reason != "denied":
                raise
            remedy = "the Sentinel's own password is ?sentinel_password_file=FILE"
            raise TierError("denied", f"{error} ({remedy})") from None


def _address(asked: Node, host: bytes, port: int) -> tuple[str, int]:
    """Return the address of the server that another one names; without a host it means itself. Raises TierError where there can
    be no such server."""
    name = host.decode("latin-1") or asked.host
    if not name.isascii() or not name.isprintable() or not 0 < port < 1 << 16:
        raise TierError(
            "protocol", f"Redis at {asked.host}:{asked.port} names a server that cannot be: {host!r:.80}, port {port}"
        )
    return name, port


def _in_turn(nodes: Sequence[Node], deadline: float) -> Iterator[tuple[Node, float]]:
    """Yield each server, and until when it may be asked."""
    for place, node in enumerate(nodes):
        now = time.monotonic()
        yield node, now + (deadline - now) / min(_ASKED_AT_ONCE, len(nodes) - place)


def _names(masters: Reply) -> str:
    """Return the names in an answer to SENTINEL MASTERS: lists of field, value, field, value ..."""
    names = []
    for fields in masters if isinstance(masters, list) else []:
        match fields:
            case [b"name", bytes(name), *_]:
                names.append(name.decode("utf-8", "replace"))
    return ", ".join(names)


def with_sentinels_login(login: Login, password: str) -> Login:
    """Return the credentials for Sentinels: the same TLS, their own password, and no database."""
    return replace(login, username="", password=password, database=0)
