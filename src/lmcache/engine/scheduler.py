"""The session of an engine's scheduler: it looks up chunks, and holds and renews the leases on them."""

from __future__ import annotations

import os
from collections import Counter, deque
from itertools import repeat
from typing import NamedTuple

from msgspec import structs

from lmcache.chunks import TokenChain, chunk_root
from lmcache.chunks.hashing import HASH_BYTES, Extras
from lmcache.engine.connection import Connection
from lmcache.engine.endpoint import Endpoint
from lmcache.engine.groups import GroupShape, refuse_unrounded
from lmcache.engine.hello import ask
from lmcache.engine.jobs import Foreign
from lmcache.engine.session import UNKNOWN, Session
from lmcache.errors import LMCacheError
from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime
from lmcache.wire import messages as m
from lmcache.wire.carriers import Carrier
from lmcache.wire.messages import Change

logger = init_logger(__name__)
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.0005, 0.008
"""Bounds of the pause between two polls of `lookup` while a tier loads."""


class Hit(NamedTuple):
    """The answer to a lookup: chunks [0, chunks) are in L1; those from `first_chunk` on are leased.

    extents: first sectors, u32 [chunk][shard], of as many of them as ranks of the engine's own split have stored. epoch: names
    the server that gave the lease, and its arena; a rank with another epoch must not load from these extents."""

    chunks: int
    first_chunk: int
    lease: int
    extents: bytes
    shards: int
    epoch: bytes
    others: tuple[Hit, ...] = ()
    """The same in each further group of the model, under the same lease. A group with a reach needs only the last chunks before
    the end of the hit."""
    foreign: tuple[Foreign, ...] = ()
    """The chunks behind those of `extents`, as ranks of other splits have stored them."""
    part: int = 0
    """The number of the group, which is the part of the lease with these extents (names payload frames)."""

    def shard_extents(self, shard: int) -> bytes:
        """Return the sectors of one shard, one u32 per leased chunk."""
        if self.shards == 1:
            return self.extents
        step = 4 * self.shards
        return b"".join(self.extents[at : at + 4] for at in range(4 * shard, len(self.extents), step))


class Loading(NamedTuple):
    """The answer to a lookup while a tier loads or another engine computes: `chunks` are in L1, `coming` more will be. Poll again
    soon."""

    chunks: int
    coming: int


