"""The use of L1 by tenant: in the heart, and over HTTP on a real server with an engine. Salts are never shown."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from engine_process import Engine
from lmcache.cache import Heart
from lmcache.cache import tenants as of_tenants
from lmcache.cache.accounts import Account
from lmcache.cache.tenants import Tenants
from lmcache.chunks import tenant_of
from lmcache.cli.main import main
from lmcache.server import usage
from lmcache.server.usage import SHOWN, Row
from servers import Server, eventually
from test_operating import CHUNK, ask, call, prompt

StartServer = Callable[..., Server]
StartEngine = Callable[..., Engine]
SECTOR = 4096


def account(tenant: bytes, first: bytes = b"", tokens: int = 100, found: int = 0, space: int = 0) -> Account:
    return Account(1, "", 0.0, tokens, {"l1": found} if found else {}, {}, None, space, tenant, first)


class Parts:
    """A heart that holds prompts of tenants."""

    def __init__(self, chunks: int = 4096, reach: int = 0) -> None:
        self.heart, self.tenants, self.dice = Heart(chunks * SECTOR), Tenants(), random.Random(3)
        self.heart.join(1, "engine")
        self.space = self.heart.open_space(1, b"space".ljust(16), 1, 0, SECTOR)
        self.window = -1
        if reach:
            self.window = self.heart.open_space(
                1, b"window".ljust(16), 1, 0, SECTOR, reach_chunks=reach, main=self.space
            )

    def store(self, hashes: bytes, tenant: bytes | None = None, space: int | None = None) -> None:
        grant = self.heart.reserve(0.0, 1, self.space if space is None else space, 0, b"", True, hashes)
        assert not grant.refused
        self.heart.commit(0.0, 1, grant.reservation, True)
        if tenant is not None:
            self.tenants.accounted(account(tenant, hashes[:16]))

    def prompt(self, chunks: int) -> bytes:
        return self.dice.randbytes(16 * chunks)

    def counted(self, meanwhile: Callable[[], None] = lambda: None) -> dict[tuple[int, bytes], int]:
        counts = Counter[tuple[int, bytes]]()
        for _ in self.tenants.count_chunks(self.heart.spaces, counts):
            meanwhile()
        return dict(counts)


def test_each_chunk_counts_for_the_tenant_of_its_first_chunk() -> None:
    one, ours, theirs = Parts(), tenant_of("ours"), tenant_of("theirs")
    shared = one.prompt(10)
    one.store(shared, ours)
    one.store(shared + one.prompt(5), ours)
    one.store(shared[:64] + one.prompt(3))
    one.store(one.prompt(7), theirs)
    one.store(one.prompt(2), b"")
    one.store(one.prompt(4))
    space = one.space
    assert one.counted() == {(space, ours): 18, (space, theirs): 7, (space, b""): 6}
    one.heart.clear()
    assert one.counted() == {}


def test_a_window_counts_for_the_tenant_of_the_prompt() -> None:
    one, ours = Parts(reach=2), tenant_of("ours")
    hashes = one.prompt(6)
    one.store(hashes, ours)
    one.store(hashes[-48:], space=one.window)
    one.store(one.prompt(1), space=one.window)
    assert one.counted() == {(one.space, ours): 6, (one.window, ours): 3, (one.window, b""): 1}


def test_counting_takes_steps_of_bounded_work_while_chunks_come_and_go() -> None:
    one, steps = Parts(), 0
    for number in range(100):
        one.store(one.prompt(40), tenant_of(str(number % 3)))

    def more() -> None:
        nonlocal steps
        steps += 1
        one.store(one.prompt(40), tenant_of("3"))  # evicts others, whose records it gets

    counts = one.counted(more)
    assert steps >= 4000 / of_tenants._STEPS and sum(counts.values()) >= 3000
    assert set(counts) <= {(one.space, tenant_of(str(number))) for number in range(4)}, counts
    assert one.counted(one.heart.clear), "a clear amid the count ends it"


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_tenants, "MOST_TENANTS", 8)
    monkeypatch.setattr(of_tenants, "MOST_BEGINNINGS", 8)
    one = Tenants()
    for number in range(100):
        one.accounted(account(tenant_of(str(number)), number.to_bytes(16, "little"), 10, 4))
    assert len(one.uses) == len(one._beginnings) == 8
    assert (one.others.requests, one.others.requested_tokens, one.others.found_tokens) == (92, 920, 368)
    assert one.of_beginning((99).to_bytes(16, "little")) == tenant_of("99")
    assert one.of_beginning(bytes(16)) == b""


def test_the_report_shows_those_that_use_most_and_sums_up_the_others() -> None:
    rows = {("m", tenant_of(str(number))): Row(1, 10 * number, number, 1, 4096) for number in range(50)}
    rows["m", tenant_of("large")] = Row(0, 0, 0, 1000, 1000 * 4096)
    told: Any = usage._report(dict(rows), Row(5, 50, 0), None)
    assert len(told["tenants"]) == SHOWN == 20 and told["tenants"][0]["tenant"] == tenant_of("large").hex()
    assert told["other"]["rows"] == 31
    for name in ("requests", "requested_tokens", "found_tokens", "chunks", "bytes"):
        whole = sum(getattr(row, name) for row in (*rows.values(), Row(5, 50, 0)))
        assert sum(row[name] for row in told["tenants"]) + told["other"][name] == whole
    told = usage._report(dict(rows), Row(), tenant_of("0"))
    assert [row["tenant"] for row in told["tenants"]] == [tenant_of("0").hex()] and "other" not in told


def test_many_tenants_never_hold_up_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0

    class Counted(Row):
        def __init__(self, *values: int, **named: int) -> None:
            nonlocal made
            made += 1
            super().__init__(*values, **named)

    def run(call: Callable[[], Any]) -> Any:
        nonlocal made
        made = 0
        result = call()
        assert made <= usage._AT_ONCE + 1, f"{made} rows in one call of the loop"
        return result

    one = Parts()
    for number in range(300):
        one.store(one.prompt(1), tenant_of(str(number)))
    monkeypatch.setattr(usage, "Row", Counted)
    loop: Any = SimpleNamespace(ask=run, now=lambda: 0.0)
    service: Any = SimpleNamespace(tenants=one.tenants, l1=one.heart, model_of=lambda space: f"model {space}")
    told: Any = usage.usage(loop, service, None)
    assert told["other"]["rows"] == 280 and told["other"]["chunks"] == told["other"]["requests"] == 280
    assert {row["model"] for row in told["tenants"]} == {f"model {one.space}"}


def test_an_id_tells_salts_apart_and_is_the_same_everywhere() -> None:
    assert tenant_of("") == b"" and len({tenant_of(salt) for salt in ("a", "b", "\ud800", "a" * 5000)}) == 4
    assert tenant_of("a").hex() == "331745e740186587"


def test_a_server_tells_it_over_http_and_on_the_command_line(
    server: StartServer, engine: StartEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = server(l1=4, chunk=CHUNK)
    one, salt = engine(cache), "a-salt-that-nobody-may-see"
    assert one.scheduler is not None

    def use(salt: str, seed: int, tokens: int) -> None:
        chain = one.scheduler.new_chain(salt, tenant=tenant_of(salt))
        chain.extend(prompt(seed, tokens))
        one.scheduler.lookup(chain, request_id=f"{salt} {seed}", tokens=tokens)
        assert one.store(prompt(seed, tokens), chain=chain) == tokens
        one.scheduler.release(one.scheduler.lookup(chain, request_id=f"{salt} {seed} again", tokens=tokens))

    use(salt, 1, 160)
    use("", 2, 320)

    def told() -> Any:
        return ask(cache, "GET", "/cache/usage")

    rows = eventually(lambda: len(rows := told()["tenants"]) == 2 and rows[1]["found_tokens"] and rows)
    model = rows[0]["model"]
    chunk = rows[0]["bytes"] // 20
    want = {"model": model, "requests": 2}
    assert rows == [
        {**want, "tenant": "", "requested_tokens": 640, "found_tokens": 320, "chunks": 20, "bytes": 20 * chunk},
        {**want, "tenant": tenant_of(salt).hex(), "requested_tokens": 320, "found_tokens": 160, "chunks": 10,
         "bytes": 10 * chunk},
    ]  # fmt: skip
    assert told()["counted_all"] is True and told()["other"]["rows"] == 0
    assert salt not in call(cache, "GET", "/cache/usage").text
    assert ask(cache, "GET", f"/cache/usage?tenant={tenant_of(salt).hex()}")["tenants"] == rows[1:]
    assert ask(cache, "GET", "/cache/usage?tenant=")["tenants"] == rows[:1]
    for query in ("tenant=x", "tenants=", f"tenant={salt}"):
        refused = call(cache, "GET", f"/cache/usage?{query}")
        assert refused.status_code == 400, refused.text
    assert call(cache, "GET", "/cache/usage", headers={"Origin": "http://evil.example"}).status_code == 403

    words = "kvcache", "usage", "--url", f"http://127.0.0.1:{cache.http_port}", "--by", "tenant"
    assert main([*words]) == 0
    said = capsys.readouterr().out
    assert tenant_of(salt).hex() in said and "(no cache_salt)" in said and salt not in said and "50.0 % found" in said
    assert main([*words, "--cache-salt", salt, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tenants"] == rows[1:]
    assert main([*words, "--cache-salt", "unknown"]) == 0
    assert "Nothing is known" in capsys.readouterr().out


def test_passages_count_for_the_tenant_of_their_prompt(server: StartServer, engine: StartEngine) -> None:
    """Their lookups are none of a prompt's, so nothing is added to what the tenant has asked for."""
    cache = server(l1=4, chunk=CHUNK)
    one, tenant = engine(cache), tenant_of("salt")
    assert one.scheduler is not None
    chain = one.scheduler.new_chain("salt", passage="donor", tenant=tenant)
    chain.extend(prompt(1, 160))
    assert one.scheduler.lookup(chain, passage=True, tokens=160) is None
    assert one.store(prompt(1, 160), chain=chain) == 160
    (row,) = eventually(lambda: ask(cache, "GET", "/cache/usage")["tenants"])
    assert (row["tenant"], row["chunks"], row["requests"], row["requested_tokens"]) == (tenant.hex(), 10, 0, 0)
