"""The S3 tier on a real SeaweedFS: objects, credentials, the cap and its janitor, and stores that let it down."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, ItemsView, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import obstore
import pytest

from lmcache.errors import ConfigError
from lmcache.testing.conformance import ConformanceSuite, EncodedSuite
from lmcache.tiers import ABSENT, KEPT, OK, ShardKey, Tier, TierError, frame
from lmcache.tiers.object_store.accounting import Accounting, pack_uses, unpack_uses
from lmcache.tiers.object_store.client import MULTIPART_BYTES, MULTIPART_FROM_BYTES, Client, Listed
from lmcache.tiers.object_store.s3 import S3Tier
from lmcache.tiers.object_store.tier import RANGE_BYTES
from lmcache.tiers.registry import make_tier
from proxy import Proxy
from servers import PATIENCE, beside, eventually
from stores import ACCESS, READER, READER_SECRET, SECRET, Seaweed, load, shards_of, tier_of

pytestmark = [pytest.mark.xdist_group("s3"), pytest.mark.usefixtures("credentials")]
MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def opened(seaweed: Seaweed) -> Iterator[Callable[..., S3Tier]]:
    """Tiers: opened(prefix, options, port=, bucket=), closed at the end."""
    made: list[S3Tier] = []

    def make(prefix: str, options: str = "", **more: object) -> S3Tier:
        tier = tier_of(seaweed.url(prefix, options, **more))  # type: ignore[arg-type]
        assert isinstance(tier, S3Tier)
        made.append(tier)
        return tier

    yield make
    for tier in made:
        tier.close()


def listing(seaweed: Seaweed, prefix: str) -> dict[str, int]:
    """Name behind the prefix -> bytes, as S3 lists it."""
    found = obstore.list(seaweed.store(), prefix + "/").collect()
    return {one["path"].removeprefix(prefix + "/"): one["size"] for one in found}


# ---- objects


def test_an_object_is_one_frame_and_nothing_else_is_written(seaweed: Seaweed, opened: Callable[..., S3Tier]) -> None:
    tier = opened("plain/deep")
    sizes = [0, 1, 5000, RANGE_BYTES, RANGE_BYTES + 1, 2 * RANGE_BYTES + 77]
    shards = [shards_of(1, size)[0] for size in sizes]
    assert load(tier, shards) == [ABSENT] * len(sizes)
    assert tier.store(shards) == [OK] * len(sizes)
    assert tier.store(shards) == [KEPT] * len(sizes)
    assert tier.contains([shard.key for shard in shards] + [shards_of(1, 1)[0].key]) == [True] * len(sizes) + [False]
    assert load(tier, shards) == [OK] * len(sizes)
    assert listing(seaweed, "plain/deep") == {
        shard.key.text: frame.HEADER_BYTES + size for shard, size in zip(shards, sizes, strict=True)
    }
    stored = bytes(obstore.get(seaweed.store(), f"plain/deep/{shards[2].key.text}").bytes())
    assert frame.check(stored[:128], memoryview(stored)[128:], shards[2].key) == OK


@pytest.mark.parametrize("connections", [1, 6], ids=["ranges one by one", "ranges side by side"])
def test_damage_in_any_range_is_found(seaweed: Seaweed, opened: Callable[..., S3Tier], connections: int) -> None:
    """The checksum is taken of each range as it arrives, or when those before it are there."""
    tier, shards = opened(f"ranges{connections}", f"&connections={connections}"), shards_of(4, 2 * RANGE_BYTES + 77)
    assert tier.store(shards) == [OK] * 4
    name = f"ranges{connections}/{{}}".format
    for shard, at in zip(shards, (1000, RANGE_BYTES + 1000, 2 * RANGE_BYTES + 70), strict=False):
        stored = bytearray(obstore.get(seaweed.store(), name(shard.key.text)).bytes())
        stored[frame.HEADER_BYTES + at] ^= 1
        obstore.put(seaweed.store(), name(shard.key.text), bytes(stored))
    assert load(tier, shards) == [frame.CHECKSUM] * 3 + [OK]
    assert load(tier, shards) == [ABSENT] * 3 + [OK]


def test_what_was_appended_to_an_object_is_damage(seaweed: Seaweed, opened: Callable[..., S3Tier]) -> None:
    tier, (shard,) = opened("longer"), shards_of(1, 5000)
    assert tier.store([shard]) == [OK]
    stored = bytes(obstore.get(seaweed.store(), f"longer/{shard.key.text}").bytes())
    obstore.put(seaweed.store(), f"longer/{shard.key.text}", stored + b"more")
    assert load(tier, [shard]) == [frame.OTHER_SIZE] and load(tier, [shard]) == [ABSENT]


def test_a_large_shard_goes_in_parts_and_comes_in_ranges(
    seaweed: Seaweed, opened: Callable[..., S3Tier], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, ranges = opened("parts"), list[int]()
    sizes = (RANGE_BYTES, MULTIPART_FROM_BYTES + 12345)
    shards = [shards_of(1, size)[0] for size in sizes]
    read = tier._client.read

    def counted(
        path: str, start: int, memories: list[memoryview], arrived: Callable[[memoryview], None] | None
    ) -> object:
        ranges.append(sum(map(len, memories)))
        return read(path, start, memories, arrived)

    monkeypatch.setattr(tier._client, "read", counted)
    assert tier.store(shards) == [OK, OK] and load(tier, shards) == [OK, OK]
    assert len(ranges) == 1 + 9 and max(ranges) == frame.HEADER_BYTES + RANGE_BYTES
    tags = [str(obstore.head(seaweed.store(), f"parts/{shard.key.text}")["e_tag"]) for shard in shards]
    parts = -(-(sizes[1] + frame.HEADER_BYTES) // MULTIPART_BYTES)
    assert "-" not in tags[0] and tags[1].endswith(f'-{parts}"'), "S3 names the parts of an upload in its tag"
    tier.clear()


def test_nothing_is_listed_where_somebody_waits(opened: Callable[..., S3Tier], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cap too, once the start has taken stock; and room is made without it."""
    tier, listed = opened("unlisted", "&max_gb=0.01&sweep=1000000"), list[str]()
    monkeypatch.setattr(obstore, "list", lambda *arguments, **more: listed.append("again") or [])
    shards = shards_of(14, MIB)
    for shard in shards:
        assert tier.store([shard]) == [OK]
    assert tier.contains([shard.key for shard in shards]) == [False] * 4 + [True] * 10
    assert load(tier, shards[-10:] + shards_of(2, 100)) == [OK] * 10 + [ABSENT] * 2
    tier.remove([shards[-1].key])
    assert tier.usage().shards >= 8 and not listed


