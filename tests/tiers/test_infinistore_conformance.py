"""The conformance suite on a real InfiniStore server in its TCP mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache.errors import ConfigError
from lmcache.testing.conformance import ConformanceSuite
from lmcache.tiers import ShardKey, Tier
from lmcache.tiers.infinistore.tier import PART_BYTES, Marker
from lmcache.tiers.registry import make_tier
from lmcache.tiers.tier import TierBase
from stores import InfiniStoreServer, prefix_of

pytestmark = pytest.mark.xdist_group("infinistore")


class TestInfiniStore(ConformanceSuite):
    hard_cap = False
    least_recent_goes = False
    corruptions = 300

    @pytest.fixture(autouse=True)
    def _store(self, infinistore: InfiniStoreServer) -> None:
        self.server, self.raw = infinistore, infinistore.raw()

    def make(self, place: Path, max_bytes: int | None = None, key_file: Path | None = None) -> TierBase:
        """A cap is not for this store, and no test here is about one."""
        key = f"&key_file={key_file}" if key_file else ""
        return make_tier(self.server.url(f"?timeout=60&prefix={prefix_of(place)}{key}")).tier

    def part_names(self, place: Path, key: ShardKey) -> list[bytes]:
        name = f"{prefix_of(place)}/{key.text}"
        packed = self.raw.get(name.encode())
        assert packed is not None
        marker = Marker.unpack(packed)
        assert marker is not None
        parts = -(-marker.frame_bytes // PART_BYTES)
        return [f"{name}/{marker.once.hex()}.{part:x}".encode() for part in range(parts)]

    def stored_frame(self, place: Path, tier: Tier, key: ShardKey) -> bytes:
        return b"".join(self.raw.get(name) or b"" for name in self.part_names(place, key))

    def replace_frame(self, place: Path, tier: Tier, key: ShardKey, stored: bytes) -> None:
        """InfiniStore has no empty values. What is more than all parts goes to the last one."""
        names = self.part_names(place, key)
        for number, name in enumerate(names):
            end = (number + 1) * PART_BYTES if name != names[-1] else len(stored)
            part = stored[number * PART_BYTES : end]
            assert self.raw.put(name, part) == 200 if part else self.raw.delete(name) == 1

    def test_the_cap_is_hard(self, tmp_path: Path) -> None:
        """Nobody is told that there is one."""
        with pytest.raises(ConfigError, match=r"max_gb: is not enforced by this store.*--prealloc-size"):
            make_tier(self.server.url("?max_gb=1"))

    def test_what_can_never_fit_is_said_and_costs_nothing(self, tmp_path: Path) -> None:
        pytest.skip("there is no cap; what is larger than the server's memory is tested beside this suite")
