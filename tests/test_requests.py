"""What every engine's scheduler and ranks do alike (`engine.requests`, `engine.copies`), with a real server and real copies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine_process import PATIENCE, Engine, pause_once
from lmcache.chunks import HASH_BYTES, Group, tenant_of
from lmcache.engine import Copies, Copy, Hit, Loading, Request, Requests
from lmcache.engine.embedded import wait_connected
from lmcache.engine.endpoint import Endpoint
from lmcache.engine.groups import RankGroup
from lmcache.engine.local import LocalRank
from lmcache.engine.requests import HIT_SECONDS, MISS_SECONDS, WAIT_SHARE, GroupTable
from lmcache.errors import LayoutError
from lmcache.runtime import RUNTIME, Runtime
from lmcache.sizing.readers import Trace
from lmcache.sizing.replay import Capacity, Simulation, replay
from lmcache.sizing.trace import Lookup, Replied
from proxy import Proxy
from servers import Server, eventually
from stores import RedisServer, binary_of
from test_engine import prompt

CHUNK = 16
Servers, Engines = Callable[..., Server], Callable[..., Engine]


class Bed:
    """An engine that does all for its requests with the core, by a clock that only the test moves."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        assert engine.scheduler is not None
        self.engine, self.session, self.now, self.asked = engine, engine.scheduler, 1000.0, 0
        self.session.runtime = replace(RUNTIME, now=lambda: self.now)
        self.requests: Requests[Request] = Requests(self.session, **options)
        self.copies = Copies(engine.worker, 0, requests=self.requests if options.get("ranks", 1) == 1 else None)
        poll = self.session.poll

        def counted(*arguments: Any, **more: Any) -> Any:
            self.asked += 1
            return poll(*arguments, **more)

        self.session.poll = counted  # type: ignore[method-assign]

    def open(self, name: str = "a", **what: Any) -> Request:
        request = self.requests.open[name] = Request(name, **what)
        return request

    def store(self, request: Request, ids: list[int], **how: Any) -> int:
        """Compute these tokens and store what is new of them. Tokens that were stored."""
        self.engine.fill(ids)
        plan = self.requests.store(request, ids, len(ids), **how)
        if plan is None:
            return 0
        copy = self.copies.store(plan, self.engine.table(len(ids)))
        assert self.copies.wait([copy], PATIENCE) and copy.ok
        return plan.tokens

    def load(self, request: Request, ids: list[int], start: int = 0) -> int:
        """Tokens from `start` on that were loaded, and are right."""
        self.engine.poison()
        self.requests.find(request, ids, start)
        end = min(request.found_tokens, len(ids))
        if end <= start:
            return 0
        copy = self.copies.load(self.requests.load(request, start, end), self.engine.table(len(ids)))
        assert self.copies.settle([copy], PATIENCE) and self.engine.right(ids, start, end)
        return end - start


@pytest.fixture
def bed(server: Servers, engine: Engines) -> Bed:
    return Bed(engine(server(chunk=CHUNK)))


def held(bed: Bed) -> set[int]:
    """Leases that the session holds."""
    return bed.session._held


def test_what_one_request_stores_another_loads_and_no_lease_is_left(bed: Bed) -> None:
    ids = prompt(3, 200)
    first = bed.open("first")
    assert bed.load(first, ids) == 0
    assert bed.store(first, ids[:100]) == 96
    assert bed.store(first, ids[:101]) == 0, "no other chunk is full"
    assert bed.store(first, ids) == 96, "and only what is new"
    second = bed.open("second")
    assert bed.load(second, ids) == 192
    assert bed.store(second, ids) == 0, "what was a hit is not stored again"
    assert bed.load(bed.open("third"), ids, start=50) == 142
    assert not held(bed) and not bed.requests.loading and not bed.requests.storing
    assert not first.jobs and not second.jobs


