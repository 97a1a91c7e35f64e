"""Every token that is looked up is found somewhere or missing for a reason, once a request; and the reasons are right."""

from __future__ import annotations

import random
import sys
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine_process import Engine
from lmcache.cache.accounts import Accounts
from lmcache.cache.events import Event, Events
from lmcache.cache.reasons import REASONS
from lmcache.cache.records import Record, Records, select
from lmcache.cache.seen import ENTRY_BYTES, EVICTED, LOST, STORED, Seen, keys_of
from lmcache.cache.waits import AWAITED, FetchRecord
from lmcache.cli.main import main
from lmcache.engine import Loading
from lmcache.wire import messages as m
from servers import Raw, Server, eventually, server_parts
from test_requests import CHUNK, Bed

Servers, Engines = Callable[..., Server], Callable[..., Engine]


def chain(seed: int, chunks: int) -> bytes:
    return random.Random(seed).randbytes(16 * chunks)


def totals(server: Server) -> tuple[int, Counter[str], Counter[str]]:
    """Requested tokens, found tokens by source, and missing tokens by reason."""
    found = [Counter[str](), Counter[str]()]
    counters = server.counters()
    for name, value in counters.items():
        for counter, prefix in zip(found, ("lookup_tokens_total", "missed_tokens_total"), strict=True):
            if name.startswith(prefix) and value:
                counter[name.split('"')[1]] = int(value)
    return int(counters["requested_tokens_total"]), found[0], found[1]


