"""Shards in Redis or Valkey, shared by all servers that name the same store; docs/tiers/redis.md gives the exact keys.

A shard is its frame header under one key and its payload in parts of nearly 4 MiB under others. The parts are written first and
the header last, by the script that also does the accounting, so a partly written or partly evicted shard is a miss. The store
itself records the shards, their sizes and times of last use: the cap holds for all servers together and outlives them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from lmcache.config.options import number
from lmcache.tiers import frame
from lmcache.tiers.redis.address import nodes_of, prefix_of
from lmcache.tiers.redis.booking import PART_BYTES, booked_bytes, booking_of, parts_of
from lmcache.tiers.redis.nodes import Nodes
from lmcache.tiers.redis.resp import Connection, Moved, Node, Reply, ReplyError, ScriptLost
from lmcache.tiers.redis.script import ADMITTED, DIGEST, ENOUGH_KEYS, MAX_PARTS, MORE, NOT_READY, SCRIPT
from lmcache.tiers.tier import ABSENT, OK, Shard, ShardKey, Tier, TierError, Usage
from lmcache.tiers.url import TierURL

PARTITIONS = 64
"""Number of indexes in a cluster. Each has the chunks of one first byte modulo this number, and its share of `max_gb`."""
TOO_LARGE, FULL = "too large", "full"
"""Outcomes of a store: the shard exceeds the cap or the size of any shard; no space under the cap or in the server."""
_NO_MEMORY = "no memory"
"""Outcome of a store before it becomes FULL: `maxmemory` is reached, so the oldest shards must go although the cap is not."""
_PARTLY = "partly there"
"""Outcome of a load before it becomes ABSENT: only a part of the shard is left, which must be removed."""
_CLEAR_SECONDS = 600.0
"""A clear that lasts longer is given up, since a server may say for ever that there is more."""
_WINDOW_BYTES = 64 << 20
"""A load asks for so many bytes ahead of reading, because the server holds replies in memory until they are read."""


class RedisTier(Tier):
    """One store, which is a server or a cluster. A call uses one connection to each server that it needs."""

    scheme = "redis"
    codecs = True

    def __init__(
        self,
        nodes: Nodes,
        *,
        prefix: str = "lmcache",
        max_bytes: int | None = None,
        ttl_seconds: float = 0.0,
        timeout_seconds: float = 5.0,
        secret: bytes = b"",
    ) -> None:
        self._nodes, self._max_bytes, self._secret = nodes, max_bytes, secret
        self._timeout_seconds = timeout_seconds
        self._ttl_us, self._lease_us = int(ttl_seconds * 1e6), int(timeout_seconds * 2e6)
        if nodes.is_cluster:
            self._tags = [f"{{{prefix}/{number:02x}}}".encode() for number in range(PARTITIONS)]
            self._pattern = f"{{{prefix}/??}}/*"
        else:
            self._tags = [f"{{{prefix}}}".encode()]
            self._pattern = f"{{{prefix}}}/*"
        self._is_open = False
        self._used: dict[bytes, tuple[int, int]] = {}
        """Maps each tag to its bytes and shards in the store's last answer."""

    @classmethod
    def from_url(cls, url: TierURL) -> Tier:
        nodes = nodes_of(url)
        kind = _TLSTier if url.scheme == "rediss" else cls
        return kind(
            nodes,
            prefix=url.take("prefix", prefix_of, "lmcache"),
            max_bytes=url.take_max_bytes(),
            ttl_seconds=url.take("ttl", number(1, 1e9), 0.0),
            timeout_seconds=url.take("timeout", number(0.05, 3600), 5.0),
            secret=url.take_frame_key(),
        )

    def open(self) -> None:
        if self._is_open:
            return
        if self._nodes.moves:
            self._nodes.refresh(self._deadline())
        self._everywhere("usage")
        self._is_open = True

    def contains(self, keys: Sequence[ShardKey]) -> list[bool]:
        found = [False] * len(keys)

        def ask(connection: Connection, which: list[int]) -> None:
            for index in which:
                connection.queue(b"EXISTS", self._name(keys[index]))
            for index in which:
                found[index] = connection.answer() == 1

        self._converse(keys, ask)
        return found

    def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
        outcomes = [ABSENT] * len(keys)

        def ask(connection: Connection, which: list[int]) -> None:
            touched = self._ask_to_touch(connection, [(keys[index], len(into[index])) for index in which])
            known: list[bool] = []
            wrong: list[tuple[ShardKey, int, str]] = []
            asked, ahead_bytes = 0, 0
            for place, index in enumerate(which):
                while asked < len(which) and (ahead_bytes < _WINDOW_BYTES or asked <= place):
                    self._ask_for(connection, keys[which[asked]], len(into[which[asked]]))
                    ahead_bytes += len(into[which[asked]])
                    asked += 1
                known = known or self._touched(connection, touched, len(which))
                outcome, stored_bytes = self._receive(connection, keys[index], into[index])
                ahead_bytes -= len(into[index])
                outcomes[index] = ABSENT if outcome == _PARTLY else outcome
                if known[place] != (outcome == OK) or outcome not in (OK, ABSENT):
                    wrong.append((keys[index], stored_bytes, outcomes[index]))
            self._mend(connection, wrong)

        self._converse(keys, ask)
        return outcomes

    def store(self, shards: Sequence[Shard]) -> list[str]:
        outcomes = [TOO_LARGE] * len(shards)

        def say(connection: Connection, which: list[int]) -> None:
            last_try = connection.deadline - self._timeout_seconds / 2  # leaves time to write what is granted
            left = [index for index in which if parts_of(shards[index].payload.nbytes) <= MAX_PARTS]
            while left:
                for index in left:
                    self._reserve(connection, shards[index])
                for index in left:
                    outcomes[index] = self._admission(connection, shards[index].key)
                granted = [index for index in left if outcomes[index] == ADMITTED]
                for index in granted:
                    self._write(connection, shards[index])
                # shards being written cannot be evicted; once they are committed, they can make way for the rest of the call
                again = {FULL} if granted else set()
                if time.monotonic() < last_try:
                    again |= {MORE, NOT_READY}
                left = [index for index in left if outcomes[index] in again]
                for index in granted:
                    outcomes[index] = self._written(connection, shards[index])
            for index in which:
                if outcomes[index] == _NO_MEMORY:
                    self._make_room(connection, shards[index], last_try)
                if outcomes[index] in (_NO_MEMORY, MORE):
                    outcomes[index] = FULL

        self._converse([shard.key for shard in shards], say)
        return outcomes

    def remove(self, keys: Sequence[ShardKey]) -> None:
        def say(connection: Connection, which: list[int]) -> None:
            self._remove(connection, [keys[index] for index in which])

        self._converse(keys, say)

    def clear(self) -> None:
        self._must_be_open()
        until = time.monotonic() + _CLEAR_SECONDS
        for tag in self._tags:
            left = self._everywhere("clear", [tag])
            while left:
                self._must_go_on(until)
                left = self._everywhere("usage", [tag])
        for node in self._nodes.all():
            with node.connection(self._deadline()) as connection:
                for _ in _unlink_all(connection, self._pattern):
                    self._must_go_on(until)
                    connection.deadline = self._deadline()
        self._everywhere("usage")

    def usage(self) -> Usage:
        known = list(self._used.values())
        return Usage(sum(used for used, _ in known), sum(shards for _, shards in known), self._max_bytes)

    def close(self) -> None:
        self._is_open = False
        self._nodes.close()

    # ---- one shard

    def _ask_for(self, connection: Connection, key: ShardKey, raw_bytes: int) -> None:
        """Ask for the header and as many parts as a payload that is not encoded has; an encoded one may have fewer."""
        name = self._name(key)
        connection.queue(b"GET", name)
        for part in range(parts_of(raw_bytes)):
            connection.queue(b"GET", b"%b.%x" % (name, part))

    def _receive(self, connection: Connection, key: ShardKey, memory: memoryview) -> tuple[str, int]:
        """Read all replies to `_ask_for` and return the outcome, and the bytes of the payload as it is stored."""
        header, stored_bytes = connection.reply(), len(memory)
        if isinstance(header, bytes):
            outcome = frame.check_header(header, key, len(memory), self._secret)
            if not outcome and len(header) != frame.HEADER_BYTES:
                outcome = frame.NOT_A_FRAME
            if outcome == OK:
                stored_bytes = frame.payload_bytes(header)
        elif header is None:
            outcome = ABSENT
        else:
            outcome = self._no_value(connection, header)
        checksum = frame.Checksum(self._secret)
        for start in range(0, len(memory), PART_BYTES):
            part = memory[start : max(start, min(start + PART_BYTES, stored_bytes))]
            got = connection.value_into(part, checksum.update)
            if got is None and start >= stored_bytes:
                continue
            if isinstance(got, ReplyError):
                outcome = outcome or self._no_value(connection, got)
            elif got is None:
                outcome = outcome or _PARTLY
            elif outcome == ABSENT:
                outcome = _PARTLY
            elif got != len(part):
                outcome = outcome or frame.TRUNCATED
        if outcome == OK and isinstance(header, bytes):
            outcome = checksum.check(header, key, len(memory)) or frame.unfold(header, memory, self.decoded)
        return outcome, stored_bytes

    def _no_value(self, connection: Connection, reply: Reply) -> str:
        """Return the outcome of an error about one shard. Raises TierError for an error about the server."""
        if isinstance(reply, ReplyError) and reply.code != "WRONGTYPE":
            raise connection.refused(reply)
        return frame.NOT_A_FRAME

    def _reserve(self, connection: Connection, shard: Shard) -> None:
        size = shard.payload.nbytes
        most = (self._max_bytes or 0) // len(self._tags)
        not_encoded = booked_bytes(shard.coding.raw_bytes or size)
        self._script(
            *(connection, self._tag(shard.key), "reserve", most, self._lease_us, self._ttl_us),
            *(*booking_of(shard.key, size), not_encoded),
        )

    def _admission(self, connection: Connection, key: ShardKey) -> str:
        reply = connection.reply()
        if isinstance(reply, ReplyError) and reply.code == "OOM":
            return _NO_MEMORY
        return self._said(connection, self._tag(key), reply)

    def _write(self, connection: Connection, shard: Shard) -> None:
        """Send the parts, then the script that writes the header, without waiting for replies."""
        payload, name = shard.payload, self._name(shard.key)
        checksum = frame.Checksum(self._secret)
        for part, start in enumerate(range(0, payload.nbytes, PART_BYTES)):
            piece = payload[start : start + PART_BYTES]
            connection.send_value(
                b"%b.%x" % (name, part), piece, checksum.update, b"PX", b"%d" % (self._lease_us // 1000)
            )
        header, booking = checksum.header(shard.key, shard.parent, shard.coding), booking_of(shard.key, payload.nbytes)
        self._script(connection, self._tag(shard.key), "commit", self._ttl_us, header, *booking)

    def _written(self, connection: Connection, shard: Shard) -> str:
        """Read the replies to `_write` and return the outcome."""
        trouble = ""
        for _ in range(parts_of(shard.payload.nbytes)):
            reply = connection.reply()
            if isinstance(reply, ReplyError):
                if reply.code != "OOM":
                    raise connection.refused(reply)
                trouble = _NO_MEMORY
        outcome = self._said(connection, self._tag(shard.key), connection.reply())
        return trouble or outcome

    def _make_room(self, connection: Connection, shard: Shard, last_try: float) -> None:
        """Evict the oldest shards because the server's memory is full before `max_gb` is, so that the next store succeeds."""
        tag, wanted_bytes, freed_bytes = self._tag(shard.key), booked_bytes(shard.payload.nbytes), 1
        while wanted_bytes > 0 and freed_bytes and time.monotonic() < last_try:
            self._script(connection, tag, "shrink", wanted_bytes)
            freed_bytes = int(self._said(connection, tag, connection.reply()))
            wanted_bytes -= freed_bytes

    # ---- several shards on one connection

    def _ask_to_touch(self, connection: Connection, asked: list[tuple[ShardKey, int]]) -> list[tuple[bytes, list[int]]]:
        """Mark shards as used now, the first of a call last, because the later chunks of a prompt depend on it.

        `asked`: key and payload bytes of each. Return (tag, places) for each call of the script, in the order of the answers.
        """
        by_tag: dict[bytes, list[int]] = {}
        for place, (key, _) in enumerate(asked):
            by_tag.setdefault(self._tag(key), []).append(place)
        calls = []
        for tag, places in by_tag.items():
            most = max(1, ENOUGH_KEYS // max(self._touched_keys(asked[place][1]) for place in places))
            for first in reversed(range(0, len(places), most)):  # the script's clock advances between the calls
                some = places[first : first + most]
                self._script(connection, tag, "touch", self._ttl_us, first, *(asked[place][0].text for place in some))
                calls.append((tag, some))
        return calls

    def _touched_keys(self, payload_bytes: int) -> int:
        """Return how many keys of a shard a use writes: all of them for their expiry, or only its place in the order."""
        return 2 + parts_of(payload_bytes) if self._ttl_us else 1

    def _touched(self, connection: Connection, calls: list[tuple[bytes, list[int]]], count: int) -> list[bool]:
        """Return which of the touched shards the accounting knows."""
        known = [False] * count
        for tag, places in calls:
            flags = self._said(connection, tag, connection.reply())
            for place, flag in zip(places, flags, strict=False):
                known[place] = flag == "1"
        return known

    def _mend(self, connection: Connection, wrong: list[tuple[ShardKey, int, str]]) -> None:
        """Remove damaged shards. Where accounting and shards differ, let the script check them and correct the accounting."""
        self._remove(connection, [key for key, _, outcome in wrong if outcome not in (OK, ABSENT)])
        differing = [(key, size) for key, size, outcome in wrong if outcome in (OK, ABSENT)]
        most = (self._max_bytes or 0) // len(self._tags)
        for key, size in differing:
            self._script(connection, self._tag(key), "mend", most, *booking_of(key, size))
        for key, _ in differing:
            self._said(connection, self._tag(key), connection.reply())

    def _remove(self, connection: Connection, keys: list[ShardKey]) -> None:
        for key in keys:
            self._script(connection, self._tag(key), "remove", key.text)
        for key in keys:
            self._said(connection, self._tag(key), connection.reply())

    # ---- conversations

    def _converse(self, keys: Sequence[ShardKey], work: Callable[[Connection, list[int]], None]) -> None:
        """Do `work` for all keys, server by server; in a cluster again for keys that have moved meanwhile."""
        self._must_be_open()
        deadline, left = self._deadline(), list(range(len(keys)))
        for attempt in range(3):
            if self._nodes.stale:
                self._nodes.refresh(deadline)
            groups: dict[Node, list[int]] = {}
            for index in left:
                groups.setdefault(self._nodes.of(self._tag(keys[index])), []).append(index)
            left = []
            for node, which in groups.items():
                try:
                    with node.connection(deadline) as connection:
                        work(connection, which)
                except (Moved, ScriptLost) as error:
                    if isinstance(error, Moved) and not self._nodes.is_cluster:
                        raise
                    if attempt == 2:
                        raise TierError("not ready", f"{error}; the tier is tried again by itself") from None
                    self._nodes.stale = self._nodes.moves
                    left += which
                except TierError:
                    self._nodes.stale = self._nodes.moves
                    raise
            if not left:
                return

    def _everywhere(self, verb: str, tags: list[bytes] | None = None) -> str:
        """Run one verb of the script for each tag and return the last answer."""
        deadline, said = self._deadline(), ""
        for tag in tags or self._tags:
            try:
                said = self._ask_script(tag, verb, deadline)
            except ScriptLost:
                said = self._ask_script(tag, verb, deadline)
        return said

    def _ask_script(self, tag: bytes, verb: str, deadline: float) -> str:
        with self._nodes.of(tag).connection(deadline) as connection:
            self._script(connection, tag, verb)
            return self._said(connection, tag, connection.reply())

    def _script(self, connection: Connection, tag: bytes, verb: str, *arguments: bytes | str | int) -> None:
        connection.queue_script(SCRIPT, DIGEST, tag, verb, *arguments)

    def _said(self, connection: Connection, tag: bytes, reply: Reply) -> str:
        """Return the script's answer, and note the usage that each answer contains."""
        if isinstance(reply, ReplyError):
            raise connection.refused(reply)
        match reply:
            case [bytes(said), int(used), int(shards)]:
                self._used[tag] = used, shards
                return said.decode()
        connection.close()
        raise TierError("protocol", f"Redis at {connection.name}: unexpected answer {reply!r:.80}")

    # ---- names

    def _must_be_open(self) -> None:
        if not self._is_open:
            raise TierError("closed", "the Redis tier is not open")

    def _must_go_on(self, until: float) -> None:
        """Raise TierError when a clear has lasted too long: its steps are bounded, but not how many a server asks for."""
        if time.monotonic() >= until:
            raise TierError("timeout", f"Redis is not empty after {_CLEAR_SECONDS:.0f} s of a clear; clear it again")

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout_seconds

    def _tag(self, key: ShardKey) -> bytes:
        return self._tags[key.chunk[0] % len(self._tags)]

    def _name(self, key: ShardKey) -> bytes:
        return self._tag(key) + b"/" + key.text.encode()


class _TLSTier(RedisTier):
    scheme = "rediss"


def _unlink_all(connection: Connection, pattern: str) -> Iterator[None]:
    """Unlink all keys that match, step by step."""
    cursor = b"0"
    while True:
        connection.queue(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", ENOUGH_KEYS)
        match connection.answer():
            case [bytes(cursor), [*found]]:
                names = [name for name in found if isinstance(name, bytes)]
                for name in names:
                    connection.queue(b"UNLINK", name)
                for _ in names:
                    connection.answer()
                if cursor == b"0":
                    return
                yield
            case other:
                raise TierError("protocol", f"Redis at {connection.name}: unexpected answer {other!r:.80}")
