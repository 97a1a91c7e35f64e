"""The service answers the requests that the endpoints receive, by calling L1 and the tiers.

Everything here runs in the loop's thread. `sessions` holds the connected processes, and `payload` copies payload frames.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

from lmcache.cache import KINDS, L1, TIER_KINDS, Event, Hit, Refusal, TooSmall
from lmcache.cache.accounts import MOST_TOKENS, Accounts
from lmcache.cache.heart import MAX_SHARDS
from lmcache.cache.lifetimes import Lifetimes
from lmcache.cache.promises import Asker
from lmcache.cache.tenants import Tenants
from lmcache.chunks import HASH_BYTES, Split, space_fingerprint, tensor_splits
from lmcache.errors import LayoutError, LMCacheError
from lmcache.observability.log import init_logger
from lmcache.server.eviction import Eviction
from lmcache.server.followers import Followers
from lmcache.server.lending import Lending
from lmcache.server.loop import Loop
from lmcache.server.named import Models
from lmcache.server.parked import ParkedPulls
from lmcache.server.payload import PayloadCopies, Reply
from lmcache.server.sessions import Peer, Sessions
from lmcache.wire import messages as m

if TYPE_CHECKING:
    from lmcache.server.predicting import Predicting
    from lmcache.server.recording import Recording
    from lmcache.server.tier_runner import TierRunner
    from lmcache.server.tiering import Tiering
    from lmcache.server.tracing import Tracing

logger = init_logger(__name__)
MAX_DROP_REASONS = 32
MAX_COPY_SECONDS = 86_400.0
_FEW_CHUNKS = 1024
"""A lookup of so many chunks, counted in each space, always fits into an answer: with `MAX_SHARDS`, their extents take 4 MiB."""


class Service:
    """Gives every request exactly one answer. An unexpected exception becomes an `Error` answer."""

    def __init__(
        self,
        loop: Loop,
        l1: L1,
        chunk_tokens: int,
        workers: Executor,
        tiering: Tiering | None = None,
        server_id: bytes = b"",
        records_bytes: int = 0,
    ) -> None:
        self.loop, self.l1, self.chunk_tokens, self.tiering = loop, l1, chunk_tokens, tiering
        self.sessions = Sessions(l1, chunk_tokens, loop.now, server_id)
        self.models = Models(l1)
        self.counters: Counter[str] = Counter()
        self.recording: Recording | None = None
        self.predicting: Predicting | None = None
        self.more_counters: list[Callable[[], dict[str, float]]] = []
        """What else /metrics shows, such as the names of the public project."""
        self.tracing: Tracing | None = None
        self.eviction = Eviction("LRU")
        self.l1_codec = "auto"
        """Which KV is taken, as `--l1-codec` says."""
        self.on_copied: list[Callable[[Peer, m.Copied], None]] = []
        """Called for each copy that a rank reports, in the loop's thread. They must not raise."""
        self._now, self.started = loop.now, loop.now()
        tiers = tiering.names if tiering is not None else {}
        self.accounts = Accounts(
            *(l1.events, chunk_tokens, loop.now, loop.runtime.wall, records_bytes, tiers),
            *(self.sessions.describe, l1.indexed),
        )
        self.tenants = Tenants()
        self.accounts.on_account.append(self.tenants.accounted)
        self.lifetimes = Lifetimes(l1.events, loop.now) if records_bytes else None
        self.sessions.on_gone.append(self.accounts.forget)
        self._untold: tuple[Peer, m.Lookup, str, bytes, int] | None = None
        """The lookup that is being answered; listeners hear of it when the answer has been sent."""
        self._payload = PayloadCopies(loop, l1, self.sessions, workers, self.counters)
        self._parked = ParkedPulls(loop, l1, self._answer_pull, self.counters)
        self._drop_reasons: set[str] = set()
        self.followers = Followers(l1, self.counters, tiering.runners if tiering is not None else ())
        self.sessions.on_gone.append(self.followers.leave)
        self._answers: dict[type, Callable[[Peer, Any], m.Message]] = {
            m.Ping: lambda peer, request: m.Ok(),
            m.Register: self._register,
            m.Lookup: self._lookup,
            m.Release: self._release,
            m.Hold: self._hold,
            m.Renew: self._renew,
            m.Reserve: self._reserve,
            m.Commit: self._commit,
            m.Copied: self._copied,
            m.Clear: lambda peer, request: m.Ok(self.clear()),
            m.Dropped: self._dropped,
            m.Differs: self._differs,
            m.Bye: self._bye,
            m.TakeNews: lambda peer, request: self.followers.take(peer.process),
        }
        self._answers_to_peers: dict[type, Callable[[Peer, Any], m.Message]] = {
            m.Ping: lambda peer, request: m.Ok(),
            m.Has: self._parked.has,
            m.Bye: self._bye,
        }
        """Another server only reads, and only what it names."""
        if logger.isEnabledFor(logging.DEBUG):
            l1.events.listen(KINDS + TIER_KINDS, _log, named=False)
        loop.on_tick.append(lambda: l1.tick(loop.now()))
        if tiering is not None:
            fetches = tiering.fetches
            self.sessions.on_gone.append(lambda process: fetches.leave(loop.now(), process))
            tiering.on_clear.append(self.followers.tier_cleared)
            tiering.on_join += [self.followers.tier_joined, self._tier_joined]

    def lend_through(self, lending: Lending) -> None:
        """Let other servers' movers read from L1."""
        self._payload.lending, self.sessions.meets = lending, True
        self._answers_to_peers |= {m.Meet: lending.meet, m.Release: lending.released}

    def _tier_joined(self, runner: TierRunner) -> None:
        self.accounts.found[runner.name] += 0  # shown from the beginning
        if self.predicting is not None:
            self.predicting.tiers_joined()

    def model_of(self, space: int) -> str:
        """Return the name of the model whose KV the space holds, "" if no engine has told it."""
        mine = next((one.spaces[space] for one in self.sessions.peers if space in one.spaces), "")
        return mine or self.models.name_of(space)

    # Requests

    def handle(self, peer: Peer, request: m.Request, frames: list[bytes], reply: Reply) -> None:
        """Answer a request by calling `reply`, either at once or, for payload frames, when the copy has ended."""
        is_peer = peer.role == m.PEER
        try:
            answer = (self._answers_to_peers if is_peer else self._answers).get(type(request))
            if answer is not None and peer.process:
                reply(answer(peer, request), [])
                if self._untold is not None:
                    self._account()
            elif isinstance(request, m.Hello):
                reply(self.sessions.hello(peer, request), [])
            elif not peer.process:
                reply(m.Error("hello", "say hello first"), [])
            elif isinstance(request, m.Pull) and is_peer:
                self._parked.pull(peer, request, reply)
            elif is_peer:
                reply(m.Error("refused", f"{type(request).__name__} is not for other servers"), [])
            elif isinstance(request, m.Fetch):
                self._payload.fetch(peer, request, reply)
            elif isinstance(request, m.Fill):
                self._payload.fill(peer, request, frames, reply)
            else:
                reply(m.Error("refused", f"{type(request).__name__} is not for this connection"), [])
        except Refusal as error:
            self._untold = None
            self.counters["refused_requests"] += 1
            reply(m.Error("refused", str(error)), [])
        except LMCacheError as error:
            self._untold = None
            self.counters["failed_requests"] += 1
            reply(m.Error("failed", str(error)), [])
        except Exception as error:  # without an answer the engine would wait until its deadline
            self._untold = None
            self.counters["internal_errors"] += 1
            logger.exception("A %s request of %s failed in the server", type(request).__name__, peer.who)
            reply(m.Error("internal", f"{type(error).__name__} in the server: see its log"), [])

    def _answer_pull(self, peer: Peer, request: m.Pull, reply: Reply) -> None:
        """Answer a peer with what L1 has now, perhaps after it has waited."""
        try:
            self._payload.pull(peer, request, reply)
        except Refusal as error:
            self.counters["refused_requests"] += 1
            reply(m.Error("refused", str(error)), [])

    def clear(self) -> int:
        count = self.l1.clear()
        logger.info("L1 cleared: %d chunks", count)
        return count

    def _register(self, peer: Peer, request: m.Register) -> m.Message:
        layout = request.layout
        if layout.chunk_tokens != self.chunk_tokens:
            raise Refusal(f"the layout has {layout.chunk_tokens}-token chunks, this server {self.chunk_tokens}")
        self._check_l1_codec(peer, request)
        name = space_fingerprint(layout, request.stages, request.group)
        reach = request.group.reach_chunks(layout.chunk_tokens) if request.group is not None else 0
        split = Split(tuple(request.stages) if len(request.stages) > 1 else (), request.shards)
        family = space_fingerprint(layout, (), request.group) if _is_rectangular(request, split) else b""
        known = tensor_splits(layout, MAX_SHARDS) if family and self.tiering is not None else ()
        expected = [one for one in known if one != split]
        shard = request.shards, request.shard, request.shard_bytes
        try:
            space = self.l1.open_space(
                *(peer.process, name, *shard, reach, request.share, family, split, expected, request.main),
                kv_dtype=layout.stored_dtype,
                rounded_row=layout.rounded_row,
            )
        except TooSmall as error:
            self.sessions.refused.note(f"{peer.who}, from {peer.host}", "small L1", str(error))
            raise
        if not peer.layout:
            logger.info("Engine process connected: %s, over %s", peer.who, peer.endpoint)
            if layout.codec:
                logger.info(
                    "Its KV may be rounded (lossy_kv=%s), and has names of its own: %s", layout.lossy_kv, peer.who
                )
        peer.spaces[space] = layout.model_id
        self.models.registered(request, space)
        peer.layout = {
            "model_id": layout.model_id,
            "kv_dtype": layout.kv_dtype,
            "lossy_kv": layout.lossy_kv,
            "l1_codec": layout.l1_codec,
            "token_bytes": request.shard_bytes // _kept_tokens(request),
            "num_layers": layout.num_layers,
            "num_kv_heads": layout.num_kv_heads,
            "head_size": layout.head_size,
            "kind": layout.kind,
            "fingerprint": layout.fingerprint.hex(),
            "shard": f"{request.shard + 1} of {request.shards}" if request.shard >= 0 else f"all {request.shards}",
            "shard_bytes": request.shard_bytes,
        }
        if request.shard >= 0:
            logger.info("Registered KV cache for GPU ID %d with %d layers (%s)", peer.pid, layout.num_layers, peer.who)
        if request.follows:
            self.followers.follow(peer.process, space)
        return m.Registered(space, request.follows, True, self.eviction.learns or self.recording is not None)

    def _check_l1_codec(self, peer: Peer, request: m.Register) -> None:
        """Raise Refusal if this server does not take what the engine stores."""
        layout, wanted = request.layout, self.l1_codec
        if wanted in ("auto", layout.l1_codec):
            return
        remedy = "none" if wanted == "none" else f"{wanted}-l1"
        takes = "exact KV" if wanted == "none" else f"KV in {wanted}"
        why = (
            f"this server takes only {takes} (--l1-codec {wanted}), and the engine has "
            f"lossy_kv={layout.lossy_kv}: set lossy_kv={remedy} for the engine, or start the server with --l1-codec auto"
        )
        self.sessions.refused.note(f"{peer.who}, from {peer.host}", "l1 codec", why)
        raise Refusal(why)

    def _lookup(self, peer: Peer, request: m.Lookup) -> m.Message:
        hashes = request.hashes
        if len(hashes) % 16:
            raise Refusal(f"{len(hashes)} bytes of hashes: the length must be a multiple of 16")
        if self.tracing is not None:
            self.tracing.asked(peer, request)
        first, spaces = max(0, request.first_wanted), [request.space, *request.others]
        if len(hashes) // 16 * len(spaces) > _FEW_CHUNKS or peer.held_bytes:
            hashes = self._answerable(peer, request, spaces, first)
        name = m.request_name(request.request)
        asked = peer.process, request.space, hashes, first, name, request.others, request.sisters
        if request.passage and request.tenant and hashes:
            self.tenants.begins(hashes[:HASH_BYTES], request.tenant)  # the prompt's own lookup does not tell it
        again = request.passage or not request.loads
        again = again or (request.again and not self.accounts.is_uncounted(peer.process, name))
        hit = None
        if self.tiering is not None and request.loads and any(self.tiering.sources):
            if not any(map(self.tiering.knows, spaces, repeat(hashes), repeat(request.sisters))):
                everything = self.l1.lookup(self._now(), *asked, partly=False, again=again)
                hit = everything if 16 * everything.chunks == len(hashes) else None
            if hit is None:
                asker = Asker(peer.process, name, request.engine, first, request.halts)
                in_l1, coming = self.tiering.wait_for(asker, spaces, hashes, request.prefill_rate, request.sisters)
                if coming:
                    if not again:
                        where = request.space, coming, "", peer.process, "", name
                        self.l1.events.tell(Event("waits", *where, hashes=hashes, found=in_l1))
                    return m.Found(in_l1, 0, b"", coming)
        if hit is None:
            hit = self.l1.lookup(self._now(), *asked, again=again)
        if not again:
            self._untold = peer, request, name, hashes, hit.chunks  # without the extents, which may be megabytes
        if self.tiering is not None:
            if self.l1.promises.by_chunk or (request.engine and 16 * hit.chunks < len(hashes)):
                asker = Asker(peer.process, name, request.engine)
                stored = hashes if request.stores < 0 else hashes[: 16 * request.stores]
                self.tiering.answered(asker, spaces, stored, hit.chunks, request.prefill_rate)
            if self.tiering.writes.nearly_full or self.tiering.writes.choosy:
                self.tiering.writes.used(spaces, hashes, hit.chunks)
        return _found(hit)

    def _account(self) -> None:
        """Let listeners hear of the lookup that has just been answered. A hit can wait until the loop is idle; why something is
        missing has to be found out before it is stored."""
        assert self._untold is not None
        told, self._untold = self._untold, None
        _, request, _, hashes, chunks = told
        if self.eviction.learns:
            self.loop.when_idle(partial(self.l1.settle, request.space))
        if 16 * chunks < len(hashes) or self.accounts.waiting:
            self._tell(*told)
        else:
            self.loop.when_idle(partial(self._tell, *told, "later"))

    def _tell(self, peer: Peer, request: m.Lookup, name: str, hashes: bytes, chunks: int, reason: str = "") -> None:
        """Tell the listeners of a lookup that has been answered."""
        which = (
            "answered",
            request.space,
            len(hashes) // 16,
            reason,
            peer.process,
            "",
            name,
            -1,
            hashes,
            b"",
            -1,
            (),
        )
        told = *which, chunks, max(0, request.first_wanted), request.tokens, request.text, None, request.tenant
        self.l1.events.tell(Event._make(told))  # faster than a call of the class

    def _answerable(self, peer: Peer, request: m.Lookup, spaces: list[int], first: int) -> bytes:
        """Return those of the hashes whose extents fit into one answer, which the peer has room for."""
        hashes, shards = request.hashes, sum(map(self._shards, spaces))
        asked, most = len(hashes) // 16, m.most_looked_up(first, shards)
        if asked > most:
            raise Refusal(f"a lookup of {asked} chunks from chunk {first} on exceeds one answer; ask for {most}")
        if request.sisters and (widest := sum(map(self._most_shards, spaces))) > shards:
            # The extents of sisters have to fit into the answer, too.
            shards, hashes = widest, hashes[: 16 * m.most_looked_up(first, widest)]
        self.sessions.check_room(peer, 4 * shards * max(0, asked - first))
        return hashes

    def _shards(self, number: int) -> int:
        space = self.l1.space(number)
        return 1 if space is None else space.shards  # L1 refuses an unknown space

    def _most_shards(self, number: int) -> int:
        """Return the most shards that a chunk has in this space or a sister of it."""
        space = self.l1.space(number)
        if space is None or not space.sisters:
            return self._shards(number)
        return max(one.shards for one in (space, *space.sisters))

    def _release(self, peer: Peer, request: m.Release) -> m.Message:
        for lease in request.leases:
            self.l1.release(peer.process, lease)
        if request.blended is not None:
            self.accounts.blended(
                peer.process, m.request_name(request.requests[0] if request.requests else ""), *request.blended
            )
        if request.answered is not None:
            space, last, tokens = request.answered
            self.l1.answered(self._now(), peer.process, space, last, tokens)
            self.eviction.answers += self.eviction.learns
            if self.recording is not None:
                self.l1.events.tell(Event("replied", space, 0, process=peer.process, hashes=last, tokens=tokens))
        for name in request.requests:
            self.l1.promises.end(peer.instance, name)
            self.accounts.forget(peer.process, name)
            if self.tracing is not None:
                self.tracing.ended(peer, name)
            if self.tiering is not None:
                self.tiering.fetches.withdraw(self._now(), peer.process, name)
        return m.Ok(len(request.leases))

    def _hold(self, peer: Peer, request: m.Hold) -> m.Message:
        return m.Ok(self.l1.keep_leases(peer.process, request.leases))

    def _renew(self, peer: Peer, request: m.Renew) -> m.Message:
        count = self.l1.renew(self._now(), peer.process, request.leases)
        self.counters["renewed_leases"] += count
        return m.Ok(count)

    def _reserve(self, peer: Peer, request: m.Reserve) -> m.Message:
        if len(request.hashes) % 16 or (not request.root and len(request.parent) != 16):
            raise Refusal("the hashes and the parent must consist of 16-byte hashes")
        return m.Reserved(
            *self.l1.reserve(
                self._now(),
                peer.process,
                request.space,
                request.shard,
                request.parent,
                request.root,
                request.hashes,
                request=m.request_name(request.request),
            )
        )

    def _commit(self, peer: Peer, request: m.Commit) -> m.Message:
        if request.reservation in self._payload.filling:
            raise Refusal(f"reservation {request.reservation} is still being filled")
        return m.Ok(self.l1.commit(self._now(), peer.process, request.reservation, request.ok))

    def _copied(self, peer: Peer, request: m.Copied) -> m.Message:
        name = m.request_name(request.request)
        in_range = 0 <= request.tokens < MOST_TOKENS and 0 <= request.shard < MAX_SHARDS
        if not (in_range and 0 <= request.seconds < MAX_COPY_SECONDS):
            raise Refusal(
                f"{request.tokens} tokens of shard {request.shard} in {request.seconds} seconds are out of range"
            )
        for listener in self.on_copied:
            listener(peer, request)
        if not request.ok:
            self.accounts.copied(peer.instance, name, f"failed_{request.kind}", request.tokens, 0.0, request.shard)
            self.counters[f"failed_{request.kind}s"] += 1
            logger.warning(
                "An engine could not %s %d tokens: see the log of %s",
                *(request.kind, request.tokens, peer.who),
                extra={"request": name},
            )
            return m.Ok()
        self.accounts.copied(peer.instance, name, request.kind, request.tokens, request.seconds, request.shard)
        past = "retrieved" if request.kind == "load" else "stored"
        self.counters[f"{past}_tokens"] += request.tokens
        self.counters[f"{past}_microseconds"] += int(request.seconds * 1e6)
        told = past.capitalize(), request.tokens, request.seconds
        logger.info("%s %d tokens in %.3f seconds", *told, extra={"request": name})
        return m.Ok()

    def _dropped(self, peer: Peer, request: m.Dropped) -> m.Message:
        reason = "".join(char if char.isalnum() else " " for char in request.reason[:40])
        if reason not in self._drop_reasons and len(self._drop_reasons) >= MAX_DROP_REASONS:
            reason = "other"
        self._drop_reasons.add(reason)
        self.counters[f"engine_dropped:{reason}"] += max(0, request.chunks)
        return m.Ok()

    def _differs(self, peer: Peer, request: m.Differs) -> m.Message:
        self.accounts.differs(peer.instance, m.request_name(request.request), request.token)
        return m.Ok()

    def _bye(self, peer: Peer, request: m.Request) -> m.Message:
        self.sessions.gone(peer)
        return m.Ok()


def _found(hit: Hit) -> m.Found:
    if not hit.groups and not hit.foreign:
        return m.Found(hit.chunks, hit.lease, hit.extents)
    others = [(0, extents) for extents in hit.groups]
    foreign = [
        m.Foreign(group, first, space.split, extents) for group, first, space, extents in hit.foreign if space.split
    ]
    return m.Found(hit.chunks, hit.lease, hit.extents, 0, others, foreign)


def _kept_tokens(request: m.Register) -> int:
    """Return how many tokens of a chunk an extent holds."""
    chunk = request.layout.chunk_tokens
    return request.group.kept_tokens(chunk) if request.group is not None else chunk


def _is_rectangular(request: m.Register, split: Split) -> bool:
    """Return whether each shard holds some layers and KV heads of the layout and nothing else, as far as this request shows."""
    layout, kept = request.layout, _kept_tokens(request)
    try:
        size = split.shard(layout, max(0, request.shard)).token_bytes(layout) * kept
    except LayoutError:
        return False
    return request.shard < 0 or size == request.shard_bytes


def _log(event: Event) -> None:
    logger.debug("%s %d chunks of space %d %s", event.kind, event.chunks, event.space, event.reason)