def test_what_a_request_has_not_found_is_announced_until_it_is_stored_or_the_request_ends(
    server: Servers, engine: Engines
) -> None:
    one = server(chunk=CHUNK, flags=("--l2-patience-seconds", "60"))
    bed, other = (Bed(engine(one, instance=name), name=name * 300) for name in ("first", "other"))
    bed.requests.prefill.tokens_per_second = other.requests.prefill.tokens_per_second = (
        1.0  # so the other one waits long
    )

    def promised() -> float:
        return one.counters()["promised_chunks"]

    ids = prompt(3, 200)
    request = bed.open("a")
    assert bed.requests.find(request, ids) is None and promised() == 12
    assert other.requests.find(other.open("a"), ids) == Loading(0, 12)
    assert bed.store(request, ids[:100]) == 96 and promised() == 6
    assert other.requests.find(other.open("a"), ids) == Loading(6, 6)
    bed.requests.finish("a")
    eventually(lambda: not promised())
    found = other.requests.find(other.open("a"), ids)
    assert isinstance(found, Hit) and found.chunks == 6 and promised() == 6, "now the other one computes"
    reads = Bed(bed.engine, stores=False)
    assert isinstance(reads.requests.find(reads.open("b"), prompt(4, 200)), type(None)) and promised() == 6
    request = bed.open("c")
    assert bed.requests.find(request, longer := prompt(5, 200)) is None
    assert bed.store(request, longer) == 192
    bed.requests.finish("c")
    assert promised() == 6
    assert bed.requests.find(bed.open("d"), prompt(6, 200)) is None and promised() == 18
    bed.requests.reset()
    eventually(lambda: promised() == 6)


def test_a_request_that_waits_is_asked_about_less_and_less_often(server: Servers, engine: Engines) -> None:
    one = server(chunk=CHUNK)
    bed, other = (Bed(engine(one, instance=name), name=name) for name in ("first", "other"))
    bed.requests.prefill.tokens_per_second = other.requests.prefill.tokens_per_second = (
        0.01  # so that a wait may be long
    )
    ids, request = prompt(3, 200), other.open()
    assert bed.requests.find(bed.open(), ids) is None
    for _ in range(100):
        assert isinstance(other.requests.find(request, ids), Loading)
        other.now += 0.01
    assert 20 <= other.asked <= 60
    assert bed.store(bed.requests.open["a"], ids) == 192
    other.now += WAIT_SHARE
    found = other.requests.find(request, ids)
    assert isinstance(found, Hit) and found.chunks == 12
    other.requests.give_back(request)


@pytest.mark.parametrize("name", ["x" * (5 << 20), "\ud800", "a\nb\x1b"], ids=["long", "surrogate", "control"])
def test_ids_and_salts_of_any_length_and_content_are_cached(bed: Bed, name: str) -> None:
    ids = prompt(9, 64)
    assert bed.store(bed.open(name, salt=name), ids) == 64
    assert bed.load(bed.open(name + "again", salt=name), ids) == 64
    assert bed.load(bed.open("another", salt=name + "x"), ids) == 0
    assert bed.session.connected and not bed.session.misses


def test_a_waiting_request_is_answered_from_memory_until_the_answer_is_old(bed: Bed) -> None:
    ids, waits = prompt(4, 100), bed.open("waits")
    assert bed.requests.find(waits, ids) is bed.requests.find(waits, ids) is None and bed.asked == 1
    bed.now += MISS_SECONDS
    assert bed.requests.find(waits, ids) is None and bed.asked == 2, "somebody may have stored it"
    bed.store(bed.open("stores"), ids)
    bed.now += MISS_SECONDS
    hit = bed.requests.find(waits, ids)
    assert isinstance(hit, Hit) and hit.chunks == 6 and bed.requests.find(waits, ids) is hit and bed.asked == 3
    assert bed.requests.find(waits, ids, fresh=0.0) is not hit, "who wants a fresh answer gets one"
    bed.now += HIT_SECONDS
    bed.requests.find(waits, ids)
    assert bed.asked == 5 and len(held(bed)) == 1, "the old hit was given back"
    bed.requests.find(waits, ids, have=40)
    assert bed.asked == 5, "the lease reaches back far enough"
    bed.requests.give_back(waits)
    bed.requests.find(waits, ids, have=40)
    assert bed.asked == 6 and waits.hit is not None and waits.hit.first_chunk == 2
    bed.requests.find(waits, ids, have=20)
    assert bed.asked == 7, "the engine has lost some of its own"
    bed.requests.finish("waits")
    assert not held(bed)