class SchedulerSession(Session):
    """The session of one engine's scheduler. No method raises, and none takes longer than the deadline.

    Args:
        endpoint: the server's address; its `instance` is that of the workers.
        groups: the model's kinds of KV, one or several, in the order of the workers'. While the first one's `layout_for` raises
            IdentityUnknown this session connects to no server.
        runtime: clock and threads.
        follows: whether to ask what happens to the first group's chunks. The engine then takes `news`, and calls `ask_news`.
    """

    def __init__(
        self, endpoint: Endpoint, *groups: GroupShape, runtime: Runtime = RUNTIME, follows: bool = False
    ) -> None:
        super().__init__(groups[0].layout_for, runtime)
        self._follows = follows
        self.news: deque[tuple[Change, bytes] | int] = deque()
        """What the server has told of chunks and was not taken yet; a number of `restarts`: what was told before is void."""
        self.restarts = 0
        self._asks_news = self._followed = False
        self._groups = groups
        self._all_shards = sum(one.shards for one in self._groups)
        self._most_hashes = HASH_BYTES * m.most_looked_up(0, self._all_shards)
        """The answer to a lookup with at most so many bytes of hashes always fits into one message."""
        self._others: list[int] = []
        """The spaces of the further groups."""
        self._reaches: list[int] = []
        """How many chunks before the end of a hit each group needs; 0 for all of them."""
        self._takes_positions = self._takes_answers = False
        """Whether the server wants to know where prompts part, and how long answers are."""
        self._space, self._chunk_tokens, self._epoch, self._fingerprint = 0, 0, b"", b""
        self.misses: Counter[str] = Counter()
        """Lookups that became misses because they got no usable answer, by reason."""
        self._forgone_tokens = 0
        """Tokens not stored because the weights were not identified yet; kept until they are reported to a server."""
        self._held: set[int] = set()
        """Leases that have not been released yet."""
        self._late: list[int] = []
        """Released leases that are reported to the server with the next message."""
        self.claim_seconds = 0.0
        """How many seconds a lease lives without renewal, as the last server stated; 0 if it did not. The connection renews the
        leases of this session in the background."""
        self._connection = Connection(
            *(endpoint, self._register, lambda: self._layout_for(1), lambda: list(self._held)),
            runtime=runtime,
            errand=self._ask_news if follows else None,
        )

    @property
    def chunk_tokens(self) -> int | None:
        """The server's chunk size in tokens; None until a server has been reached."""
        return self._chunk_tokens or None

    @property
    def epoch(self) -> bytes:
        """Names the current server; hits of another epoch are void. b"" before the first server."""
        return self._epoch

    def new_chain(
        self,
        cache_salt: str = "",
        lora_name: str = "",
        lora_id: str = "",
        extras: Extras | None = None,
        passage: str = "",
        tenant: bytes = b"",
    ) -> TokenChain | None:
        """Return the chain of one prompt, to be extended with its tokens; None, counted as a miss, until a server was reached.
        passage: as for `chunk_root`, for the chain of a passage. tenant: whose prompt it is, for the server's count."""
        if not self._chunk_tokens:
            self.misses["no server" if self.identified else UNKNOWN] += 1
            return None
        root = chunk_root(self._fingerprint, cache_salt, lora_name, lora_id, passage)
        return TokenChain(root, self._chunk_tokens, extras, tenant)

    def lookup(
        self,
        chain: TokenChain,
        skip_tokens: int = 0,
        prefill_rate: float = 0.0,
        wait_seconds: float | None = None,
        tail: bytes = b"",
        request_id: str = "",
        chunks: int | None = None,
        any_split: bool = False,
        engine: str = "",
        again: bool = False,
        stores_tail: bool = True,
        tokens: int = 0,
        trace: str = "",
        passage: bool = False,
    ) -> Hit | None:
        """Poll until tiers have loaded what the server finds worth waiting for, or `wait_seconds` (None: the deadline of a call)
        have passed. Arguments as for `poll`."""
        end = self.runtime.now() + (
            self._connection.endpoint.deadline_seconds if wait_seconds is None else wait_seconds
        )
        pause = _SHORTEST_PAUSE_SECONDS
        while True:
            asked = chain, skip_tokens, prefill_rate, tail, request_id, chunks, any_split, engine
            found = self.poll(
                *asked,
                halts=True,
                again=again,
                stores_tail=stores_tail,
                tokens=tokens,
                trace=trace,
                passage=passage,
            )
            if not isinstance(found, Loading):
                return found
            if self.runtime.now() > end:
                # Without an id it waits for no other engine, and gets what that has stored so far.
                found = self.poll(*asked[:4], "", chunks, any_split, again=again, tokens=tokens, passage=passage)
                if isinstance(found, Loading):
                    return None
                if request_id and not again:  # or the server would count the request once more when it asks again
                    self.withdraw(request_id)
                return found
            self.runtime.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def poll(
        self,
        chain: TokenChain,
        skip_tokens: int = 0,
        prefill_rate: float = 0.0,
        tail: bytes = b"",
        request_id: str = "",
        chunks: int | None = None,
        any_split: bool = False,
        engine: str = "",
        halts: bool = False,
        again: bool = False,
        stores_tail: bool = True,
        loads: bool = True,
        tokens: int = 0,
        trace: str = "",
        passage: bool = False,
    ) -> Hit | Loading | None:
        """Look up which leading chunks of the chain are in L1, and lease those behind the first `skip_tokens` tokens.

        Return None if no chunk is there beyond them, or no answer came within the deadline; `Loading` while a tier loads more
        that is worth waiting for at the engine's `prefill_rate` (tokens per second, 0: unknown). tail: hash of an unfull chunk
        behind the chain, which may be the last one of the hit. request_id: under which the server records the work of tiers.
        chunks: look up only so many. any_split: find also what ranks of other parallel splits have stored, which is `foreign` in
        the hit, for `LoadPlan` to make loads of. engine: the name of an engine that stores what it computes; others may wait for
        the chunks that it does not find. halts: whether it computes nothing while the answer is `Loading`. again: whether the
        server has counted an earlier answer to the same request. stores_tail: whether the engine stores the tail, too. loads: if
        false, only announce what the engine will store, and return None.
        tokens: of the complete prompt, for the server's accounts. trace: the request's W3C traceparent, "" if it has none.
        passage: the chain is that of a passage of a prompt, whose tokens the prompt's own lookup accounts for.
        """
        if chain.chunk_tokens != self._chunk_tokens:
            return None
        first = skip_tokens // chain.chunk_tokens
        # Chunks beyond the limit of one lookup are not looked up, so the engine computes them.
        known = chain.hashes if chunks is None else chain.hashes[: HASH_BYTES * chunks]
        hashes = known + tail
        if len(hashes) > self._most_hashes:
            hashes = hashes[: HASH_BYTES * m.most_looked_up(first, self._all_shards)]
        if loads and first * HASH_BYTES >= len(hashes):
            return None
        epoch = self._epoch
        try:
            name = m.request_name(request_id)
            request = m.Lookup(
                *(self._space, hashes, first if loads else len(hashes) // HASH_BYTES, prefill_rate, name, self._others),
                *(any_split, m.request_name(engine), halts, again, loads),
                *(len(known) // HASH_BYTES if tail and not stores_tail else -1, tokens, b"" if passage else chain.text),
                *(trace, passage, chain.tenant),
            )
            found, _ = self._connection.call(request, m.Found)
        except LMCacheError as error:
            self.misses["no answer"] += 1
            logger.debug("A lookup became a miss: %s", error)
            return None
        if not found.lease and (not found.loading or not loads):  # an older server may offer a load to an announcement
            return None
        if found.loading > 0:
            return Loading(found.chunks, found.loading)
        self._held.add(found.lease)
        hit = self._hit(0, found, found.extents, epoch)
        if found.others:
            others = enumerate(found.others[: len(self._others)], 1)
            hit = hit._replace(others=tuple(self._hit(group, found, extents, epoch) for group, (_, extents) in others))
        # A server of an older version leases each group by itself, and does not know that `Fetch` names a part of a lease.
        older = [lease for lease, _ in found.others if lease]
        plausible = first < found.chunks <= len(hashes) // HASH_BYTES and self._is_plausible(hit, first)
        if older or not plausible or epoch != self._epoch:
            self.misses["another server"] += 1
            self._late += older
            # A server that has replaced the former one meanwhile gave this lease, so it is released there.
            self.release(hit._replace(epoch=self._epoch))
            return None
        return hit

    def _hit(self, group: int, found: m.Found, extents: bytes, epoch: bytes) -> Hit:
        """Return the hit in one group, where the last chunks before its end are leased."""
        shards = self._groups[group].shards
        foreign: tuple[Foreign, ...] = ()
        if found.foreign:
            numbered = enumerate(found.foreign, len(self._groups))
            foreign = tuple(
                Foreign(one.first, one.split, one.extents, part) for part, one in numbered if one.group == group
            )
        own = len(extents) // (4 * shards)
        first = (foreign[0].first_chunk if foreign else found.chunks) - own
        return Hit(found.chunks, first, found.lease, extents, shards, epoch, foreign=foreign, part=group)

    def _is_plausible(self, hit: Hit, first: int) -> bool:
        """Return whether the answer leases in each group the chunks that are needed of the hit, from chunk `first` on."""
        if len(hit.others) + 1 != len(self._groups) or not self._fits(hit, self._reaches[0], first):
            return False
        return not hit.others or all(map(self._fits, hit.others, self._reaches[1:], repeat(first)))

    @staticmethod
    def _fits(part: Hit, reach: int, first: int) -> bool:
        needed = max(first, part.chunks - reach) if reach else first
        if part.first_chunk != needed or len(part.extents) % (4 * part.shards):
            return False
        end = part.chunks
        for one in reversed(part.foreign):
            if one.end_chunk != end or not one.chunks or len(one.extents) % (4 * one.split.count):
                return False
            end = one.first_chunk
        return True

    def release(self, hit: Hit) -> None:
        """End the hit's lease: no rank reads its extents any more. Without a connection the release is sent with a later one."""
        self._held.discard(hit.lease)
        if hit.epoch != self._epoch:
            return
        self._late.append(hit.lease)
        if self._connection.connected:
            leases, self._late = self._late, []
            self._connection.post(m.Release(leases))

    def withdraw(self, request_id: str) -> None:
        """Tell the server that the request has ended: it waits no longer, and stores no more of what its lookup did not find."""
        if self._connection.connected:
            self._connection.post(m.Release([], [m.request_name(request_id)]))

    def differs(self, token: int, request_id: str) -> None:
        """Tell the server from which token on a prompt that was looked up differs from the nearest known one, for its records."""
        if self._takes_positions and self._connection.connected:
            self._connection.post(m.Differs(m.request_name(request_id), token))

    def blended(self, request_id: str, passages: int, tokens: int, again: int) -> None:
        """Report that KV of so many passages was used for a prompt, with so many tokens, of which some were computed again."""
        if self._connection.connected:
            name = m.request_name(request_id)
            self._connection.post(m.Release([], [name], (self._space, passages, tokens, again)))

    def answered(self, last: bytes, tokens: int) -> None:
        """Tell a server that wants to know how many tokens a prompt was answered with. last: the last hash of its lookup."""
        if self._takes_answers and self._connection.connected:
            self._connection.post(m.Release([], [], None, (self._space, last, tokens)))

    def too_short(self, tokens: int, request_id: str) -> None:
        """Report a prompt that does not fill a chunk, so that the server can account for it. Nothing is looked up."""
        if self._chunk_tokens and self._connection.connected:
            name = m.request_name(request_id)
            self._connection.post(m.Lookup(self._space, b"", request=name, others=self._others, tokens=tokens))

    def forgone(self, tokens: int) -> None:
        """Count computed tokens of a prompt that had no chain. If the reason was that the weights are not identified yet, the
        first server to be reached counts their full chunks as dropped."""
        if not self._chunk_tokens and not self.identified:
            self._forgone_tokens += tokens

    def clear(self) -> bool:
        """Empty L1, for all engines of the server. Return False if no answer came within the deadline."""
        try:
            self._connection.call(m.Clear(), m.Ok)
        except LMCacheError as error:
            logger.warning("The LMCache server was not cleared: %s", error)
            return False
        return True

    @property
    def is_told(self) -> bool:
        """Whether the server tells all that happens to chunks. Older servers do not."""
        return self._followed and self._connection.connected

    def ask_news(self) -> None:
        """Ask for more `news`, in the connection's thread: this returns at once, and the news comes within some 0.1 s."""
        self._asks_news = True

    def _ask_news(self) -> None:
        if not (self._asks_news and self._followed):
            return
        self._asks_news = False
        try:
            told, _ = self._connection.call(m.TakeNews(), m.News)
        except LMCacheError as error:
            logger.debug("No news of chunks: %s", error)
            return
        if told.incomplete:
            self._restart_news()
        self.news += told.changes

    def _restart_news(self) -> None:
        self.restarts += 1
        self.news.clear()
        self.news.append(self.restarts)

    def close(self) -> None:
        self._connection.close()

    def _register(self, carrier: Carrier, welcome: m.Welcome, descriptor: int) -> None:
        if descriptor >= 0:
            os.close(descriptor)  # the scheduler copies nothing
        layout = self._layout_for(welcome.chunk_tokens)
        refuse_unrounded([one.layout_for(welcome.chunk_tokens) for one in self._groups])
        if layout.codec and not self._fingerprint:
            rounds = (
                "this engine rounds the KV that it stores"
                if layout.l1_codec != "none"
                else "tiers may round this engine's KV"
            )
            logger.warning(
                "lossy_kv=%s: %s, which has names of its own. Answers may differ from those without LMCache (docs/codecs.md)",
                *(layout.lossy_kv, rounds),
            )
        spaces: list[int] = []
        for one in self._groups:  # the first group has all of a prompt, if any has
            request = one.registration(welcome.chunk_tokens, main=spaces[0] if spaces else -1)
            if self._follows and not spaces:
                self._restart_news()
                self._followed = False
                request = structs.replace(request, follows=True)
            registered = ask(carrier, request, m.Registered)
            self._followed |= registered.followed
            self._takes_positions, self._takes_answers = registered.positions, registered.answers
            spaces.append(registered.space)
        if welcome.holds_for != self._epoch:
            self._late, self._held = [], set()
        ask(carrier, m.Hold(list(self._held)), m.Ok)
        self._space, *self._others = spaces
        self._reaches = [one.group.reach_chunks(welcome.chunk_tokens) if one.group else 0 for one in self._groups]
        self._chunk_tokens, self.claim_seconds = welcome.chunk_tokens, welcome.claim_seconds
        self._fingerprint, self._epoch = layout.fingerprint, welcome.holds_for
        if chunks := self._forgone_tokens // welcome.chunk_tokens:
            carrier.post(m.Dropped(chunks, UNKNOWN))
        self._forgone_tokens = 0
