"""Which tenants use L1: their tokens, as lookups come, and on request their chunks. No I/O and no clock.

Engines tell an id of each request's `cache_salt` (`chunks.tenant_of`), never the salt itself. A chunk belongs to the tenant whose
lookups began with the first chunk of its path. What has no id, or was looked up before this server's start, has the tenant b"".
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lmcache.cache.accounts import Account
from lmcache.cache.allocator import Space
from lmcache.cache.table import Table
from lmcache.chunks import HASH_BYTES

MOST_TENANTS = 4096
"""Pairs of a space and a tenant whose tokens are counted; of more, the least recently used ones are counted together."""
MOST_BEGINNINGS = 65536
"""First chunks whose tenants are remembered, the last ones looked up."""
_STEPS, _PAGE = 200, 100
"""Chunks that are looked at in a turn of counting, which takes some 100 us, and records that are asked for at once."""
_UNSEEN, _NOBODY = 0, 1
"""Labels of records: not looked at, and without a tenant."""


@dataclass(slots=True)
class Use:
    """Counts of a tenant: its requests, the tokens that they asked for, and those that were found, wherever they were."""

    requests: int = 0
    requested_tokens: int = 0
    found_tokens: int = 0

    def add(self, other: Use) -> None:
        self.requests += other.requests
        self.requested_tokens += other.requested_tokens
        self.found_tokens += other.found_tokens


class Tenants:
    """The tenants of one server."""

    def __init__(self) -> None:
        self.uses: OrderedDict[tuple[int, bytes], Use] = OrderedDict()
        """(space, tenant) -> what was looked up."""
        self.others = Use()
        """The counts of all tenants together that are not in `uses` any more."""
        self._beginnings = OrderedDict[bytes, bytes]()
        """The first half of a first chunk's hash -> its tenant."""

    def accounted(self, account: Account) -> None:
        """Count a lookup."""
        key = account.space, account.tenant
        use = self.uses.get(key)
        if use is None:
            use = self.uses[key] = Use()
            if len(self.uses) > MOST_TENANTS:
                self.others.add(self.uses.popitem(last=False)[1])
        self.uses.move_to_end(key)
        use.requests += 1
        use.requested_tokens += account.tokens
        use.found_tokens += sum(account.found.values())
        if account.tenant and account.first:
            self.begins(account.first, account.tenant)

    def begins(self, first: bytes, tenant: bytes) -> None:
        """Note whose the chunks are that follow this first chunk, of a prompt or of a passage."""
        first = first[: HASH_BYTES // 2]
        self._beginnings[first] = tenant
        self._beginnings.move_to_end(first)
        if len(self._beginnings) > MOST_BEGINNINGS:
            self._beginnings.popitem(last=False)

    def of_beginning(self, key: bytes) -> bytes:
        """Return the tenant of a first chunk; b"" if none is known."""
        return self._beginnings.get(key[: HASH_BYTES // 2], b"")

    def count_chunks(self, spaces: Iterable[Space], counts: Counter[tuple[int, bytes]]) -> Iterator[None]:
        """Add up the chunks of each tenant in these spaces, by the space. The caller resumes this for each step of bounded work;
        chunks that come and go meanwhile may or may not be counted."""
        for space in spaces:
            yield from self._count(space, counts)

    def _count(self, space: Space, counts: Counter[tuple[int, bytes]]) -> Iterator[None]:
        # Chunks of a group with a reach have no path; the group that has everything has the same hashes.
        paths = space.main if space.reach_chunks and space.main is not None else space
        names, number_of, labels, following, steps = [b"", b""], {b"": _NOBODY}, array("H"), 1, 0
        table, of_paths = space.table, paths.table
        while following and space.table is table and paths.table is of_paths:  # else the cache was cleared
            ids, following = table.numbered(following, _PAGE)
            for record in array("I", ids):
                at, path, found = _in(table, record, of_paths), list[int](), _NOBODY
                while at >= 0:
                    found = _label(labels, at)
                    if found != _UNSEEN:
                        break
                    path.append(at)
                    steps += 1
                    if not steps % _STEPS:
                        yield
                    above = _parent(of_paths, at)
                    if above < 0:
                        tenant = self.of_beginning(_key(of_paths, at))
                        if tenant not in number_of and len(names) < 1 << 16:
                            number_of[tenant] = len(names)
                            names.append(tenant)
                        found = number_of.get(tenant, _NOBODY)
                    at = above
                for one in path:
                    labels[one] = found
                counts[space.number, names[found]] += 1
            yield


def _label(labels: array[int], record: int) -> int:
    if record >= len(labels):
        labels.frombytes(bytes(2 * (record + 1024 - len(labels))))
    return labels[record]


def _in(table: Table, record: int, other: Table) -> int:
    """Return the record of the same chunk in another table; -1 if it has none."""
    key = b"" if table is other else _key(table, record)
    return record if table is other else other.get(key) if key else -1


def _parent(table: Table, record: int) -> int:
    try:
        return table.parent(record)
    except ValueError:  # freed since the last step
        return -1


def _key(table: Table, record: int) -> bytes:
    try:
        return table.key(record)
    except ValueError:
        return b""