def test_clear_leaves_the_objects_of_others(seaweed: Seaweed, opened: Callable[..., S3Tier]) -> None:
    tier, beside = opened("clear", "&max_gb=1"), opened("clear/other")
    shards = shards_of(4, 1000)
    tier.store(shards)
    beside.store(shards)
    obstore.put(seaweed.store(), "clear/notes.txt", b"not ours")
    tier.clear()
    assert tier.contains([shard.key for shard in shards]) == [False] * 4 and tier.usage().stored_bytes == 0
    assert set(listing(seaweed, "clear")) == {"notes.txt", *(f"other/{shard.key.text}" for shard in shards)}


# ---- the cap


def test_a_clear_ends_when_the_tier_is_closed(opened: Callable[..., S3Tier], monkeypatch: pytest.MonkeyPatch) -> None:
    tier, list_all = opened("cleared", "&max_gb=0.01&sweep=600"), Client.list
    tier.store(shards_of(3, 1000))
    begun, go_on = threading.Event(), threading.Event()

    def held_up(self: Client) -> Iterator[Listed]:
        begun.set()
        assert go_on.wait(PATIENCE)
        yield from list_all(self)

    monkeypatch.setattr(Client, "list", held_up)
    clear = beside(tier.clear)
    assert begun.wait(PATIENCE)
    close = beside(tier.close)
    assert tier._closing.wait(PATIENCE)
    go_on.set()
    with pytest.raises(TierError, match="before all was removed"):
        clear.result(PATIENCE)
    close.result(PATIENCE)
    tier.open()
    assert tier.usage().shards == 3
    tier.clear()
    assert tier.usage().shards == 0


