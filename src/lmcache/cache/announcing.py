"""What engines are about to store: chunks that they fill, or have promised, for which others may wait (`cache.promises`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lmcache.cache.claims import SERVER, Claims, Instance
from lmcache.cache.index import Index
from lmcache.cache.promises import MAX_PROMISED, NOTHING, Asker, Coming, Key, Promise, Promises, keys_of
from lmcache.cache.table import Table
from lmcache.chunks import HASH_BYTES

FILL_SECONDS = 2.0
"""Nobody waits for a chunk that a process has begun to fill longer ago, since the copy takes milliseconds."""


class Announcing(Index):
    """The index, with claims on its chunks and promises of chunks. `Heart` describes the arguments."""

    def __init__(
        self,
        total_bytes: int,
        claim_seconds: float = 30.0,
        new_table: Callable[[int], Table] = Table,
        first_number: int = 1,
        group_table: Callable[[int], Table] | None = None,
    ) -> None:
        super().__init__(total_bytes, new_table, group_table)
        self.claim_seconds = claim_seconds
        self._claims = Claims(total_bytes, claim_seconds, first_number)
        self.promises = Promises()

    def announce(
        self, now: float, asker: Asker, spaces: Sequence[int], hashes: bytes, chunks: int, chunk_seconds: float
    ) -> None:
        """Note that the engine has found the first `chunks` chunks, computes the others and stores them in these spaces: of a
        space with a reach only the last ones, since it depends on the engine's steps which others it has. chunk_seconds: of
        computing one chunk; 0 if unknown."""
        places, most = dict[Key, int](), MAX_PROMISED  # in all spaces together
        for number in spaces:
            space = self._spaces[number]
            first = max(chunks, len(hashes) // HASH_BYTES - space.reach_chunks if space.reach_chunks else 0)
            get, complete = space.table.get, space.table.complete
            keys = keys_of(number, hashes[first * HASH_BYTES : (first + most) * HASH_BYTES])
            most -= len(keys)
            places |= {
                key: at
                for at, key in enumerate(keys, first - chunks)
                if (record := get(key[1])) < 0 or not complete(record)
            }
        self.promises.make(now, self._claims.instance_of(asker.process).name, asker, chunk_seconds, places)

    def instance_name(self, process: int) -> str:
        return self._claims.instance_of(process).name

    def coming(self, now: float, asker: Asker, number: int, hashes: bytes, first: int) -> Coming:
        """Return which of these chunks, from chunk `first` on, other engines fill or have promised, without a gap. Chunks in
        between that are complete count, too. Who has filled a chunk for longer than `FILL_SECONDS` is no more waited for."""
        table, promised = self._spaces[number].table, self.promises.by_chunk
        missing = number, hashes[first * HASH_BYTES : (first + 1) * HASH_BYTES]
        if not missing[1] or (missing not in promised and table.get(missing[1]) < 0):
            return NOTHING
        instance = self._claims.instance_of(asker.process)
        halted = asker.halts and self.promises.of_engine(instance.name, asker.engine)
        if not asker.request or halted or self.promises.given_up(instance.name, asker.request) == missing:
            return Coming(barred=True)
        keys = keys_of(number, hashes[first * HASH_BYTES : (first + MAX_PROMISED) * HASH_BYTES])
        fills: tuple[set[int], set[int]] | None = None
        awaited, ends = len(keys), dict[Promise, Key]()
        for at, key in enumerate(keys):
            record, promise, stuck = table.get(key[1]), promised.get(key), False
            if record >= 0 and table.complete(record):
                continue
            if record >= 0:  # only now, since this goes through all shards that are being filled
                fills = fills or self._filled(now, table, instance)
                stuck = record in fills[1]
                if record in fills[0] and not stuck:
                    continue
            if stuck or promise is None or self.promises.is_own(promise, instance.name, asker.engine):
                awaited = at
                break
            ends[promise] = key
        expected = [promise.expected(now, last) for promise, last in ends.items()]
        stated = [promise.stated(now, last) for promise, last in ends.items()]
        barred = awaited == 0 and promise is not None
        return Coming(awaited, _latest(expected), barred, _latest(stated))

    def _filled(self, now: float, table: Table, asking: Instance) -> tuple[set[int], set[int]]:
        """Return the records of the table that engines other than the asking one fill, and those that have been filled for too
        long, by whomever."""
        filled, stuck, oldest = set[int](), set[int](), now + self.claim_seconds - FILL_SECONDS
        for held in self._claims.reservations.values():
            if held.table is not table or held.expired:
                continue
            if held.deadline < oldest:
                stuck.update(held.ids)
            elif held.process != SERVER and held.instance is not asking:
                filled.update(held.ids)
        return filled, stuck


def _latest(seconds: Sequence[float | None]) -> float | None:
    """Return the latest of these times; None if one of them is not known."""
    known = [one for one in seconds if one is not None]
    return max(known, default=0.0) if len(known) == len(seconds) else None
