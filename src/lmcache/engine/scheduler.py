"""The scheduler's side of an engine: what is there, and until when may it be read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lmcache.chunks import TokenChain, chunk_root
from lmcache.chunks.hashing import HASH_BYTES, Extras
from lmcache.engine.connection import Connection, Endpoint, ask
from lmcache.engine.identified import UNKNOWN, LayoutFor, is_identified
from lmcache.engine.runtime import RUNTIME, Runtime
from lmcache.errors import LMCacheError
from lmcache.observability.log import init_logger
from lmcache.wire import messages as m
from lmcache.wire.carriers import Carrier

logger = init_logger(__name__)
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.0005, 0.008
"""Between two questions of `lookup` while a tier loads."""


class Hit(NamedTuple):
    """Chunks [0, chunks) are in L1; those from `first_chunk` on are leased, with `extents` (u32 sectors, [chunk][shard]).

    `epoch` says which server gave the lease, for which arena: a rank that knows another one must not load from these extents.
    """

    chunks: int
    first_chunk: int
    lease: int
    extents: bytes
    shards: int
    epoch: bytes

    def shard_extents(self, shard: int) -> bytes:
        """The sectors of one shard, one u32 a leased chunk."""
        if self.shards == 1:
            return self.extents
        step = 4 * self.shards
        return b"".join(self.extents[at : at + 4] for at in range(4 * shard, len(self.extents), step))


class Loading(NamedTuple):
    """`chunks` are in L1, `coming` more are on their way from a tier: ask again soon."""

    chunks: int
    coming: int


class SchedulerSession:
    """One engine's scheduler. Nothing raises, and nothing takes longer than the deadline.

    Args:
        endpoint: where the server is; its `instance` is that of the workers.
        layout_for: the model's layout for a chunk size in tokens, which is the server's and learned from it. While it raises
            IdentityUnknown no server hears of this engine.
        shards: parts of a chunk, as `Shard.count` says.
        stages: where each pipeline stage ends, where the model is split by layers; as the workers have it.
        runtime: clock and threads.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        layout_for: LayoutFor,
        shards: int,
        stages: Sequence[int] = (),
        runtime: Runtime = RUNTIME,
    ) -> None:
        self.runtime = runtime
        self._layout_for, self._shards, self._stages = layout_for, shards, list(stages)
        self._space, self._chunk_tokens, self._epoch, self._fingerprint = 0, 0, b"", b""
        self.misses: Counter[str] = Counter()
        """Lookups that got no answer and so count as misses, by reason."""
        self._forgone_tokens = 0
        """Tokens that were not stored since it was not known which weights computed them, until a server has been told."""
        self._held: set[int] = set()
        """Leases that no `release` has ended yet."""
        self._late: list[int] = []
        """Leases to be ended with the next message."""
        self.claim_seconds = 0.0
        """How long the server lets a lease live that is not renewed, as the last one has told; 0 where it does not tell. What
        this session holds is renewed in the background."""
        self._connection = Connection(
            endpoint, self._register, lambda: layout_for(1), lambda: list(self._held), runtime=runtime
        )

    @property
    def chunk_tokens(self) -> int | None:
        """The server's chunk size; None while none was ever reached."""
        return self._chunk_tokens or None

    @property
    def connected(self) -> bool:
        return self._connection.connected

    @property
    def identified(self) -> bool:
        """Whether it is known which weights are served. Until then no server is reached, and there is none to wait for."""
        return is_identified(self._layout_for)

    @property
    def epoch(self) -> bytes:
        """Changes whenever the server does: hits of another epoch are void. b"" before the first one."""
        return self._epoch

    def wait_connected(self, timeout_seconds: float) -> bool:
        """Wait for the first connection."""
        return self._connection.wait_connected(timeout_seconds)

    def wait_for_server(self, seconds: float | None = None) -> None:
        """At engine start: wait for the first connection, unless there is no server that is of use. One that listens and has
        not answered is waited for until so many `seconds` (None: ten) after this session was made."""
        if self.identified:
            self._connection.wait_for_server(seconds)

    def new_chain(
        self, cache_salt: str = "", lora_name: str = "", lora_id: str = "", extras: Extras | None = None
    ) -> TokenChain | None:
        """The chunk hashes of one prompt, to be extended with its tokens; None, and a miss, while no server was ever reached."""
        if not self._chunk_tokens:
            self.misses["no server" if self.identified else UNKNOWN] += 1
            return None
        return TokenChain(chunk_root(self._fingerprint, cache_salt, lora_name, lora_id), self._chunk_tokens, extras)

    def lookup(
        self,
        chain: TokenChain,
        skip_tokens: int = 0,
        prefill_rate: float = 0.0,
        wait_seconds: float | None = None,
        tail: bytes = b"",
        request_id: str = "",
    ) -> Hit | None:
        """As `poll`, and wait for what comes from tiers: for as long as the server finds worth it, and at most so long (None:
        the deadline of a call)."""
        end = self.runtime.now() + (
            self._connection.endpoint.deadline_seconds if wait_seconds is None else wait_seconds
        )
        pause = _SHORTEST_PAUSE_SECONDS
        while True:
            found = self.poll(chain, skip_tokens, prefill_rate, tail, request_id)
            if not isinstance(found, Loading):
                return found
            if self.runtime.now() > end:
                return None
            self.runtime.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def poll(
        self,
        chain: TokenChain,
        skip_tokens: int = 0,
        prefill_rate: float = 0.0,
        tail: bytes = b"",
        request_id: str = "",
    ) -> Hit | Loading | None:
        """Which leading chunks of the chain are in L1, and a lease on those past the first `skip_tokens` tokens.

        None when nothing is there beyond them, or no answer came within the deadline. `Loading` while a tier brings more that
        is worth waiting for, by the engine's `prefill_rate` (tokens a second, 0: not known). tail: hash of an unfull chunk
        behind the chain, which may be the last one of the hit. request_id: under which the server records what tiers did.
        """
        if chain.chunk_tokens != self._chunk_tokens:
            return None
        first = skip_tokens // chain.chunk_tokens
        # What one lookup cannot ask for is not looked for, and so computed.
        hashes = (chain.hashes + tail)[: HASH_BYTES * m.most_looked_up(first, self._shards)]
        if first * HASH_BYTES >= len(hashes):
            return None
        epoch = self._epoch
        try:
            found, _ = self._connection.call(m.Lookup(self._space, hashes, first, prefill_rate, request_id), m.Found)
        except LMCacheError as error:
            self.misses["no answer"] += 1
            logger.debug("A lookup became a miss: %s", error)
            return None
        if found.loading > 0:
            return Loading(found.chunks, found.loading)
        if not found.lease:
            return None
        self._held.add(found.lease)
        hit = Hit(found.chunks, first, found.lease, found.extents, self._shards, epoch)
        most = len(hashes) // HASH_BYTES
        plausible = first < found.chunks <= most and len(found.extents) == 4 * self._shards * (found.chunks - first)
        if not plausible or epoch != self._epoch:
            self.misses["another server"] += 1
            # A server that came meanwhile gave this lease, and it alone knows the number.
            self.release(hit._replace(epoch=self._epoch))
            return None
        return hit

    def release(self, hit: Hit) -> None:
        """No rank reads the hit's extents any more. Does not wait; kept for later while the link is down."""
        self._held.discard(hit.lease)
        if hit.epoch != self._epoch:
            return
        self._late.append(hit.lease)
        if self._connection.connected:
            leases, self._late = self._late, []
            self._connection.post(m.Release(leases))

    def forgone(self, tokens: int) -> None:
        """So many tokens of a prompt for which there was no chain have been computed. Where that was for want of the weights'
        identity, the first server to be reached counts their full chunks as dropped."""
        if not self._chunk_tokens and not self.identified:
            self._forgone_tokens += tokens

    def clear(self) -> bool:
        """Empty the server's memory, for all its engines. False when no answer came within the deadline."""
        try:
            self._connection.call(m.Clear(), m.Ok)
        except LMCacheError as error:
            logger.warning("The LMCache server was not cleared: %s", error)
            return False
        return True

    def close(self) -> None:
        self._connection.close()

    def _register(self, carrier: Carrier, welcome: m.Welcome, descriptor: int) -> None:
        if descriptor >= 0:
            os.close(descriptor)  # the scheduler copies nothing
        layout = self._layout_for(welcome.chunk_tokens)
        registered = ask(carrier, m.Register(layout, self._shards, -1, 0, self._stages), m.Registered)
        if welcome.holds_for != self._epoch:
            self._late, self._held = [], set()
        ask(carrier, m.Hold(list(self._held)), m.Ok)
        self._space, self._chunk_tokens, self.claim_seconds = (
            registered.space,
            welcome.chunk_tokens,
            welcome.claim_seconds,
        )
        self._fingerprint, self._epoch = layout.fingerprint, welcome.holds_for
        if chunks := self._forgone_tokens // welcome.chunk_tokens:
            carrier.post(m.Dropped(chunks, UNKNOWN))
        self._forgone_tokens = 0