def test_recency_and_size_outlive_a_server_that_was_killed(seaweed: Seaweed, opened: Callable[..., S3Tier]) -> None:
    """What a sweep has written is enough; nothing is said goodbye to."""
    options = "&max_gb=0.01&sweep=0.2"
    first = opened("restart", options)
    shards = shards_of(9, MIB)
    assert first.store(shards) == [OK] * 9
    load(first, shards[:2])
    latest = first._accounting.uses()[shards[0].key.packed]
    eventually(lambda: _written_uses(seaweed, "restart").get(shards[0].key.packed) == latest)
    first._closing.set()  # as after a kill: no more sweeps, no farewell
    second = opened("restart", options)
    assert second.usage().shards == 9
    assert second.store(shards_of(3, MIB)) == [OK] * 3
    assert second.contains([shard.key for shard in shards[:5]]) == [True, True, False, False, True]


def _written_uses(seaweed: Seaweed, prefix: str) -> dict[bytes, int]:
    uses: dict[bytes, int] = {}
    for name in listing(seaweed, prefix):
        if name.startswith("_lmcache/uses/"):
            uses |= unpack_uses(bytes(obstore.get(seaweed.store(), f"{prefix}/{name}").bytes()), 1 << 60)
    return uses


def test_two_servers_above_the_cap_are_trimmed_by_one_janitor(seaweed: Seaweed, opened: Callable[..., S3Tier]) -> None:
    """Each writes by its own count; bound = max_gb + what others wrote since the last sweep."""
    cap = int(0.01 * GIB)
    tiers = [opened("shared", "&max_gb=0.01&sweep=0.3") for _ in range(2)]
    for _ in range(8):
        for tier in tiers:
            assert tier.store(shards_of(1, MIB)) == [OK]
    eventually(lambda: sum(listing(seaweed, "shared").values()) <= cap)
    lease = bytes(obstore.get(seaweed.store(), "shared/_lmcache/janitor").bytes()).decode()
    assert sum(tier._identity in lease for tier in tiers) == 1
    eventually(lambda: all(tier.usage().stored_bytes <= cap and tier.usage().shards <= 10 for tier in tiers))
    # the janitor goes, and the other one takes over
    janitor = next(tier for tier in tiers if tier._identity in lease)
    other = next(tier for tier in tiers if tier is not janitor)
    janitor.close()
    eventually(
        lambda: other._identity.encode() in bytes(obstore.get(seaweed.store(), "shared/_lmcache/janitor").bytes())
    )


