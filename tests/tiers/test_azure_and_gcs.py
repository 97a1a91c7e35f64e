"""The tiers in Azure Blob Storage (on Azurite, Microsoft's emulator) and in Google Cloud Storage (on a stand-in).

What they share with S3 is tested with S3; here is what could differ: conditional writes, deletions, ranges, errors, credentials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import obstore
import pytest

from azurite import ACCOUNT, KEY, Azurite
from gcs_stand_in import NO_CREDENTIALS, GCSStandIn
from lmcache.errors import ConfigError
from lmcache.testing.conformance import ConformanceSuite
from lmcache.tiers import ABSENT, KEPT, OK, ShardKey, Tier, TierError
from lmcache.tiers.object_store import client as client_module
from lmcache.tiers.object_store.tier import RANGE_BYTES, ObjectTier
from lmcache.tiers.registry import make_tier
from servers import eventually
from stores import load, shards_of, tier_of

pytestmark = pytest.mark.xdist_group("objects")
MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture(scope="module")
def azurite() -> Iterator[Azurite]:
    one = Azurite()
    yield one
    one.end()


@pytest.fixture(scope="module", params=["az", "gs"])
def cloud(request: pytest.FixtureRequest) -> Iterator[Azurite | GCSStandIn]:
    if request.param == "az":
        yield request.getfixturevalue("azurite")
        return
    one = GCSStandIn()
    yield one
    one.end()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Azurite's, in the environment; the stand-in wants none."""
    for name in ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_NAME", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", NO_CREDENTIALS)


@pytest.fixture
def opened(cloud: Azurite | GCSStandIn, request: pytest.FixtureRequest) -> Iterator[Callable[..., ObjectTier]]:
    tiers: list[ObjectTier] = []

    def make(options: str = "") -> ObjectTier:
        tier = tier_of(cloud.url("".join(letter for letter in request.node.name if letter.isalnum()), options))
        assert isinstance(tier, ObjectTier)
        tiers.append(tier)
        return tier

    yield make
    for tier in tiers:
        tier.close()


def names(cloud: Azurite | GCSStandIn, word: str) -> list[str]:
    return [one["path"] for batch in obstore.list(cloud.store()) for one in batch if word in one["path"]]