@pytest.mark.parametrize(
    ("end", "other"),
    [
        ("aborted", "another request"),
        *(("aborted", "another engine"), ("aborted", "nobody")),
        *(("with its engine", "another engine"), ("with its engine", "nobody")),
    ],
)
def test_what_nobody_waits_for_any_more_is_not_loaded(
    server: Servers, engine: Engines, folders: Callable[[str], Path], end: str, other: str
) -> None:
    """A request that waits for a tier is aborted, or its engine ends. The store behind the tier does not answer."""
    store = RedisServer(binary_of("valkey"), folders("/tmp"))
    proxy = Proxy(store.port)
    try:
        url = store.url("?timeout=3600", port=proxy.port)
        one = server(chunk=CHUNK, flags=("--l2", url, "--worth", "always", "--l2-patience-seconds", "600"))
        bed, ids = Bed(engine(one)), prompt(3, 200)
        second = Bed(engine(one, "second")) if other == "another engine" else bed
        last = bed if end == "aborted" else Bed(engine(one, "third"))
        proxy.freeze()
        assert isinstance(bed.requests.find(bed.open("a"), ids), Loading)
        if other != "nobody":
            name = "a" if other == "another engine" else "b"
            assert isinstance(second.requests.find(second.open(name), ids), Loading)
        if end == "aborted":
            bed.requests.finish("a")
        else:
            bed.requests.close()
        if other != "nobody":
            assert isinstance(second.requests.find(second.requests.open[name], ids), Loading)
            assert one.counters()["fetches_open"] == 1
            second.requests.finish(name)
        eventually(lambda: one.counters()["fetches_open"] == 0)
        assert one.status()["fetches"][-1]["outcome"] == "withdrawn"
        found = last.requests.find(last.open("again"), ids)
        stalled = one.status()["fetches"][0]["left_out"] == {
            "redis": "not serving"
        }  # after a second, on a busy machine
        assert isinstance(found, Loading) or stalled, "at once"
    finally:
        proxy.close()
        store.end()


def test_a_server_that_learns_is_told_how_long_answers_are(server: Servers, engine: Engines) -> None:
    one = server(flags=("--eviction-policy", "learned"))
    bed = Bed(engine(one))
    for name, answer in (("a", 70), ("b", 0)):
        ids = list(range(200))
        bed.requests.find(bed.open(name), ids)
        bed.requests.finish(name, len(ids) + answer)
    eventually(lambda: one.status()["eviction"]["answers_learned_from"] == 1)
    eventually(lambda: one.status()["eviction"]["prompts_learned_from"] >= 1)
    assert not one.counters()["refused_requests_total"]


