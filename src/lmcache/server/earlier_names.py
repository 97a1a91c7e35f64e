"""The names that the public project's dashboards read (`--metrics-names lmcache-0.5`), beside the server's own.

A metric is here only if it can have the meaning and the unit that it has there. What this server cannot know is absent, not 0.
It listens to the events of L1 only when the flag is given.
"""

from __future__ import annotations

from collections import Counter

from lmcache.cache import L1, SERVER, Event
from lmcache.cache.reasons import SOURCES
from lmcache.observability.histogram import Histogram
from lmcache.server.service import Service
from lmcache.server.sessions import Peer
from lmcache.server.tier_runner import TierRunner
from lmcache.wire import messages as m

HELP_0_5: dict[str, str] = {
    "mp_lookup_requested_tokens_total": "Tokens of the full chunks of prompts that were looked up.",
    "mp_lookup_hit_tokens_total": "Those of them that were in L1 or arrived from a tier: a prefix of each prompt.",
    "mp_lookup_hit_l1_tokens_total": "Those of these that no tier had to deliver.",
    "mp_lookup_hit_l2_tokens_total": "Those of these that a tier delivered while the lookup waited.",
    "mp_lookups_requests_total": "Lookups, once a request.",
    "mp_l1_read_chunks_total": "Shards that were read from L1: by engines, in whole chunks, and by writes to tiers.",
    "mp_l1_write_chunks_total": "Shards that were written to L1, by engines and by loads from tiers.",
    "mp_l1_evicted_chunks_total": "Shards of complete chunks that were evicted from L1.",
    "mp_l1_memory_usage_bytes": "Bytes of L1 that hold chunks.",
    "mp_l1_usage_ratio": "The same as a share of L1.",
    "mp_l1_allocation_failure_chunks_total": "Shards that got no memory in L1, of an engine's store or of a tier's load.",
    "mp_l2_prefetch_failure_chunks_total": "Chunks that a tier reported to have and did not deliver.",
    "mp_l2_store_submitted_objects_chunks_total": "Shards given to tiers, once it is known whether they were stored.",
    "mp_l2_store_completed_objects_chunks_total": "Shards that tiers have stored.",
    "mp_l2_prefetch_lookup_requests_total": "Lookups whose missing chunks were looked for in tiers or awaited.",
    "mp_l2_prefetch_load_completed_chunks_total": "Shards that tiers have delivered.",
    "mp_l2_usage_bytes": "Bytes that the tier holds, as far as this server knows.",
    "mp_num_chunks_loaded_total": "Shards that engines have loaded, in whole chunks.",
    "mp_l0_l1_store_throughput_GB_per_second": "Rate of a rank's store copy, in 10^9 bytes per second.",
    "mp_l0_l1_load_throughput_GB_per_second": "Rate of a rank's load copy, in 10^9 bytes per second.",
    "mp_l1_chunk_lifetime_seconds": "Age of chunks when they were evicted, of a sample of 1 %.",
    "mp_l1_chunk_idle_before_evict_seconds": "Time from a chunk's last use, or its store, to its eviction, of the sample.",
    "mp_l1_chunk_reuse_gap_seconds": "Time from a chunk's use, or its store, to its next use, of the sample.",
    "mp_active_prefetch_jobs": "Lookups that wait for tiers or other engines now.",
    "mp_num_inflight_l2_stores": "Writes that the tier has not ended yet.",
    "mp_num_inflight_l2_loads": "Loads that the tier has not ended yet.",
    ":num_lookup_tokens_total": "Tokens of the full chunks of prompts that were looked up.",
    ":num_lookup_hits_total": "Those of them that were found.",
    ":local_cache_usage": "Bytes of L1 that hold chunks.",
}
"""Name without `lmcache_`, or without `lmcache` before a colon -> what it counts, and its unit."""
MOST_MODELS = 64
"""Models with a label of their own; further ones are counted together, as `other`."""
_LEAST_SECONDS = 1e-9
"""A copy that took less tells no rate."""
_GB_PER_SECOND = 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128