def test_shards_of_all_sizes_come_back_and_are_kept(
    opened: Callable[..., ObjectTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is read in ranges, and one that is written in parts."""
    monkeypatch.setattr(client_module, "MULTIPART_FROM_BYTES", 12 * MIB)
    monkeypatch.setattr(client_module, "MULTIPART_BYTES", 5 * MIB)
    tier = opened()
    shards = [shards_of(1, size)[0] for size in (0, 1, 4096, RANGE_BYTES + 1, 13 * MIB)]
    assert load(tier, shards) == [ABSENT] * 5
    assert tier.store(shards) == [OK] * 5 and tier.store(shards) == [KEPT] * 5
    assert load(tier, shards) == [OK] * 5
    assert tier.contains([shard.key for shard in [*shards, *shards_of(1, 1)]]) == [True] * 5 + [False]


def test_removals_ignore_what_is_not_there_and_clear_takes_all(
    opened: Callable[..., ObjectTier], cloud: Azurite | GCSStandIn
) -> None:
    tier, shards = opened("&max_gb=1"), shards_of(300, 10)
    assert set(tier.store(shards[::10])) == {OK}
    tier.remove([shard.key for shard in shards[:290]])  # more than a request of Azure's takes; most of them are absent
    assert tier.contains([shard.key for shard in shards[::10]]) == [False] * 29 + [True]
    prefix = tier._client.place.prefix
    obstore.put(cloud.store(), f"{prefix}/not ours", b"x")
    tier.clear()
    assert [name.partition("/")[2] for name in names(cloud, prefix)] == ["not ours"]


def test_the_cap_holds(opened: Callable[..., ObjectTier], cloud: Azurite | GCSStandIn) -> None:
    first, second = opened("&max_gb=0.001&sweep=0.2"), opened("&max_gb=0.001&sweep=0.2")
    for _ in range(3):
        assert set(first.store(shards_of(8, 100_000))) == {OK}
    assert first.usage().stored_bytes <= 0.001 * GIB
    eventually(lambda: second.usage().stored_bytes == first.usage().stored_bytes > 500_000)
    eventually(lambda: names(cloud, "recency"))


def test_only_one_server_is_the_janitor(opened: Callable[..., ObjectTier]) -> None:
    first, second = opened("&max_gb=0.001&sweep=600"), opened("&max_gb=0.001&sweep=600")
    eventually(lambda: first._swept.is_set() and second._swept.is_set())  # then neither sweeps for ten minutes
    assert [first._be_janitor(), second._be_janitor()] in ([True, False], [False, True])


def test_a_conditional_write_has_one_winner(opened: Callable[..., ObjectTier]) -> None:
    client = opened()._client
    assert client.write("lease", [b"one"], over={}) and not client.write("lease", [b"two"], over={})
    read = client.read_all("lease")
    assert read and read[0] == b"one"
    assert client.write("lease", [b"three"], over=read[1]) and not client.write("lease", [b"four"], over=read[1])
    again = client.read_all("lease")
    assert again and again[0] == b"three"


def test_a_bucket_that_is_not_there(cloud: Azurite | GCSStandIn) -> None:
    kind = "container" if isinstance(cloud, Azurite) else "bucket"
    with pytest.raises(TierError, match=f"there is no such {kind}; create it") as caught:
        tier_of(cloud.url("x", container="nosuchbucket"))
    assert caught.value.reason == "no bucket"


class TestConformance(ConformanceSuite):
    corruptions = 40
    largest_bytes = 9 * MIB

    @pytest.fixture(autouse=True)
    def _store(self, cloud: Azurite | GCSStandIn, credentials: None) -> Iterator[None]:
        self.cloud = cloud
        yield

    def prefix(self, place: Path) -> str:
        return f"conformance/{place.parent.name}/{place.name}"

    def url(self, place: Path) -> str:
        return self.cloud.url(self.prefix(place))

    def make(self, place: Path, max_bytes: int | None = None, key_file: Path | None = None) -> Tier:
        """Only with a bound are times of use kept."""
        return super().make(place, max_bytes or GIB, key_file)

    def stored_frame(self, place: Path, tier: Tier, key: ShardKey) -> bytes:
        return bytes(obstore.get(self.cloud.store(), f"{self.prefix(place)}/{key.text}").bytes())

    def replace_frame(self, place: Path, tier: Tier, key: ShardKey, stored: bytes) -> None:
        obstore.put(self.cloud.store(), f"{self.prefix(place)}/{key.text}", stored)

    def bytes_in_store(self, place: Path, tier: Tier) -> int:
        found = obstore.list(self.cloud.store(), self.prefix(place))
        return sum(one["size"] for batch in found for one in batch)


# ---- credentials


def test_credentials_of_azure(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    whole = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={azurite.endpoint};"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", whole)
    tier = tier_of("az://kvbucket/connection?timeout=60")
    assert tier.store(shards_of(1, 10)) == [OK]
    tier.close()
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
    with pytest.raises(TierError, match=r"denied \(403 AuthorizationFailure\); check the credentials") as caught:
        tier_of(azurite.url("x"))
    assert caught.value.reason == "denied" and "d3Jvbmc" not in str(caught.value)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "!secret!")
    with pytest.raises(ConfigError, match="AZURE_STORAGE_ACCOUNT_KEY must be the base64 text") as refused:
        tier_of(azurite.url("x"))
    assert "!secret!" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("az://kvbucket/x", r"no storage account: add \?account=NAME, or export AZURE_STORAGE_ACCOUNT_NAME"),
        ("az://u:p@kvbucket/x", "not the URL"),
        ("az://kvbucket/x?account=a&endpoint=host", "must be https://ACCOUNT.blob.core.windows.net"),
        ("az://kvbucket/x?account=a&region=b", "unknown option 'region'"),
        ("gs://kvbucket/x?account=a", "unknown option 'account'"),
        ("gs:///x", "write gs://bucket/prefix"),
    ],
)
def test_a_url_that_cannot_be_used_is_a_configuration_error(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_tier(url)


def test_a_file_of_google_credentials_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GOOGLE_SERVICE_ACCOUNT_KEY")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="gcloud auth application-default login"):
        make_tier("gs://kvbucket/x")