def test_a_trace_tells_how_long_answers_were(server: Servers, engine: Engines, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    one = server(flags=("--record-trace", str(path)))
    bed, ids = Bed(engine(one)), list(range(200))
    for name, answer in (("a", 70), ("b", 0), ("c", 3)):
        bed.requests.find(bed.open(name), ids)
        bed.requests.finish(name, len(ids) + answer)
    eventually(lambda: path.read_text().count('"replied"') == 2)
    lookups = [one for one in Trace([path]) if isinstance(one, Lookup)]
    replied = [one for one in Trace([path]) if isinstance(one, Replied)]
    assert [one.tokens for one in replied] == [70, 3] and replied[0].time >= lookups[0].time
    assert {one.last for one in replied} == {one.hashes[-16:] for one in lookups}
    assert one.status()["eviction"]["answers_learned_from"] == 0, "LRU learns nothing"
    simulation = Simulation("learned", Capacity(blocks=100))
    told = replay(Trace([path]), [simulation], lambda requests: None).as_json()
    assert (told["requests"], told["answers"]) == (3, 2)


def test_a_request_counts_once_however_long_it_waits(server: Servers, engine: Engines) -> None:
    """Schedulers ask about a waiting request again and again, and each lookup is a lease or a miss of its own."""
    one = server(chunk=CHUNK)
    bed, ids = Bed(engine(one)), prompt(4, 100)

    def counted(name: str, seconds: float) -> tuple[float, float]:
        """Hits and misses of a request that is asked about ten times; then it goes on with one more token."""
        before, asked, waits = one.counters(), bed.asked, bed.open(name)
        for _ in range(10):
            bed.requests.find(waits, ids)
            bed.now += seconds
        assert bed.asked == asked + 10
        bed.requests.find(waits, [*ids, 1])
        bed.requests.finish(name)
        after = one.counters()
        hits, misses = (after[kind] - before[kind] for kind in ("hit_chunks_total", "missed_chunks_total"))
        return hits, misses

    assert counted("misses", MISS_SECONDS) == (0, 2 * 6)
    assert bed.store(bed.open("stores"), ids) == 96
    assert counted("hits", HIT_SECONDS) == (2 * 6, 0)


def test_hits_that_nobody_loads_are_given_back_when_they_are_old(bed: Bed) -> None:
    ids = prompt(5, 64)
    bed.store(bed.open("stores"), ids)
    young, old = bed.open("young"), bed.open("old")
    bed.requests.find(old, ids)
    bed.now += 4.0
    bed.requests.find(young, ids)
    bed.requests.give_back_older(3.0)
    assert old.hit is None and young.hit is not None and len(held(bed)) == 1
    assert isinstance(bed.requests.find(old, ids), Hit), "it is asked for again at once"


def test_a_tier_that_loads_is_asked_about_at_every_step(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, waits = prompt(6, 64), bed.open("waits")
    with monkeypatch.context() as tier:
        tier.setattr(bed.session, "poll", lambda *_, **__: Loading(0, 4))
        assert [isinstance(bed.requests.find(waits, ids), Loading) for _ in range(2)] == [True, True]
    assert bed.requests.find(waits, ids) is None and bed.asked == 1


def test_a_request_tells_its_tenant_whatever_else_its_salt_depends_on(bed: Bed) -> None:
    for generation in (0, 1):
        bed.requests._generation = generation
        chain = bed.requests.chain(bed.open(f"r{generation}", salt="tenant"))
        assert chain is not None and chain.tenant == tenant_of("tenant") != b""
    chain = bed.requests.chain(bed.open("without"))
    assert chain is not None and chain.tenant == b""


@pytest.mark.parametrize("change", [{"salt": "s"}, {"adapter": ("x", "1")}, {"extras": lambda *_: b"image"}])
def test_salts_adapters_and_images_share_nothing(bed: Bed, change: dict[str, Any]) -> None:
    ids = prompt(7, 64)
    assert bed.store(bed.open("a"), ids) == 64
    assert bed.load(bed.open("b", **change), ids) == 0 and bed.load(bed.open("c"), ids) == 64


def test_a_request_that_cannot_be_named_is_neither_loaded_nor_stored(bed: Bed) -> None:
    ids = prompt(8, 64)
    bed.store(bed.open("a"), ids)
    nameless = bed.open("b", cacheable=False)
    assert bed.load(nameless, ids) == 0 and bed.store(nameless, [*ids, *ids]) == 0
    failed = bed.open("c", may_load=False)
    assert bed.load(failed, ids) == 0, "a load that failed is not tried again"
    assert bed.store(failed, [*ids, *ids]) == 128


def test_the_tail_of_a_prompt_is_stored_once_and_found(server: Servers, engine: Engines) -> None:
    bed, ids = Bed(engine(server(chunk=CHUNK)), save_tail=True), prompt(9, 40)
    first = bed.open("first")
    assert bed.store(first, ids) == 32, "the prompt goes on"
    assert bed.store(first, ids, ends=True) == 8 and bed.store(first, ids, ends=True) == 0
    second = bed.open("second")
    assert bed.load(second, ids) == 40 and second.tail == first.tail
    assert bed.store(second, ids, ends=True) == 0
    assert bed.load(bed.open("third"), [*ids, 1]) == 32, "a tail is nobody's beginning"


def test_what_is_not_there_to_be_stored_is_left_out(bed: Bed) -> None:
    ids, request = prompt(10, 96), bed.open()
    plan = bed.requests.store(request, ids, 90, first_token=17)
    assert plan is not None and (plan.first_chunk, plan.chunks, plan.start, plan.end) == (2, 3, 32, 80)
    chain = bed.session.new_chain()
    assert chain is not None
    chain.extend(ids)
    assert plan.parent == chain.parent(2) and plan.hashes == chain.hashes[2 * HASH_BYTES : 5 * HASH_BYTES]


def test_a_table_that_is_too_short_stores_nothing(server: Servers, engine: Engines) -> None:
    bed, ids = Bed(engine(server(chunk=CHUNK)), block_tokens=16), prompt(11, 64)
    request = bed.open()
    request.blocks = [3, 4, 5]
    assert bed.requests.store(request, ids, 64) is None
    request.blocks.append(6)
    plan = bed.requests.store(request, ids, 64)
    assert plan is not None and plan.blocks == [3, 4, 5, 6]


def test_a_reset_serves_nothing_older_unless_it_is_undone(bed: Bed) -> None:
    ids, running = prompt(12, 64), bed.open("running")
    bed.store(bed.open("before"), ids)
    bed.requests.find(running, ids)
    bed.requests.reset()
    assert not held(bed) and bed.store(running, ids) == 0, "some of it may be of the old weights"
    assert bed.load(bed.open("after"), ids) == 0
    bed.requests.undo_reset()
    assert bed.load(bed.open("undone"), ids) == 64
    bed.requests.reset()
    assert bed.store(bed.open("new weights"), ids) == 64
    bed.requests.reset()
    bed.requests.undo_reset()
    assert bed.load(bed.open("still the new weights"), ids) == 64


def test_generations_are_shared_by_the_name_of_the_engine_alone(server: Servers, engine: Engines) -> None:
    daemon, ids = server(chunk=CHUNK), prompt(13, 64)
    beds = [Bed(engine(daemon, instance), name=name) for instance, name in (("1", "one"), ("2", "one"), ("3", ""))]
    for one in beds:
        one.requests.reset()
    beds[0].store(beds[0].open(), ids)
    assert [one.load(one.open(), ids) for one in beds] == [64, 64, 0]


def test_a_new_server_is_sent_everything_from_the_first_chunk(server: Servers, engine: Engines) -> None:
    daemon, ids = server(chunk=CHUNK), prompt(14, 64)
    bed = Bed(engine(daemon))
    request, before = bed.open(), bed.session.epoch
    bed.store(request, ids)
    bed.requests.find(bed.open("waits"), ids)
    daemon.kill()
    server(chunk=8, port=daemon.port)
    eventually(lambda: bed.session.epoch != before and bed.engine.worker.connected and bed.session.connected)
    assert bed.store(request, ids) == 64 and request.chain is not None and request.chain.chunk_tokens == 8
    waits = bed.requests.open["waits"]
    assert bed.load(waits, ids) == 64, "the hit of the old server is void"


def test_a_lease_ends_when_every_rank_has_loaded(server: Servers, engine: Engines) -> None:
    bed, ids = Bed(engine(server(chunk=CHUNK)), ranks=2), prompt(15, 64)
    request = bed.open()
    bed.store(request, ids)
    (job,) = request.jobs
    bed.requests.stored(job, 1)
    assert request.jobs == {job: 1}
    bed.requests.stored(job, 1)
    assert not request.jobs
    other = bed.open("other")
    bed.requests.find(other, ids)
    load = bed.requests.load(other, 0, 64)
    bed.requests.finish("other")
    assert len(held(bed)) == 1, "ranks may still read"
    bed.requests.loaded(load.job_id, 1)
    assert len(held(bed)) == 1
    bed.requests.loaded(load.job_id, 1)
    bed.requests.loaded("a job of nobody")
    assert not held(bed)


def test_an_engine_that_cannot_be_served_hangs_up_when_nothing_is_loaded_any_more(bed: Bed) -> None:
    ids = prompt(16, 64)
    bed.store(bed.open("stores"), ids)
    loads, waits = bed.open("loads"), bed.open("waits")
    bed.requests.find(loads, ids)
    bed.requests.find(waits, ids)
    plan = bed.requests.load(loads, 0, 64)
    bed.requests.stop("a rank cannot")
    assert len(held(bed)) == 1 and bed.session.connected
    assert bed.requests.find(waits, ids) is None and bed.requests.store(waits, [*ids, *ids], 128) is None
    bed.requests.loaded(plan.job_id)
    assert not held(bed) and not bed.session.connected


def test_what_is_computed_before_the_weights_are_known_is_counted() -> None:
    told: list[int] = []
    session = SimpleNamespace(
        runtime=RUNTIME, epoch=b"", chunk_tokens=None, new_chain=lambda *_, **__: None, forgone=told.append
    )
    requests: Requests[Request] = Requests(session)  # type: ignore[arg-type]
    for name, cacheable in (("a", True), ("b", False)):
        request = requests.open[name] = Request(name, cacheable=cacheable)
        assert requests.find(request, range(100)) is None and requests.store(request, range(100), 100) is None
        requests.finish(name, 100)
    requests.finish("of nobody", 100)
    assert told == [100]


# Copies


class Midway:
    """Holds the next gather or scatter of an engine when half of it is done."""

    def __init__(self, bed: Bed, what: str) -> None:
        self.began, self.may_end = threading.Event(), threading.Event()
        pause_once(bed.engine.worker._access.parts[0].copier, what, self._hold)  # type: ignore[union-attr]

    def _hold(self) -> None:
        self.began.set()
        assert self.may_end.wait(PATIENCE)


def test_a_copy_that_hangs_is_called_off_and_known_until_it_ends(bed: Bed) -> None:
    ids = prompt(17, 64)
    bed.store(bed.open("stores"), ids)
    midway, ended = Midway(bed, "scatter"), list[Copy]()
    copies = Copies(bed.engine.worker, 0, requests=bed.requests, ended=ended.append)
    both = []
    for name in ("begins", "waits behind it"):
        request = bed.open(name)
        bed.requests.find(request, ids)
        both.append(copies.load(bed.requests.load(request, 0, 64), bed.engine.table(64)))
    assert midway.began.wait(PATIENCE)
    assert not copies.settle(both, 0.0, 0.0) and not ended
    assert [copy.done for copy in both] == [None, None] and len(held(bed)) == 2
    midway.may_end.set()
    assert copies.wait(both, PATIENCE)
    assert [copy.ok for copy in both] == [True, False], "what had not begun never does"
    assert set(ended) == set(both) and not copies.running() and not held(bed)


def test_copies_that_have_not_begun_end_with_their_session(server: Servers, engine: Engines) -> None:
    """Whoever waits for one in another thread would wait for ever."""
    cache = server(chunk=CHUNK)
    bed, ids = Bed(engine(cache)), prompt(21, 192)
    bed.engine.fill(ids)
    midway, request, worker = Midway(bed, "gather"), bed.open("a"), bed.engine.worker

    def start(tokens: int) -> Copy:
        plan = bed.requests.store(request, ids, tokens)
        assert plan is not None
        return bed.copies.store(plan, bed.engine.table(192))

    copies = [start(64), start(128)]
    waits = threading.Thread(target=bed.copies.wait, args=(copies,), daemon=True)
    waits.start()
    assert midway.began.wait(PATIENCE)
    ends = threading.Thread(target=worker.close)
    ends.start()
    eventually(lambda: worker._closed)
    midway.may_end.set()
    for thread in (ends, waits):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    copies.append(start(192))
    assert bed.copies.wait(copies, PATIENCE) and [copy.ok for copy in copies] == [True, False, False]
    assert worker.counters["dropped_chunks:closed"] == 8
    eventually(lambda: cache.counters().get('engine_dropped_chunks_total{reason="closed"}') == 4)


def test_blocks_that_are_taken_away_are_let_go_of(bed: Bed) -> None:
    ids, request = prompt(18, 64), bed.open("a")
    bed.engine.fill(ids)
    midway, plan = Midway(bed, "gather"), bed.requests.store(request, ids, 64)
    assert plan is not None
    copy, gone = bed.copies.store(plan, bed.engine.table(64)), threading.Event()

    def let_go() -> None:
        bed.copies.let_go([plan.job_id, "a job of another rank"])
        gone.set()

    assert midway.began.wait(PATIENCE)
    thread = threading.Thread(target=let_go)
    thread.start()
    assert bed.copies.closed(["a", "b"]) == {"b"}, "a store still reads the blocks of one"
    assert not gone.is_set()
    midway.may_end.set()
    thread.join(PATIENCE)
    assert gone.is_set() and bed.copies.wait([copy], PATIENCE)
    assert bed.copies.closed(()) == {"a"} and bed.copies.closed(()) == set(), "each is told once"


def test_a_rank_that_shares_its_shard_leaves_storing_to_the_first(bed: Bed) -> None:
    ids, request = prompt(19, 64), bed.open()
    copies = Copies(bed.engine.worker, 0, stores=False, requests=bed.requests)
    for act in (copies.store, lambda plan: copies.drop(plan, "weights changed")):
        plan = bed.requests.store(request, ids, 64)
        assert plan is not None
        assert act(plan).done is not None and not request.jobs
        ids += prompt(20, 64)
        request.stored = 0
    assert not bed.engine.worker.counters, "nor does it count what is dropped"
    assert bed.load(bed.open("other"), ids) == 0


def test_another_thread_may_start_a_copy_while_one_looks_through_them(bed: Bed) -> None:
    ids, begun = prompt(21, 64), list[Copy]()
    bed.engine.fill(ids)

    def begin() -> None:
        plan = bed.requests.store(bed.open(str(len(begun)), salt=str(len(begun))), ids, 64)
        assert plan is not None
        begun.append(bed.copies.store(plan, bed.engine.table(64)))

    class Interrupted(type):
        """Another thread gets its turn at this moment."""

        def __instancecheck__(cls, plan: object) -> bool:
            begin()
            return True

    begin()
    assert bed.copies.running(Interrupted("Kind", (), {})) == begun[:1]
    assert len(begun) == 2 and bed.copies.wait(begun, PATIENCE) and not bed.copies.running()


# Time and threads


def test_clock_and_threads_come_from_the_runtime(server: Servers, engine: Engines) -> None:
    """Of a session, and of all that is above it."""
    one, names = engine(server(chunk=CHUNK)), list[str]()

    def start(run: Callable[[], object], name: str) -> threading.Thread:
        names.append(name)
        return RUNTIME.start(run, name)

    runtime = Runtime(now=lambda: 5.0, sleep=lambda seconds: None, start=start)
    assert one.scheduler is not None
    worker = type(one.worker)(replace(one.worker._connection.endpoint, rank=1), *one.worker._groups, runtime=runtime)
    endpoint = replace(one.scheduler._connection.endpoint, rank=1)
    scheduler = type(one.scheduler)(endpoint, *one.scheduler._groups, runtime=runtime)
    try:
        eventually(lambda: worker.connected and scheduler.connected)
        assert {"lmcache-link-worker", "lmcache-link-scheduler", "lmcache-load", "lmcache-store", "lmcache-map"} == set(
            names
        )
        assert Requests(scheduler).runtime is runtime
    finally:
        worker.close()
        scheduler.close()


def test_a_server_that_is_not_running_is_not_waited_for(bed: Bed) -> None:
    missing = SimpleNamespace(runtime=bed.session.runtime, connected=False, wait_connected=lambda seconds: None)
    assert wait_connected((bed.session, bed.engine.worker), 0.0)
    ended = SimpleNamespace(running=False)
    assert not wait_connected((bed.session, missing), PATIENCE, ended)  # type: ignore[arg-type]

    def passes(seconds: float) -> None:
        bed.now += seconds

    missing.wait_connected = passes
    assert not wait_connected((missing,), 3.0) and bed.now == pytest.approx(1003.0)  # type: ignore[arg-type]


def test_stages_of_one_group_are_not_taken_for_those_of_others() -> None:
    endpoint, kv = Endpoint("tcp://127.0.0.1:1", "stages", ""), SimpleNamespace()
    with pytest.raises(LayoutError, match="a RankGroup for each group"):
        LocalRank(endpoint, kv, stages=(1, 2), others=[kv])  # type: ignore[arg-type]


def test_windows_and_states_are_stored_where_steps_begin_and_end(bed: Bed) -> None:
    """Each step: tokens before it, tokens known after it, and (first chunk, chunks) of full attention, a window, a state, chunks
    of attention of 80 tokens, and windows of two chunks and of half a chunk that are kept only where steps end."""
    local = GroupTable(CHUNK, 5 * CHUNK, local_tokens=5 * CHUNK)
    groups = GroupTable(CHUNK), GroupTable(CHUNK, 2 * CHUNK), GroupTable(CHUNK, 1, only_last=True), local
    last = GroupTable(CHUNK, 2 * CHUNK, only_last=True), GroupTable(CHUNK, CHUNK // 2, only_last=True)
    requests: Requests[Request] = Requests(bed.session, groups=[*groups, *last])
    table = list(range(9))
    request = requests.open["a"] = Request("a", blocks=table, tables=[table] * 5)
    steps = {
        (0, 64): [(0, 4), (0, 4), (3, 1), (0, 4), (2, 2), (3, 1)],
        # asynchronous scheduling: token 80 was not known at the step that computed it
        (80, 80): [(4, 1), (4, 1), (4, 1), (5, 0), (4, 1), (4, 1)],
        (100, 112): [(5, 2), (6, 1), (6, 1), (6, 1), (6, 1), (6, 1)],
        (112, 140): [(7, 1), (7, 1), (8, 0), (7, 1), (7, 1), (8, 0)],
    }
    for (before, computed), expected in steps.items():
        plan = requests.store(request, prompt(9, 144), computed, before=before)
        assert plan is not None
        assert [(part.first_chunk, part.chunks) for part in (plan, *plan.others)] == expected, (before, computed)
    assert [local.needed_from(end) for end in (0, 79, 80, 100, 160)] == [0, 0, 80, 80, 160]


def test_chunks_of_windows_end_where_blocks_end(bed: Bed) -> None:
    worker, own = bed.engine.worker, bed.engine.worker._groups[0]
    group = RankGroup(worker._layout_for, own.shard, own.paged, Group((0, 1), 64), block_tokens=32)
    assert group.kept_tokens(96) == 64
    with pytest.raises(LayoutError, match="--chunk-size 32"):
        group.kept_tokens(48)
    local = RankGroup(worker._layout_for, own.shard, own.paged, Group((0, 1), 64), local_tokens=64)
    assert [local.kept_tokens(chunk) for chunk in (32, 64, 128)] == [32, 64, 64]
    with pytest.raises(LayoutError, match="every 64 tokens: start the server with --chunk-size 64"):
        local.kept_tokens(96)
