"""Engines are told what happens to chunks: by a real server, through tiers, and after losses of any kind."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache.chunks import TokenChain, chunk_root, split_hashes
from lmcache.engine import Requests
from lmcache.engine.known import L1, TIERS, Told
from lmcache.integration.vllm.kv_events import KVEvents
from lmcache.server import followers
from lmcache.server.followers import Follower
from lmcache.wire import messages as m
from prompts import tokens
from servers import PATIENCE, eventually, server_parts

CHUNK, SECTOR = 16, 4096
EXTENT = CHUNK * 2 * 2 * 2 * 16 * 2
"""Bytes of a chunk of the engine's usual model: 2 layers, K and V, 2 heads of 16 numbers of 2 bytes."""


class Blocks:
    """Makes events of an engine with blocks of 32 tokens, whose hashes are the tokens up to their ends."""

    def blocks(self, request: Any) -> Any:
        return [hash(tuple(request.all_token_ids[:end])) for end in range(32, len(request.all_token_ids) + 1, 32)]

    def about(self, request: Any) -> Any:
        return None

    def event(self, told: Told) -> Any:
        return told


class Publisher:
    """An engine's scheduler that publishes, and what a router knows of it."""

    def __init__(self, one: Any) -> None:
        self.one = one
        self.requests: Requests[Any] = Requests(one.scheduler)
        self.events = KVEvents(self.requests, 32, Blocks())
        self.has: dict[int, dict[Any, list[int]]] = {L1: {}, TIERS: {}}
        self.removed = 0

    def look_up(self, ids: list[int], name: str = "r") -> int:
        """The chunks that are there."""
        chain = self.one.chain(ids)
        hit = self.one.scheduler.lookup(chain, request_id=name)
        request = SimpleNamespace(all_token_ids=ids)
        self.events.looked_up(SimpleNamespace(id=name, chain=chain, hit=hit, request=request))
        if hit is None:
            return 0
        self.one.scheduler.release(hit)
        return int(hit.chunks)

    def step(self) -> None:
        for told in self.events.take():
            there = self.has[told.medium]
            if told.tokens is None:
                self.removed += len(told.blocks)
                for block in told.blocks:
                    del there[block]
                continue
            assert told.parent is None or told.parent in there
            for at, block in enumerate(told.blocks):
                assert block not in there
                there[block] = told.tokens[32 * at : 32 * (at + 1)]

    def until(self, ready: Callable[[], bool]) -> None:
        def stepped() -> bool:
            self.step()
            return ready()

        eventually(stepped)

    def told(self, ids: list[int], medium: int = L1) -> bool:
        """Whether the router knows all full blocks of a prompt, with their tokens."""
        wanted = {hash(tuple(ids[:end])): ids[end - 32 : end] for end in range(32, len(ids) // 16 * 16 + 1, 32)}
        return all(self.has[medium].get(block) == text for block, text in wanted.items())


def test_a_full_queue_is_dropped_and_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followers, "MOST_CHUNKS", 10)
    monkeypatch.setattr(followers, "CHUNKS_OF_ANSWER", 4)
    one = Follower(0)
    assert one.take() == m.News([], False)
    assert one.add("stored", b"a" * 16 * 3) and one.add("stored", b"b" * 16) and one.add("lost", b"")
    assert one.add("stored", b"c" * 16 * 2)
    assert one.take() == m.News([("stored", b"a" * 48 + b"b" * 16)], False)
    assert one.take() == m.News([("lost", b""), ("stored", b"c" * 32)], False)
    assert one.take() == m.News([], False) and one.chunks == 0
    assert one.add("stored", b"a" * 16 * 9)
    assert not one.add("stored", b"d" * 16)
    one.add("stored", b"e" * 16)
    assert one.take() == m.News([("stored", b"e" * 16)], True), "the newer ones are told"
    assert one.take() == m.News([], False)


def test_a_clear_makes_void_what_has_waited_of_the_same_place() -> None:
    one = Follower(0)
    one.add("written", b"a" * 32)
    for _ in range(100):
        one.add("stored", b"b" * 16)
        one.add("removed", b"")
    one.add("stored", b"c" * 16)
    assert one.chunks == 3 + 1 + 2
    assert one.take() == m.News([("written", b"a" * 32), ("removed", b""), ("stored", b"c" * 16)], False)
    one.add("lost", b"")
    assert one.take() == m.News([("lost", b"")], False) and one.chunks == 0


def test_an_answer_holds_a_bounded_number_of_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full server stores and evicts in turns, so each change is of few chunks."""
    monkeypatch.setattr(followers, "CHANGES_OF_ANSWER", 3)
    one, turns = Follower(0), [("stored", b"a" * 16), ("removed", b"b" * 16)] * 2
    for change, hashes in turns:
        one.add(change, hashes)  # type: ignore[arg-type]
    assert one.take() == m.News(turns[:3], False) and one.take() == m.News(turns[3:], False) and one.chunks == 0  # type: ignore[arg-type]


def test_nobody_listens_unless_an_engine_follows(folders, engine) -> None:
    with server_parts(folders, 64 * EXTENT) as (service, port):
        address = SimpleNamespace(address=f"tcp://127.0.0.1:{port}")
        silent = engine(address, "silent")
        silent.store(tokens(64, 1))
        events = service.l1.events
        accounts = {kind: [*listeners] for kind, listeners in events.heard.items()}  # which every server has
        named = set(events.named)
        assert not silent.scheduler.is_told and "written" not in named
        following = engine(address, "following", follows=True)
        assert following.scheduler.is_told and events.named >= {"stored", "evicted", "written", "loaded", "load_failed"}
        silent.store(tokens(64, 2))
        assert not silent.scheduler.news
        following.scheduler.ask_news()
        hashes = silent.chain(tokens(64, 2)).hashes
        eventually(lambda: list(following.scheduler.news)[1:] == [("stored", hashes)])
        following.close()
        eventually(lambda: {kind: one for kind, one in events.heard.items() if one} == accounts)
        assert events.named == named


def test_a_router_learns_of_both_engines_of_evictions_and_of_a_clear(folders, engine) -> None:
    with server_parts(folders, 16 * EXTENT) as (service, port):
        address = SimpleNamespace(address=f"tcp://127.0.0.1:{port}")
        one, other = engine(address, "one", follows=True), engine(address, "other")
        router, ids, theirs = Publisher(one), tokens(100, 1), tokens(100, 2)
        assert router.look_up(ids) == 0
        one.store(ids)
        router.until(lambda: len(router.has[L1]) == 3)
        assert router.told(ids)
        other.store(theirs)
        assert router.look_up(theirs, "s") == 6
        router.until(lambda: len(router.has[L1]) == 6)
        assert router.told(theirs), "what another engine has stored is told once this one has looked it up"
        other.store(tokens(160, 3))
        router.until(lambda: router.removed == 3)
        assert not router.told(ids) and router.told(theirs), "the least recently used prompt was evicted"
        service.loop.ask(service.clear, PATIENCE)
        router.until(lambda: not router.has[L1])
        one.store(ids)
        router.until(lambda: router.told(ids))
        router.requests.reset()
        router.step()
        assert not router.has[L1], "what was computed before the reset is not served any more"


def test_tiers_are_told_as_storage(folders, engine) -> None:
    with server_parts(folders, 16 * EXTENT, l2=[f"disk://{folders('/tmp')}?max_gb=1"]) as (service, port):
        address = SimpleNamespace(address=f"tcp://127.0.0.1:{port}")
        one = engine(address, "one", follows=True)
        router, ids = Publisher(one), tokens(100, 1)
        router.look_up(ids)
        one.store(ids)
        router.until(lambda: router.told(ids, TIERS) and router.told(ids, L1))
        one.store(tokens(256, 2))
        router.until(lambda: not router.has[L1])
        assert router.told(ids, TIERS), "evicted from L1, and still in the tier"
        assert router.look_up(ids) == 6
        router.until(lambda: router.told(ids, L1))
        done: list[Any] = []
        service.loop.ask(lambda: service.tiering.clear(None, done.append), PATIENCE)
        router.until(lambda: not router.has[TIERS])
        assert router.told(ids, L1)


def test_a_write_that_a_clear_overtakes_is_not_told(folders, engine, monkeypatch) -> None:
    with server_parts(folders, 64 * EXTENT, l2=[f"disk://{folders('/tmp')}?max_gb=1"]) as (service, port):
        one = engine(SimpleNamespace(address=f"tcp://127.0.0.1:{port}"), "one", follows=True)
        runner, ended, cleared, ids = service.tiering.runners[0], list[Any](), list[Any](), tokens(96, 1)
        store = runner.store

        def held(shards: Any, done: Any) -> None:
            store(shards, lambda *how: ended.append(lambda: done(*how)))

        monkeypatch.setattr(runner, "store", held)
        service.loop.ask(lambda: runner.tell_drops(None), PATIENCE)  # as a tier that does not know what it drops
        router = Publisher(one)
        router.look_up(ids)
        one.store(ids)
        eventually(lambda: ended)
        service.loop.ask(lambda: service.tiering.clear(None, cleared.append), PATIENCE)
        eventually(lambda: cleared)
        monkeypatch.setattr(runner, "store", store)
        service.loop.ask(lambda: [one() for one in ended], PATIENCE)
        router.look_up(tokens(96, 2), "later")
        one.store(tokens(96, 2))
        router.until(lambda: router.told(tokens(96, 2), TIERS))
        assert not router.told(ids, TIERS), "the write's shards are removed again"


def test_what_is_still_written_to_a_removed_tier_is_not_told(folders, engine, monkeypatch) -> None:
    with server_parts(folders, 64 * EXTENT, l2=[f"disk://{folders('/tmp')}?max_gb=1"]) as (service, port):
        one = engine(SimpleNamespace(address=f"tcp://127.0.0.1:{port}"), "one", follows=True)
        runner, ended, ids, later = service.tiering.runners[0], list[Any](), tokens(96, 1), tokens(96, 2)
        store = runner.store

        def held(shards: Any, done: Any) -> None:
            store(shards, lambda *how: ended.append(lambda: done(*how)))

        monkeypatch.setattr(runner, "store", held)
        router = Publisher(one)
        router.look_up(ids)
        one.store(ids)
        router.until(lambda: router.told(ids, L1) and bool(ended))
        service.loop.ask(lambda: service.tiering.leave(runner), PATIENCE)
        service.loop.ask(lambda: [one() for one in ended], PATIENCE)
        router.look_up(later, "later")
        one.store(later)
        router.until(lambda: router.told(later, L1))
        assert not router.has[TIERS], "no lookup will find it there"


def test_tiers_that_join_later_are_judged_as_those_of_the_start() -> None:
    runners: list[Any] = []
    heard = followers.Followers(SimpleNamespace(), Counter(), runners)  # type: ignore[arg-type]
    runners += [SimpleNamespace(name=name, tier=SimpleNamespace(read_only=name == "peer")) for name in ("disk", "peer")]
    assert heard._keeps("disk") and not heard._keeps("peer") and not heard._keeps("removed")


def test_what_a_full_disk_tier_drops_is_told(folders, engine) -> None:
    """Nobody asks for it again, and a lookup would find nothing to load that could fail."""
    with server_parts(folders, 64 * EXTENT, l2=[f"disk://{folders('/tmp')}?max_gb=0.001"]) as (service, port):
        one = engine(SimpleNamespace(address=f"tcp://127.0.0.1:{port}"), "one", follows=True)
        router, ids = Publisher(one), tokens(96, 1)
        router.look_up(ids)
        one.store(ids)
        router.until(lambda: router.told(ids, TIERS))
        for seed in range(2, 80):
            one.store(tokens(160, seed))
        router.until(lambda: not router.has[TIERS])
        tier = service.tiering.runners[0].tier
        assert tier.dropped is not None
        one.close()
        eventually(lambda: tier.dropped is None)


def test_all_shards_of_a_chunk_make_it_stored_in_a_tier() -> None:
    heard = followers.Followers(SimpleNamespace(space=lambda number: SimpleNamespace(shards=2)), Counter())  # type: ignore[arg-type]
    a, b = bytes(16), b"b" * 16

    def written(shard: int, hashes: bytes, tier: str = "disk") -> bytes:
        return heard._whole(SimpleNamespace(space=0, shard=shard, hashes=hashes, tier=tier))  # type: ignore[arg-type]

    assert written(0, a + b) == b"" and written(0, b) == b"" and written(1, b, "s3") == b""
    assert written(1, b) == b and written(1, a) == a and written(0, b, "s3") == b


def test_an_engine_that_asks_too_late_withdraws_what_it_has_published(folders, engine, monkeypatch) -> None:
    monkeypatch.setattr(followers, "MOST_CHUNKS", 12)
    with server_parts(folders, 64 * EXTENT) as (service, port):
        address = SimpleNamespace(address=f"tcp://127.0.0.1:{port}")
        one = engine(address, "one", follows=True)
        router, ids = Publisher(one), tokens(100, 1)
        router.look_up(ids)
        one.store(ids)
        router.until(lambda: router.told(ids))
        one.scheduler._asks_news = False
        for seed in range(2, 6):
            one.store(tokens(100, seed))
        router.until(lambda: not router.has[L1])
        assert service.counters["news_overflows"] >= 1
        assert router.look_up(ids, "again") == 6
        router.until(lambda: router.told(ids))


def test_a_lost_server_is_nothing_any_more(server, engine) -> None:
    first = server()
    one = engine(first, follows=True)
    router, ids = Publisher(one), tokens(100, 1)
    router.look_up(ids)
    one.store(ids)
    router.until(lambda: router.told(ids))
    first.end()
    router.until(lambda: not router.has[L1])
    server(port=first.port)
    one.connect()
    assert router.look_up(ids, "again") == 0
    one.store(ids)
    router.until(lambda: router.told(ids))


def test_vllms_own_cache_emptied_tells_everything_again(folders, engine) -> None:
    with server_parts(folders, 64 * EXTENT) as (_, port):
        one = engine(SimpleNamespace(address=f"tcp://127.0.0.1:{port}"), "one", follows=True)
        router, ids = Publisher(one), tokens(100, 1)
        router.look_up(ids)
        one.store(ids)
        router.until(lambda: router.told(ids))
        router.events.own_cache_emptied()
        router.step()
        assert router.removed == 3 and router.told(ids)


def test_the_answers_of_ended_requests_are_not_kept(folders, engine) -> None:
    """They are not stored, and may be a hundred times as long as the prompt."""
    with server_parts(folders, 64 * EXTENT) as (_, port):
        one = engine(SimpleNamespace(address=f"tcp://127.0.0.1:{port}"), "one", follows=True)
        router, ids = Publisher(one), tokens(100, 1)
        chain = one.chain(ids)
        asked = SimpleNamespace(id="r", chain=chain, hit=None, request=SimpleNamespace(all_token_ids=list(ids)))
        router.events.looked_up(asked)
        asked.request.all_token_ids += tokens(1000, 2)
        router.events.ended(asked)
        prompt = router.events._known.prompt("r", chain)
        assert prompt is not None and list(prompt.tokens or ()) == ids[:96] and len(prompt.blocks or ()) == 3
        one.store(ids)
        router.until(lambda: router.told(ids))


def test_a_server_that_tells_nothing_is_published_as_having_nothing() -> None:
    """One of an older version: what it has now may be gone at any time, and nobody would hear of it."""
    session = SimpleNamespace(is_told=False, news=deque(), restarts=0)
    requests = SimpleNamespace(session=session, resets=0)
    events = KVEvents(requests, 32, Blocks())  # type: ignore[arg-type]
    request = SimpleNamespace(all_token_ids=list(range(64)))
    chain = TokenChain(chunk_root(b"f" * 16), 16)
    chain.extend(request.all_token_ids)
    asked = SimpleNamespace(id="r", chain=chain, hit=SimpleNamespace(chunks=4), request=request)
    events.looked_up(asked)
    events.stores(asked)
    assert not events._failed and events._known.prompt("r", chain) is None, "nothing is noted, at every step again"
    assert events.take() == []


def test_an_error_ends_the_events_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    session = SimpleNamespace(is_told=True, news=deque([("nonsense",)]), restarts=0, ask_news=lambda: None)
    events = KVEvents(SimpleNamespace(session=session, resets=0), 32, Blocks())  # type: ignore[arg-type]
    assert events.take() == [] == events.take()
    assert caplog.text.count("publishes no KV events any more") == 1
    assert split_hashes(b"") == []


def following(*news: Any) -> tuple[Any, Any, KVEvents]:
    """A session that is told this, a request of four chunks and two blocks, and the events of its engine."""
    session = SimpleNamespace(is_told=True, news=deque(news), restarts=0, ask_news=lambda: None, epoch=b"now")
    request = SimpleNamespace(all_token_ids=list(range(64)))
    chain = TokenChain(chunk_root(b"f" * 16), 16)
    chain.extend(request.all_token_ids)
    asked = SimpleNamespace(id="r", chain=chain, hit=SimpleNamespace(chunks=4, epoch=b"now"), request=request)
    return session, asked, KVEvents(SimpleNamespace(session=session, resets=0), 32, Blocks())  # type: ignore[arg-type]


def test_a_hit_of_the_server_before_this_one_is_not_told() -> None:
    """It may have been found just before the connection's thread has reached the next server."""
    _, asked, events = following()
    asked.hit.epoch = b"before"
    events.looked_up(asked)
    assert events.take() == []
    asked.hit = SimpleNamespace(chunks=4, epoch=b"now")
    events.looked_up(asked)
    assert [len(one.blocks) for one in events.take()] == [2]


@pytest.mark.parametrize("late", [False, True])
def test_what_was_published_before_an_error_is_taken_back(caplog: pytest.LogCaptureFixture, late: bool) -> None:
    session, asked, events = following()
    events.looked_up(asked)
    (stored,) = events.take()
    if late:  # a removal waits to be published
        events._known.gone(split_hashes(asked.chain.hashes)[3], L1)
    session.news.append(("nonsense",))
    removed = events.take()
    assert [one.tokens for one in removed] == [None] * len(removed) and stored.tokens is not None
    assert sorted(block for one in removed for block in one.blocks) == sorted(stored.blocks)
    assert events.take() == [] and caplog.text.count("publishes no KV events any more") == 1


def test_events_that_cannot_be_made_are_no_end_of_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    _, asked, events = following()
    events.looked_up(asked)
    events._events = SimpleNamespace()  # type: ignore[assignment]
    assert events.take() == [] == events.take()
    assert "could not be taken back" in caplog.text


def test_an_error_while_all_is_told_again_does_not_reach_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    session = SimpleNamespace(is_told=True, news=deque(), restarts=0, ask_news=lambda: None)
    events = KVEvents(SimpleNamespace(session=session, resets=0), 32, Blocks())  # type: ignore[arg-type]
    monkeypatch.setattr(events, "_known", SimpleNamespace())
    events.own_cache_emptied()
    assert events._failed and events.take() == []


def test_news_that_a_reconnect_voids_while_it_is_taken_is_no_error() -> None:
    """The connection's thread may empty the news at any time."""

    class Emptied(deque[Any]):
        def popleft(self) -> Any:
            self.clear()
            return super().popleft()

    session = SimpleNamespace(is_told=True, news=Emptied([("stored", bytes(16))]), restarts=1, ask_news=lambda: None)
    events = KVEvents(SimpleNamespace(session=session, resets=0), 32, Blocks())  # type: ignore[arg-type]
    assert events.take() == []
    session.restarts = 0
    session.news.append(("stored", bytes(16)))
    assert events.take() == [] and not events._failed
