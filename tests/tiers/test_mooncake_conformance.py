"""The conformance suite on a real Mooncake Store: its master, a client that lends memory, and ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache.errors import ConfigError
from lmcache.testing.conformance import ConformanceSuite
from lmcache.tiers import ShardKey, Tier
from lmcache.tiers.registry import make_tier
from lmcache.tiers.tier import TierBase
from stores import MooncakeClient, MooncakeMaster, prefix_of

pytestmark = pytest.mark.xdist_group("mooncake")


class TestMooncake(ConformanceSuite):
    hard_cap = False
    least_recent_goes = False
    corruptions = 300

    @pytest.fixture(autouse=True)
    def _store(self, mooncake: tuple[MooncakeMaster, MooncakeClient]) -> None:
        self.master, self.lender = mooncake

    def make(self, place: Path, max_bytes: int | None = None, key_file: Path | None = None) -> TierBase:
        """A cap is not for this store, and no test here is about one."""
        key = f"&key_file={key_file}" if key_file else ""
        return make_tier(self.master.url(f"?timeout=60&prefix={prefix_of(place)}{key}")).tier

    def stored_frame(self, place: Path, tier: Tier, key: ShardKey) -> bytes:
        found = self.lender.ask("get", f"{prefix_of(place)}/{key.text}")
        assert isinstance(found, bytes)
        return found

    def replace_frame(self, place: Path, tier: Tier, key: ShardKey, stored: bytes) -> None:
        assert self.lender.ask("put", f"{prefix_of(place)}/{key.text}", stored) == 0

    def test_the_cap_is_hard(self, tmp_path: Path) -> None:
        """Nobody is told that there is one."""
        with pytest.raises(ConfigError, match=r"max_gb: is not enforced by this store.*segment_gb"):
            make_tier(self.master.url("?max_gb=1"))

    def test_what_can_never_fit_is_said_and_costs_nothing(self, tmp_path: Path) -> None:
        pytest.skip("there is no cap; what is larger than a lane is tested beside this suite")