def test_what_a_sweep_finds_while_room_is_made_makes_no_store_fail(
    opened: Callable[..., S3Tier], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = opened("found", "&max_gb=0.01&sweep=1000")
    assert tier.store(shards_of(10, MIB)) == [OK] * 10
    remove, others = tier.remove, shards_of(8, MIB)

    def remove_and_find(keys: Sequence[ShardKey]) -> None:
        remove(keys)
        while others:
            tier._accounting.seen(others.pop().key, MIB)

    monkeypatch.setattr(tier, "remove", remove_and_find)
    assert tier.store(shards_of(1, MIB)) == [OK]
    assert not others


@pytest.mark.parametrize(
    "lease",
    [b"\xff\xfe", b"[" * 100_000, b'{"holder": "x", "until": 1%s}' % (b"0" * 400)],
    ids=["bytes", "deep", "long"],
)
def test_a_lease_that_cannot_be_read_is_nobodys(
    seaweed: Seaweed, opened: Callable[..., S3Tier], request: pytest.FixtureRequest, lease: bytes
) -> None:
    name = f"nonsense-{request.node.callspec.id}"
    obstore.put(seaweed.store(), f"{name}/_lmcache/janitor", lease)
    tier = opened(name, "&max_gb=0.01&sweep=0.1&timeout=1")
    eventually(lambda: tier._swept.is_set() or not tier._sweeper or not tier._sweeper.is_alive())
    assert tier.store(shards_of(1, MIB)) == [OK]
    assert tier._identity.encode() in bytes(obstore.get(seaweed.store(), f"{name}/_lmcache/janitor").bytes())


def test_an_unforeseen_fault_does_not_end_the_sweeper(
    opened: Callable[..., S3Tier], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier, list_all, failed = opened("unforeseen", "&max_gb=0.01&sweep=0.1"), Client.list, threading.Semaphore(0)

    def fail(self: Client) -> Iterator[Listed]:
        failed.release()
        raise RuntimeError("out of tune")

    monkeypatch.setattr(Client, "list", fail)
    assert failed.acquire(timeout=PATIENCE) and failed.acquire(timeout=PATIENCE) and failed.acquire(timeout=PATIENCE)
    monkeypatch.setattr(Client, "list", list_all)
    tier._swept.clear()
    eventually(tier._swept.is_set)
    assert [record.getMessage().count("out of tune") for record in caplog.records] == [1]


def test_a_use_elsewhere_keeps_a_shard_here(seaweed: Seaweed, opened: Callable[..., S3Tier]) -> None:
    options = "&max_gb=0.01&sweep=0.2"
    writer, reader = opened("elsewhere", options), opened("elsewhere", options)
    shards = shards_of(9, MIB)
    writer.store(shards)
    eventually(lambda: reader.usage().shards == 9)
    load(reader, shards[:1])
    used = reader._accounting.uses()[shards[0].key.packed]
    eventually(lambda: writer._accounting.uses()[shards[0].key.packed] == used)
    assert writer.store(shards_of(3, MIB)) == [OK] * 3
    assert writer.contains([shard.key for shard in shards[:3]]) == [True, False, False]


def test_what_is_being_written_while_the_store_is_listed_stays_in_the_books() -> None:
    accounting, (one, two, gone) = Accounting(), [shard.key for shard in shards_of(3, 1)]
    accounting.begin(one, 10)
    accounting.seen(gone, 5)
    with accounting.census():
        accounting.begin(two, 20)
        accounting.drop([gone])
        accounting.take_over({gone.packed: (7, 5)}, {}, 0)
    assert (accounting.stored_bytes, len(accounting)) == (30, 2)
    accounting.end(one)
    with accounting.census():
        accounting.take_over({}, {}, 0)
    assert (accounting.stored_bytes, len(accounting)) == (20, 1)


def test_books_forget_the_oldest_first_and_cost_little() -> None:
    accounting, keys = Accounting(), [shard.key for shard in shards_of(500, 1)]
    for key in keys:
        accounting.seen(key, 100)
    accounting.use(keys[:3])
    assert accounting.oldest(250, 1000) == keys[3:6]
    assert accounting.oldest(10**6, 1000) == keys[3:] + keys[2::-1]
    assert accounting.oldest(10**6, 7) == keys[3:10]
    assert accounting.oldest(0, 1000) == []
    uses = accounting.uses()
    assert unpack_uses(pack_uses(uses), 1 << 60) == uses
    assert unpack_uses(pack_uses(uses)[:-1], 1 << 60) == unpack_uses(b"something else", 1 << 60) == {}
    assert set(unpack_uses(pack_uses(uses), 5).values()) == {5}


def test_what_makes_room_looks_at_no_more_shards_than_it_takes() -> None:
    accounting, keys = Accounting(), [ShardKey.unpack(os.urandom(36)) for _ in range(20_000)]
    with accounting.census():
        accounting.take_over({key.packed: (number, 100) for number, key in enumerate(keys)}, {}, 0)
    steps = 0

    def step(*_: object) -> None:
        nonlocal steps
        steps += 1

    sys.setprofile(step)
    try:
        oldest = accounting.oldest(500, 1000)
    finally:
        sys.setprofile(None)
    assert oldest == keys[:5] and steps < 100


def test_loads_and_stores_do_not_wait_while_a_listing_is_taken_over() -> None:
    accounting, keys = Accounting(), [ShardKey.unpack(os.urandom(36)) for _ in range(6)]
    first, second, third, gone, fresh, unlisted = keys
    with accounting.census():
        for key in keys[:4]:
            accounting.seen(key, 10)

        def work() -> None:
            accounting.begin(fresh, 20)
            accounting.seen(unlisted, 5)
            accounting.use([first])
            accounting.drop([gone])

        class Listing(dict[bytes, tuple[int, int]]):
            def items(self) -> ItemsView[bytes, tuple[int, int]]:
                worker = threading.Thread(target=work, daemon=True)
                worker.start()
                worker.join(PATIENCE)
                assert not worker.is_alive(), "the books were locked"
                return super().items()

        accounting.take_over({key.packed: (number, 10) for number, key in enumerate(keys[:4])}, {}, 0)
    with accounting.census():
        accounting.take_over(
            Listing({key.packed: (number, 10) for number, key in enumerate(keys[:4])}), {third.packed: 1 << 42}, 3
        )
    assert (accounting.stored_bytes, len(accounting), accounting.other_bytes) == (55, 5, 3)
    assert accounting.oldest(10**6, 10) == [second, third, fresh, unlisted, first]


def test_shards_that_are_missed_or_gone_leave_nothing_in_the_books() -> None:
    """Also where nothing is ever listed, as without a cap."""
    accounting, keys = Accounting(), [ShardKey.unpack(os.urandom(36)) for _ in range(2000)]
    with pytest.raises(TierError), accounting.census():
        raise TierError("unreachable", "the listing failed")

    def come_and_go() -> None:
        for key in keys:
            accounting.begin(key, 10)
            accounting.end(key)
            accounting.use([key])
            accounting.drop([key])

    come_and_go()
    tracemalloc.start()
    try:
        for _ in range(2):
            keys = [ShardKey.unpack(os.urandom(36)) for _ in range(2000)]
            come_and_go()
        keys.clear()
        assert tracemalloc.get_traced_memory()[0] < 200_000
    finally:
        tracemalloc.stop()


def test_a_shard_in_the_books_takes_at_most_200_bytes() -> None:
    """Without what has been used of late, which is forgotten after some sweeps."""
    count, accounting = 50_000, Accounting()
    keys = [ShardKey.unpack(os.urandom(36)) for _ in range(count)]
    tracemalloc.start()
    try:
        with accounting.census():
            accounting.take_over({key.packed: (number, 1 << 20) for number, key in enumerate(keys)}, {}, 0)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(accounting) == count and size <= 200 * count


def test_without_a_cap_a_shard_that_is_used_takes_no_more() -> None:
    """Nothing is swept then, so its use would never be forgotten."""
    count, tier = 20_000, make_tier("s3://bucket?endpoint=http://127.0.0.1:1").tier
    keys = [ShardKey.unpack(os.urandom(36)) for _ in range(count)]
    tracemalloc.start()
    try:
        for key in keys:
            tier._accounting.begin(key, 1 << 20)
            tier._accounting.end(key)
            tier._accounting.use([key])
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tier.usage() == (count << 20, count, None) and size <= 200 * count, size / count


# ---- writers that are killed

WRITER = """
import sys
from stores import shards_of, tier_of
tier = tier_of(sys.argv[1])
print("ready", flush=True)
while True:
    for shard in shards_of(4, 9_000_000):
        if tier.store([shard]) == [""]:
            print(shard.key.packed.hex(), flush=True)
"""


def test_a_writer_killed_in_the_middle_of_stores_leaves_whole_shards_only(
    seaweed: Seaweed, opened: Callable[..., S3Tier]
) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", WRITER, seaweed.url("killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout and child.stdout.readline() == "ready\n"
        acknowledged = {child.stdout.readline().strip() for _ in range(3)}
        child.send_signal(signal.SIGKILL)
        child.wait()
    tier, memory = opened("killed"), memoryview(bytearray(9_000_000))
    names = listing(seaweed, "killed")
    assert all(size == 9_000_128 for size in names.values())
    for line in acknowledged:
        assert tier.load([ShardKey.unpack(bytes.fromhex(line))], [memory]) == [OK]
    tier.clear()


# ---- stores that let us down


def test_a_bucket_that_is_not_there(seaweed: Seaweed) -> None:
    with pytest.raises(TierError, match="there is no such bucket; create it") as caught:
        tier_of(seaweed.url("x", bucket="nosuchbucket"))
    assert caught.value.reason == "no bucket"


def test_wrong_credentials_and_none_are_said_without_them(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "WRONGSECRET")
    with pytest.raises(TierError, match=r"denied .403 SignatureDoesNotMatch.; check the credentials") as caught:
        tier_of(seaweed.url("x"))
    said = str(caught.value)
    assert caught.value.reason == "denied" and "WRONGSECRET" not in said and ACCESS not in said
    with pytest.raises(ConfigError, match="not the URL"):
        make_tier(f"s3://{ACCESS}:{SECRET}@kvbucket/x")


def test_credentials_come_from_a_profile(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(
        f"[default]\naws_access_key_id = {ACCESS}\naws_secret_access_key = WRONG\n"
        f"[other]\naws_access_key_id = {ACCESS}\naws_secret_access_key = {SECRET}\n"
    )
    with pytest.raises(TierError, match="SignatureDoesNotMatch"):
        tier_of(seaweed.url("profile"))
    monkeypatch.setenv("AWS_PROFILE", "other")
    tier = tier_of(seaweed.url("profile"))
    assert tier.store(shards_of(1, 10)) == [OK]
    tier.close()


def test_a_profile_that_is_missing_or_has_no_keys_is_named_with_what_to_type(
    seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_PROFILE", "prod")
    with pytest.raises(
        ConfigError, match=r"AWS_PROFILE=prod: there is no such profile in .*/credentials and .*/config$"
    ):
        make_tier(seaweed.url("profile"))
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text("[default]\naws_access_key_id = x\n")
    (tmp_path / ".aws/config").write_text("[profile dev]\nsso_session = work\n")
    with pytest.raises(ConfigError, match=r"AWS_PROFILE=prod: .*; they have default, dev"):
        make_tier(seaweed.url("profile"))
    monkeypatch.setattr(InstanceRole, "has_role", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), InstanceRole) as metadata:
        threading.Thread(target=metadata.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{metadata.server_port}")
        for profile, remedy in (
            ("dev", "dev has sso_session, which is not followed here: type `eval .*export-credentials --profile dev "),
            ("default", "export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"),
        ):
            monkeypatch.setenv("AWS_PROFILE", profile)
            with pytest.raises(TierError, match=remedy) as caught:
                tier_of(seaweed.url("profile"))
            assert caught.value.reason == "denied"
        metadata.shutdown()


def test_temporary_keys_of_a_profile_are_read_again(
    seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A tool of the user's writes new ones into the file before the former ones expire."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("lmcache.tiers.object_store.s3.REREAD_SECONDS", 0.0)
    (tmp_path / ".aws").mkdir()

    def give(secret: str, token: str) -> None:
        (tmp_path / ".aws/credentials").write_text(
            f"[default]\naws_access_key_id = {ACCESS}\naws_secret_access_key = {secret}\n{token}"
        )

    give("EXPIRED", "aws_session_token = expired\n")
    with pytest.raises(TierError, match="check the credentials") as caught:
        tier_of(seaweed.url("temporary"))
    assert caught.value.reason == "denied"
    tier = make_tier(seaweed.url("temporary")).tier
    give(SECRET, "")  # SeaweedFS knows no temporary keys
    tier.open()
    assert tier.store(shards_of(1, 10)) == [OK]
    (tmp_path / ".aws/credentials").unlink()
    with pytest.raises(TierError, match="check the credentials"):
        tier.store(shards_of(1, 20))
    give(SECRET, "")
    assert tier.store(shards_of(1, 20)) == [OK]
    tier.close()


class InstanceRole(BaseHTTPRequestHandler):
    """What a machine in the cloud is told of its role, by the second version of the protocol."""

    has_role = True

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        self.say("a token")

    def do_GET(self) -> None:
        role = "/latest/meta-data/iam/security-credentials/"
        keys = {"AccessKeyId": ACCESS, "SecretAccessKey": SECRET, "Token": "", "Expiration": "2199-01-01T00:00:00Z"}
        self.say("kv" if self.path == role else json.dumps(keys | {"Code": "Success"}))

    def say(self, text: str) -> None:
        self.send_response(200 if self.has_role else 404)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *words: object) -> None: ...


def test_credentials_come_from_the_role_of_the_instance(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with ThreadingHTTPServer(("127.0.0.1", 0), InstanceRole) as metadata:
        threading.Thread(target=metadata.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{metadata.server_port}")
        tier = tier_of(seaweed.url("role"))
        assert tier.store(shards_of(1, 10)) == [OK]
        tier.close()
        metadata.shutdown()


def test_an_instance_without_a_role_is_told_what_is_missing(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(InstanceRole, "has_role", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), InstanceRole) as metadata:
        threading.Thread(target=metadata.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{metadata.server_port}")
        with pytest.raises(TierError, match="no credentials in environment, profile or instance role") as caught:
            tier_of(seaweed.url("none"))
        metadata.shutdown()
    assert caught.value.reason == "denied"


def test_who_may_only_read_reads_and_is_told_so_when_storing(
    seaweed: Seaweed, opened: Callable[..., S3Tier], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = shards_of(2, 1000)
    opened("readonly").store(shards)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    reader = opened("readonly")
    assert load(reader, shards) == [OK, OK]
    with pytest.raises(TierError, match=r"PUT was denied .403 AccessDenied.") as caught:
        reader.store(shards_of(1, 1000))
    assert caught.value.reason == "denied" and READER_SECRET not in str(caught.value)


def test_nobody_there_and_a_silent_server(
    seaweed: Seaweed, opened: Callable[..., S3Tier], proxy: Callable[..., Proxy]
) -> None:
    gone = proxy(seaweed.port)
    gone.close()
    with pytest.raises(TierError) as caught:
        tier_of(seaweed.url("x", port=gone.port))
    assert caught.value.reason == "unreachable"
    through = proxy(seaweed.port)
    patient, shards = opened("silent", "&timeout=3600", port=through.port), shards_of(2, 1000)
    tier = make_tier(seaweed.url("silent", "&timeout=1.5", port=through.port)).tier
    eventually(lambda: _tries(lambda: tier.open() or [OK]))
    assert patient.store(shards) == [OK, OK]
    through.freeze()
    before = through.questions.arrived
    waiting = beside(lambda: load(patient, shards))
    eventually(lambda: through.questions.arrived > before)
    calls: list[Callable[[], object]] = [
        lambda: load(tier, shards),
        lambda: tier.contains([shard.key for shard in shards]),
        lambda: tier.store(shards_of(1, 10)),
    ]
    for call in calls:
        began = time.monotonic()
        with pytest.raises(TierError) as caught:
            call()
        assert caught.value.reason == "timeout" and time.monotonic() - began >= 1.4
    assert not waiting.done()
    through.thaw()
    assert waiting.result(PATIENCE) == [OK, OK]
    assert eventually(lambda: _tries(lambda: load(tier, shards))) == [OK, OK]
    through.cut()
    assert eventually(lambda: _tries(lambda: load(patient, shards))) == [OK, OK]
    tier.close()


def test_a_store_that_is_cut_leaves_a_miss(
    seaweed: Seaweed, opened: Callable[..., S3Tier], proxy: Callable[..., Proxy]
) -> None:
    through = proxy(seaweed.port)
    tier, other = opened("cut", "&timeout=3600", port=through.port), opened("cut")
    (shard,) = shards_of(1, 5 * MIB)
    for cut_at in (0, 40_000, 5 * MIB - 1000):
        through.questions.after(cut_at, through.cut_for_good)
        with pytest.raises(TierError) as caught:
            tier.store([shard])
        assert caught.value.reason == "unreachable"
        assert load(other, [shard]) == [ABSENT]
        through.refuse = False
    assert eventually(lambda: _tries(lambda: tier.store([shard]))) == [OK]
    assert load(other, [shard]) == [OK]


def _tries(call: Callable[[], list[str]]) -> list[str]:
    with contextlib.suppress(TierError):
        return call()
    return []


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (503, "SlowDown", "slow down"),
        (429, "TooManyRequests", "slow down"),
        (403, "AccessDenied", "denied"),
        (500, "InternalError", "refused"),
    ],
)
def test_what_s3_answers_has_a_name(status: int, code: str, reason: str) -> None:
    with _answering(status, code) as port:
        with pytest.raises(TierError) as caught:
            tier_of(f"s3://kvbucket/x?endpoint=http://127.0.0.1:{port}&timeout=60")
        assert caught.value.reason == reason and code in str(caught.value)


def test_a_store_that_is_full_is_an_outcome() -> None:
    with _answering(507, "XMinioStorageFull", lambda head: head.startswith(b"PUT")) as port:
        tier = tier_of(f"s3://kvbucket/x?endpoint=http://127.0.0.1:{port}&timeout=60")
        assert tier.store(shards_of(2, 100)) == ["full", "full"]
        tier.close()


@contextlib.contextmanager
def _answering(status: int, code: str, when: Callable[[bytes], bool] = lambda head: True) -> Iterator[int]:
    """An S3 that answers all requests of a kind with one error and has nothing; its port."""
    body = f"<Error><Code>{code}</Code></Error>".encode()
    error = b"HTTP/1.1 %d Nope\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, len(body), body)
    absent = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                client.settimeout(PATIENCE)
                request = b""
                while b"\r\n\r\n" not in request and (more := client.recv(65536)):
                    request += more
                head, _, rest = request.partition(b"\r\n\r\n")
                length = next(
                    (
                        int(line.split(b":")[1])
                        for line in head.lower().split(b"\r\n")
                        if line.startswith(b"content-length")
                    ),
                    0,
                )
                while len(rest) < length and (more := client.recv(65536)):
                    rest += more
                client.sendall(error if when(head) else absent)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


# ---- URLs


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://ab/x", "write s3://bucket"),
        ("s3:///x", "write s3://bucket"),
        ("s3://bucket:9000/x", "endpoint="),
        ("s3://bucket/x?endpoint=host:9000", "endpoint: must be http"),
        (
            "s3://bucket/x?endpoint=http://key:secret@host",
            r"^s3://bucket/x\?endpoint=http://key:\*\*\*@host: endpoint: must be http",
        ),
        ("s3://bucket/x?regoin=eu", "did you mean region"),
    ],
)
def test_a_url_that_cannot_be_used_is_a_configuration_error(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_tier(url)


# ---- what every tier must do


class TestConformance(ConformanceSuite):
    corruptions = 100
    largest_bytes = 20 * MIB

    @pytest.fixture(autouse=True)
    def _store(self, seaweed: Seaweed) -> Iterator[None]:
        self.seaweed = seaweed
        yield

    def prefix(self, place: Path) -> str:
        return f"conformance/{place.parent.name}/{place.name}"

    def url(self, place: Path) -> str:
        return self.seaweed.url(self.prefix(place))

    def make(self, place: Path, max_bytes: int | None = None, key_file: Path | None = None) -> Tier:
        """With a cap in every case: without one nothing is listed, so a restart knows no numbers."""
        return super().make(place, max_bytes or GIB, key_file)

    def stored_frame(self, place: Path, tier: Tier, key: ShardKey) -> bytes:
        return bytes(obstore.get(self.seaweed.store(), f"{self.prefix(place)}/{key.text}").bytes())

    def replace_frame(self, place: Path, tier: Tier, key: ShardKey, stored: bytes) -> None:
        obstore.put(self.seaweed.store(), f"{self.prefix(place)}/{key.text}", stored)

    def bytes_in_store(self, place: Path, tier: Tier) -> int:
        return sum(listing(self.seaweed, self.prefix(place)).values())


class TestConformanceEncoded(EncodedSuite, TestConformance):
    def prefix(self, place: Path) -> str:
        return f"encoded/{place.parent.name}/{place.name}"

    def url(self, place: Path) -> str:
        url = super().url(place)
        return f"{url}{'&' if '?' in url else '?'}codec=pack12"