def test_every_token_of_random_requests_is_accounted_for_once(server: Servers, engine: Engines) -> None:
    """Two engines ask for prompts with common beginnings, of which an L1 of 64 chunks holds some; one of them dies, and the cache
    is cleared now and then. Each request asks several times."""
    cache = server(l1=1.03, chunk=CHUNK)
    dice, asked, had = random.Random(5), 0, 0
    beds = [Bed(engine(cache, name, layers=8), name=name) for name in ("one", "two")]
    trunk = [[dice.randrange(1 << 16) for _ in range(200)] for _ in range(4)]
    for number in range(300):
        bed = dice.choice(beds)
        ids = dice.choice(trunk)[: dice.randrange(1, 200)] + [
            dice.randrange(1 << 16) for _ in range(dice.randrange(40))
        ]
        request = bed.open(f"r{number}")
        own = min(dice.choice((0, 0, 16, 40)), len(ids) // CHUNK * CHUNK - 1)
        own = max(0, own)
        for _ in range(dice.randrange(1, 4)):
            bed.requests.find(request, ids, own)
            bed.now += dice.choice((0.0, 1.0, 10.0))
        bed.requests.give_back(request)
        asked, had = asked + len(ids), had + own // CHUNK * CHUNK
        if dice.random() < 0.6:
            bed.store(request, ids)
        bed.requests.finish(f"r{number}")
        if number == 150:
            bed.engine.close()
            beds = [Bed(engine(cache, f"after {number}", layers=8), name="again") for _ in beds[:1]] + [
                one for one in beds if one is not bed
            ]
        if number % 70 == 69:
            cache.clear()
    requested, found, missed = eventually(lambda: (now := totals(cache))[0] >= asked and now)
    assert requested == asked == found.total() + missed.total()
    assert found["engine"] == had and found["l1"] > 0
    assert {"never_seen", "evicted", "cleared", "differs", "below_chunk"} <= set(missed)
    counters = cache.counters()
    gone = counters["evicted_chunks_total"] + counters["cleared_chunks_total"]
    assert counters["stored_chunks_total"] == counters["complete_chunks"] + gone > gone > 0
    records = [one for page in pages(cache) for one in page["requests"]]
    assert len(records) == 300 and sum(one["tokens"] for one in records) == asked
    assert all(one["tokens"] == sum(one["sources"].values()) + sum(one["missed"].values()) for one in records)
    assert all((one["reason"] != "") == (one["chunk"] >= 0) == bool(one["missed"]) for one in records)


def pages(server: Server) -> list[Any]:
    """All pages of /requests, of 100 records."""
    found = [server.get("/requests")]
    while found[-1]["next"]:
        found.append(server.get(f"/requests?before={found[-1]['next']}"))
    return found


def why(server: Server, request: str) -> Any:
    return server.get(f"/requests?request={request}")["requests"][0]


def test_each_reason_of_l1_is_told_apart(server: Servers) -> None:
    cache = server(l1=1.03, chunk=CHUNK)
    raw, other = (Raw(cache, name, shard_bytes=1 << 16) for name in ("raw", "other"))
    a, b, c, d = (chain(seed, 4) for seed in range(1, 5))
    name = iter(f"r{number}" for number in range(100))

    def reason(
        hashes: bytes, tokens: int = 0, have: int = 0, request: str | None = None
    ) -> tuple[str, int, dict[str, int]]:
        request = next(name) if request is None else request
        found = other.ask(m.Lookup(other.space, hashes, have, request=request, tokens=tokens))
        other.ask(m.Release([found.lease]))
        told = why(cache, request)
        return told["reason"], told["chunk"], told["missed"]

    assert reason(a, 70) == ("never_seen", 0, {"never_seen": 64, "below_chunk": 6})
    raw.store(a)
    assert reason(a, 70) == ("below_chunk", 4, {"below_chunk": 6})
    assert reason(a) == ("", -1, {})
    assert reason(a + b) == ("longer", 4, {"longer": 64})
    assert reason(a[:32] + b) == ("differs", 2, {"differs": 64})
    assert reason(a[:32] + b, have=3) == ("differs", 2, {"differs": 48}), "the engine has chunk 2 itself"
    held = raw.reserve(c)
    assert reason(c, request="") == ("being_written", 0, {"being_written": 64}), "without an id it does not wait"
    both = {"being_written": 64, "never_seen": 64}
    assert reason(c + d, request="") == ("being_written", 0, both), "nobody writes the other chunks"
    assert reason(c + d, have=4, request="") == ("never_seen", 4, {"never_seen": 64}), "the engine has what is written"
    assert reason(c + d, have=2, request="") == ("being_written", 2, {"being_written": 32, "never_seen": 64})
    raw.ask(m.Commit(held.reservation, False))
    assert reason(c) == ("not_stored", 0, {"not_stored": 64})
    raw.store(c)
    assert reason(c) == ("", -1, {})
    raw.store(chain(9, 12))
    assert reason(a) == ("evicted", 0, {"evicted": 64}), "the oldest"
    assert reason(a + d)[2] == {"evicted": 64, "longer": 64}
    cache.clear()
    assert reason(c) == ("cleared", 0, {"cleared": 64})
    told = why(cache, "r9")
    assert told["gone"] > 0 and told["wanted_by"] == 0
    raw.close()
    other.close()


def test_a_shard_that_is_missing_is_a_reason(server: Servers) -> None:
    cache = server(chunk=CHUNK)
    raw = Raw(cache, shards=2)
    raw.store(chain(1, 2))
    raw.ask(m.Lookup(raw.space, chain(1, 2), request="half"))
    assert why(cache, "half")["missed"] == {"incomplete": 32}
    raw.ask(m.Lookup(raw.space, chain(1, 2) + chain(2, 3), request="more"))
    assert why(cache, "more")["missed"] == {"incomplete": 32, "never_seen": 48}
    raw.close()


def test_what_is_remembered_stays_within_its_memory() -> None:
    seen, dice = Seen(1000), random.Random(1)
    last = b""
    for _ in range(30):
        last = dice.randbytes(16 * 100)
        seen.stored(5.0, last, bytes(16) + last[:-16])
    assert len(seen) == 1000 == sum(map(len, seen._known))
    one = seen.get(keys_of(last)[0])
    assert one is not None and (one.state, one.when, one.continued, one.cleared) == (STORED, 5.0, True, None)
    seen.used(6.0, keys_of(last)[2])
    seen.evicted(7.5, 0, last[32:48] + last[:16], 3)
    one = seen.get(keys_of(last)[0])
    assert one is not None and one[:5] == (EVICTED, 7.5, 6.0, 3, True)
    seen.cleared(9.0)
    seen.cleared(10.0)
    one = seen.get(keys_of(last)[1])
    assert one is not None and (one.state, one.cleared) == (STORED, 9.0)
    seen.lost(11.0, last[16:32])
    one = seen.get(keys_of(last)[1])
    assert one is not None and one.state == LOST


def test_an_entry_takes_no_more_memory_than_is_said() -> None:
    import tracemalloc

    most = 100_000
    tracemalloc.start()
    seen, dice = Seen(most), random.Random(2)
    for _ in range(most // 500 * 3):
        hashes = dice.randbytes(16 * 500)
        seen.stored(1e6, hashes, hashes)
        seen.evicted(1e6, 0, hashes, 2)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used < most * ENTRY_BYTES, used / most


def test_copies_and_texts_stay_within_their_memory() -> None:
    import tracemalloc

    tracemalloc.start()
    accounts, dice = Accounts(Events(), CHUNK, lambda: 1e6, lambda: 1e9, 32 << 20), random.Random(3)
    for number in range(20_000):
        for kind in ("load", "store"):
            accounts.copied(
                "an engine", f"chatcmpl-{number:032x}-{number:08x}", kind, 100_000 + number, 1.5 + number, 0
            )
        accounts.differs("an engine", f"chatcmpl-{number:032x}-{number:08x}", 1_000_000 + number)
        accounts._twin_of(Event("answered", 0, 1, text=dice.randbytes(8)), [dice.randrange(1 << 63)])
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(accounts._copies) == (1 << 20) // 800 and len(accounts._texts) == (1 << 20) // 400
    assert len(accounts._positions) == (1 << 19) // 300
    assert used < 5 << 19, used


def test_records_keep_the_latest_and_page() -> None:
    kept = Records(100_000)
    for number in range(1, 2001):
        missed = {"evicted": 16} if number % 2 else {}
        kept.add(Record(number, f"id-{number}-x", float(number), "e", "m", 0, 16, 16, 0.0, {}, missed))
    assert kept.bytes <= 100_000 and sum(map(sys.getsizeof, kept.blocks()[0])) < 256 * 400
    page, rest = select(kept.blocks(), limit=10)
    assert [one.number for one in page] == list(range(2000, 1990, -1)) and rest == 1991
    page, _ = select(kept.blocks(), limit=10, before=rest, misses=True)
    assert [one.number for one in page] == list(range(1989, 1970, -2))
    page, rest = select(kept.blocks(), since=1995.0)
    assert [one.number for one in page] == list(range(2000, 1994, -1)) and not rest
    page, _ = select(kept.blocks(), request="id-1999")
    assert [one.number for one in page] == [1999]
    pauses: list[int] = []
    assert select(kept.blocks(), request="d-1999", pause=lambda: pauses.append(1)) == ([], 0)
    assert len(pauses) == len(kept.blocks()) > 1, "a search of all records does not keep Python's lock"


def kept(most_bytes: int = 1 << 20, tiers: tuple[str, ...] = ("disk",)) -> tuple[Events, Accounts]:
    """Accounts that remember, and the stream that they listen to."""
    events = Events()
    return events, Accounts(events, CHUNK, lambda: 100.0, lambda: 1e9, most_bytes, dict(enumerate(tiers)))


def tell_stored(events: Events, hashes: bytes) -> None:
    events.tell(Event("stored", 0, len(hashes) // 16, process=1, hashes=hashes, parents=bytes(16) + hashes[:-16]))


def told(events: Events, accounts: Accounts, hashes: bytes, found: int = 0, why: str = "absent", **more: Any) -> Record:
    """The record of a lookup that found so many leading chunks in L1, and no more for this reason."""
    events.tell(Event("missed", 0, 1, why, 1))
    events.tell(Event("answered", 0, len(hashes) // 16, "", 1, "", "r", hashes=hashes, found=found, **more))
    assert not events.counters["failed_effects"]
    return select(accounts.records.blocks(), limit=1)[0][0]


def test_a_beginning_that_is_in_l1_for_longer_than_is_remembered_was_stored_all_the_same() -> None:
    events, accounts = kept()
    trunk = chain(1, 10)
    tell_stored(events, trunk)
    for number in range(50):
        tell_stored(events, chain(100 + number, 100))
    one = told(events, accounts, trunk + chain(2, 5), found=10)
    assert (one.missed, one.reason, one.chunk) == ({"differs": 80}, "differs", 10)
    assert told(events, accounts, chain(3, 5)).reason == "never_seen"


def tell_fetched(events: Events, hashes: bytes, outcome: str, planned: dict[int, int], arrived: int = 0) -> None:
    fetch = FetchRecord(hashes[-16:], 0, len(hashes) // 16, 0, None, ("r",), Counter(planned))
    fetch.outcome, fetch.arrived_chunks, fetch.ended = outcome, arrived, 100.0
    events.tell(Event("fetched", 0, fetch.asked_chunks, outcome, request="r", fetch=fetch))


def test_too_many_waiting_lookups_are_a_reason() -> None:
    events, accounts = kept()
    hashes = chain(1, 4)
    tell_stored(events, hashes)
    events.tell(Event("evicted", 0, 4, hashes=hashes, wanted_by=0))
    tell_fetched(events, hashes, "too many", {})
    assert told(events, accounts, hashes).missed == {"tier_busy": 64}


def test_requests_of_two_engines_may_have_the_same_id() -> None:
    events, accounts = kept()
    mine, theirs = chain(1, 4), chain(2, 4)
    for hashes in (mine, theirs):
        tell_stored(events, hashes)
        events.tell(Event("evicted", 0, 4, hashes=hashes, wanted_by=0))
    tell_fetched(events, theirs, "too many", {})
    assert told(events, accounts, mine).missed == {"evicted": 64}, "it is not the other one's fetch"
    for engine, tokens in (("one", 16), ("two", 32)):
        accounts.copied(engine, "r", "load", tokens, 1.0, 0)
    assert accounts.copies_of([("two", "r"), ("three", "r")]) == {("two", "r"): {"load": (32, 1.0)}}


def test_an_answer_that_is_told_later_ends_no_wait_of_the_same_name() -> None:
    """An engine may give the next request the id of one that has just ended with a hit."""
    events, accounts = kept()
    first, second = chain(1, 4), chain(2, 4)
    events.tell(Event("waits", 0, 4, process=1, request="r", hashes=second))
    events.tell(Event("answered", 0, 4, "later", 1, "", "r", hashes=first, found=4))
    assert accounts.is_uncounted(1, "r") and accounts.requested == 64
    events.tell(Event("answered", 0, 4, "", 1, "", "r", hashes=second, found=4))
    assert not accounts.waiting and accounts.requested == 128


def test_a_lookup_whose_answer_fails_is_not_accounted_for(folders: Callable[[str], Path]) -> None:
    with server_parts(folders, 32 << 20) as (service, _):

        def ask() -> object:
            service.l1.join(900, "one")
            space = service.l1.open_space(900, bytes(16), 1, 0, 4096)
            peer: Any = SimpleNamespace(process=900, held_bytes=0, role="scheduler", who="a test")
            answers: list[Any] = []

            def reply(answer: m.Message, frames: Any) -> None:
                answers.append(answer)
                if len(answers) == 1:
                    raise ValueError("the test")

            service.handle(peer, m.Lookup(space, chain(1, 4)), [], reply)
            assert isinstance(answers[1], m.Error)
            service.handle(peer, m.Ping(), [], reply)
            return service.accounts.requested

        assert service.loop.ask(ask) == 0


def test_what_another_engine_owes_after_a_tier_has_delivered_is_not_the_tiers_fault() -> None:
    for arrived, outcome, reason in (
        (4, "late", "awaited_in_vain"),
        (4, "patience", "awaited_in_vain"),
        (3, "late", "tier_slow"),
    ):
        events, accounts = kept()
        hashes = chain(1, 8)
        tell_fetched(events, hashes, outcome, {0: 4, AWAITED: 4}, arrived)
        assert told(events, accounts, hashes, found=arrived).missed == {reason: 16 * (8 - arrived)}, outcome


def test_only_what_is_stored_under_another_name_is_told() -> None:
    hashes, other = chain(1, 4), chain(2, 4)
    fates = {
        "stored": "other_identity",
        "evicted": "never_seen",
        "cleared": "never_seen",
        "dropped": "never_seen",
    }
    for fate, reason in fates.items():
        events, accounts = kept()
        told(events, accounts, hashes, text=b"the same")
        if fate != "dropped":
            tell_stored(events, hashes)
        if fate != "stored":
            events.tell(Event(fate, 0, 4, process=1, hashes=hashes))
        one = told(events, accounts, other, text=b"the same")
        assert (one.reason, bool(one.twin)) == (reason, fate == "stored"), fate


def test_a_tier_that_is_named_as_another_source_loses_no_tokens() -> None:
    events, accounts = kept(tiers=("engine",))
    hashes = chain(1, 8)
    events.tell(Event("waits", 0, 4, "", 1, "", "r", hashes=hashes))
    events.tell(Event("stored", 0, 8, tier="engine", hashes=hashes, parents=bytes(16) + hashes[:-16]))
    told(events, accounts, hashes, found=8, have=2)
    assert accounts.requested == 128 == accounts.found.total()


def test_a_lookup_that_waits_and_never_asks_again_is_forgotten() -> None:
    events, now = Events(), [100.0]
    accounts = Accounts(events, CHUNK, lambda: now[0], lambda: 1e9, 1 << 20)
    given_up, hashes = chain(1, 4), chain(2, 4)
    for number, one in enumerate((given_up, hashes)):
        events.tell(Event("waits", 0, 4, "", 1, hashes=one))
        now[0] += 500.0 * (1 - number)
    tell_stored(events, hashes)
    told(events, accounts, hashes, found=4)
    assert len(accounts.waiting) == 2 and accounts._arrived
    now[0] += 101.0
    told(events, accounts, hashes, found=4)
    assert len(accounts.waiting) == 1, "the one that waits for less than ten minutes"
    now[0] += 500.0
    told(events, accounts, hashes, found=4)
    assert not accounts.waiting and not accounts._arrived


def test_with_no_memory_it_only_counts() -> None:
    events = Events()
    accounts = Accounts(events, CHUNK, lambda: 1.0, lambda: 2.0)
    keys = chain(1, 3)
    events.emit("missed", 0, 2, "absent", (1, "", "r"), lambda event: event)
    events.tell(Event("answered", 0, 3, "", 1, "", "r", hashes=keys, found=1, tokens=50))
    assert accounts.requested == 50 and +accounts.found == {"l1": 16}
    assert +accounts.missed == {"not_found": 32, "below_chunk": 2} and not accounts.records.count
    assert set(accounts.missed) == set(REASONS)
    assert not events.named - {"stored"}


def test_why_explains_to_people(server: Servers, engine: Engines, capsys: pytest.CaptureFixture[str]) -> None:
    cache = server(chunk=CHUNK)
    bed, url = Bed(engine(cache), name="one"), f"http://127.0.0.1:{cache.http_port}"
    ids = list(range(100))
    bed.requests.find(bed.open("cmpl-1-0-abcd"), ids)
    bed.store(bed.requests.open["cmpl-1-0-abcd"], ids)
    bed.requests.find(bed.open("cmpl-2-0-abcd"), ids[:40] + [7] * 60)
    bed.requests.find(bed.open("short"), ids[:10])
    eventually(lambda: totals(cache)[0] == 210)

    def said(*words: str) -> str:
        main(["why", *words, "--url", url])
        return capsys.readouterr().out

    first = said("cmpl-1")
    assert (
        "0 of 100 tokens found" in first
        and "96 tokens missing: never_seen" in first
        and "4 tokens missing: below" in first
    )
    eventually(lambda: why(cache, "cmpl-1-0-abcd")["copies"])
    assert "The engine stored 96 tokens in" in said("cmpl-1-0-abcd")
    second = said("cmpl-2-0")
    assert "32 tokens from L1" in second and "has the tokens 32 to 47" in second and "differs" in second
    assert "10 tokens missing: below_chunk" in said("short")
    summary = said("--summary")
    assert summary.index("never_seen") < summary.index("differs") < summary.index("below_chunk")
    assert "210 tokens were looked up since" in summary and "210 tokens were looked up in" in said(
        "--summary", "--since", "1h"
    )
    assert main(["why", "nobody", "--url", url]) == 1 and "No record" in capsys.readouterr().out
    assert main(["why", "--since", "soon", "--url", url]) == 2
    for wrong in (["cmpl-1"], ["--last", "3"], ["--misses"]):
        assert main(["why", "--summary", *wrong, "--url", url]) == 2, "it would be about all requests all the same"
    assert "leave out REQUEST_ID" in capsys.readouterr().err


def test_a_request_whose_wait_takes_too_long_is_counted_once(server: Servers, engine: Engines) -> None:
    cache = server(chunk=CHUNK)
    one, two = (Bed(engine(cache, name), name=name) for name in ("one", "two"))
    one.requests.prefill.tokens_per_second = two.requests.prefill.tokens_per_second = 1.0
    ids = list(range(64))
    one.requests.find(one.open("first"), ids)
    second = two.open("second")
    assert isinstance(two.requests.find(second, ids), Loading), "for what the other engine computes"
    two.requests.finish("second")
    second = two.open("second")
    assert two.requests.find(second, ids, wait=True, wait_seconds=-1.0) is None, "no longer"
    one.requests.finish("first")
    two.now += 10.0
    two.requests.find(second, ids, wait=True)
    two.requests.finish("second")
    assert totals(cache)[0] == 128, "both once"


def test_hits_that_are_accounted_for_later_keep_no_extents(folders: Callable[[str], Path]) -> None:
    with server_parts(folders, 32 << 20) as (service, _):
        hashes, found = chain(1, 1000), list[Any]()

        def ask() -> list[Any]:
            l1 = service.l1
            l1.join(900, "one")
            space = l1.open_space(900, bytes(16), 1, 0, 4096)
            l1.commit(0.0, 900, l1.reserve(0.0, 900, space, 0, b"", True, hashes).reservation, True)
            peer: Any = SimpleNamespace(process=900, held_bytes=0, role="scheduler")
            service.handle(peer, m.Lookup(space, hashes), [], lambda answer, frames: found.append(answer))
            return [part for call in service.loop._idle for part in call.args]  # type: ignore[attr-defined]

        kept = service.loop.ask(ask)
        assert found[0].chunks == 1000 and len(found[0].extents) == 4000
        assert 1000 in kept and not any(isinstance(part, tuple) for part in kept)


def test_a_summary_says_that_older_records_are_lost(server: Servers, capsys: pytest.CaptureFixture[str]) -> None:
    cache = server(chunk=CHUNK, flags=("--records-mb", "0.02"))
    raw, said = Raw(cache), list[str]()
    for number in range(600):
        raw.ask(m.Lookup(raw.space, b"", request=f"r{number}", tokens=3))
        if number in (99, 599):
            assert main(["why", "--summary", "--since", "1h", "--url", f"http://127.0.0.1:{cache.http_port}"]) == 0
            said.append(capsys.readouterr().out)
    raw.close()
    assert "300 tokens were looked up" in said[0] and "overwritten" not in said[0]
    assert "overwritten" in said[1]


def test_array_has_eight_bytes_a_number() -> None:
    assert array("Q").itemsize == 8