class EarlierNames:
    """Counts what the server's own counters do not tell by model."""

    def __init__(self, service: Service) -> None:
        self._service, self._l1, self._chunk = service, service.l1, service.chunk_tokens
        self._counts: Counter[tuple[str, str]] = Counter()
        """(metric, labels) -> value."""
        self._models: set[str] = set()
        self._rates: dict[tuple[str, str], Histogram] = {}
        self._tier_tokens = 0
        events = service.l1.events
        events.listen(["answered"], self._answered, named=False)
        events.listen(["evicted", "refused"], self._heard, named=False)
        service.on_copied.append(self._copied)

    def _model(self, name: str) -> str:
        if name not in self._models and len(self._models) >= MOST_MODELS:
            name = "other"
        self._models.add(name)
        return f'model_name="{name}"'

    def _answered(self, event: Event) -> None:
        """Count a lookup. The accounts have heard of it before, so what they have added to the tiers' tokens is of this one."""
        model = self._model(self._service.sessions.describe(event.process)[1])
        hit = event.found * self._chunk
        of_tiers = self._tokens_of_tiers()
        from_tiers, self._tier_tokens = min(hit, of_tiers - self._tier_tokens), of_tiers
        for name, value in (
            ("mp_lookups_requests_total", 1),
            ("mp_lookup_requested_tokens_total", event.chunks * self._chunk),
            ("mp_lookup_hit_tokens_total", hit),
            ("mp_lookup_hit_l1_tokens_total", hit - from_tiers),
            ("mp_lookup_hit_l2_tokens_total", from_tiers),
        ):
            self._counts[name, model] += value

    def _tokens_of_tiers(self) -> int:
        """Return the tokens that all tiers have delivered, removed ones included: a sum that never falls."""
        return sum(count for source, count in self._service.accounts.found.items() if source not in SOURCES)

    @property
    def _runners(self) -> list[TierRunner]:
        return list(self._service.tiering.runners) if self._service.tiering is not None else []

    def _heard(self, event: Event) -> None:
        if event.kind == "evicted":
            space = self._l1.space(event.space)
            self._counts["mp_l1_evicted_chunks_total", ""] += event.chunks * (space.shards if space is not None else 1)
            return
        during = "l2_prefetch" if event.process == SERVER else "l1_store"
        model = self._model(self._service.model_of(event.space))
        self._counts["mp_l1_allocation_failure_chunks_total", f'during="{during}",{model}'] += event.chunks

    def _copied(self, peer: Peer, copied: m.Copied) -> None:
        """Note the rate of a copy. Where a rank has several kinds of KV, the message does not tell how many bytes were copied."""
        space = self._l1.space(next(iter(peer.spaces))) if len(peer.spaces) == 1 else None
        if (
            space is None
            or not copied.ok
            or copied.seconds < _LEAST_SECONDS
            or not 0 <= copied.shard < len(space.shard_bytes)
        ):
            return
        kind = f"mp_l0_l1_{copied.kind}_throughput_GB_per_second", self._model(next(iter(peer.spaces.values())))
        size = copied.tokens * space.shard_bytes[copied.shard] / self._chunk
        self._rates.setdefault(kind, Histogram(_GB_PER_SECOND)).observe(size / copied.seconds / 1e9)

    def counters(self) -> dict[str, float]:
        """Return name -> value, as `Report.counters` does. Call it in the loop's thread."""
        service, l1 = self._service, self._l1
        out: dict[str, float] = {
            f"{name}{{{labels}}}" if labels else name: n for (name, labels), n in self._counts.items()
        }
        for (name, labels), rates in self._rates.items():
            out |= rates.counters(name, labels)
        loaded = service.counters["retrieved_tokens"] // self._chunk
        tiers = Counter[str]()
        for of_tier, _ in self._service.tiering.report.counted().values() if self._service.tiering is not None else ():
            tiers.update(of_tier)
        kept = tiers["kept_shards"]
        out |= {
            "mp_l1_read_chunks_total": loaded + kept,
            "mp_l1_write_chunks_total": l1.events.counters["committed"],
            "mp_num_chunks_loaded_total": loaded,
            **_memory_of(l1),
        }
        if service.lifetimes is not None:
            lives = service.lifetimes
            out |= lives.eviction_age.counters("mp_l1_chunk_lifetime_seconds")
            out |= lives.idle_before_eviction.counters("mp_l1_chunk_idle_before_evict_seconds")
            out |= (lives.first_hit_age + lives.reuse_gap).counters("mp_l1_chunk_reuse_gap_seconds")
        asked, hit = (
            sum(value for (name, _), value in self._counts.items() if name == f"mp_lookup_{kind}_tokens_total")
            for kind in ("requested", "hit")
        )
        out |= {":num_lookup_tokens_total": asked, ":num_lookup_hits_total": hit}
        return out | self._of_tiers(tiers) if self._runners or tiers else out

    def _of_tiers(self, counts: Counter[str]) -> dict[str, float]:
        """Return what there is only with tiers. counts: of all of them, removed ones included."""
        assert self._service.tiering is not None
        fetches, kept = self._service.tiering.fetches, counts["kept_shards"]
        failed = sum(value for name, value in counts.items() if name.startswith("unwritten:"))
        out: dict[str, float] = {
            "mp_l2_store_submitted_objects_chunks_total": kept + failed,
            "mp_l2_store_completed_objects_chunks_total": kept,
            "mp_l2_prefetch_lookup_requests_total": fetches.counters["fetches"],
            "mp_l2_prefetch_load_completed_chunks_total": counts["loaded_shards"],
            'mp_l2_prefetch_failure_chunks_total{reason="not_found"}': fetches.counters["failed"],
            "mp_active_prefetch_jobs": fetches.open,
        }
        for number, runner in enumerate(self._runners):
            name, running = f'l2_name="{runner.name}"', runner.under_way
            which = f'{{{name},adapter_index="{number}"}}'
            out |= {
                f"mp_l2_usage_bytes{{{name}}}": runner.usage().stored_bytes,
                f"mp_num_inflight_l2_stores{which}": running["store"],
                f"mp_num_inflight_l2_loads{which}": running["load"],
            }
        return out


def _memory_of(l1: L1) -> dict[str, float]:
    used = l1.used_bytes()
    return {
        "mp_l1_memory_usage_bytes": used,
        "mp_l1_usage_ratio": used / l1.arena.size_bytes,
        ":local_cache_usage": used,
    }
