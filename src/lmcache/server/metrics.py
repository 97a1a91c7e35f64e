"""Renders the server's counters as Prometheus text. Metric names are `lmcache_` + name; one table has the help texts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder

from lmcache.server.earlier_names import HELP_0_5

HELP: dict[str, str] = {
    "hit_chunks_total": "Chunks that lookups found complete; a request that waits counts once, by the answer that ends its wait.",
    "missed_chunks_total": "Chunks that lookups asked for and did not find; a request that waits counts once.",
    "requested_tokens_total": "Tokens of prompts that engines looked up, once a request: lookup_tokens + missed_tokens.",
    "lookup_tokens_total": "Tokens that were found, by source: engine (it had them itself), l1, other_engine, or a tier's name.",
    "missed_tokens_total": "Tokens that were not found, by reason; docs/observability.md explains each reason.",
    "blended_requests_total": "Prompts into which engines blended passages (docs/blending.md).",
    "blended_tokens_total": "Tokens of these passages. They count as missed, too, since they are no prefix.",
    "blend_recomputed_tokens_total": "Tokens of these passages that engines computed again.",
    "stored_chunks_total": "Chunks that became complete: L1 holds stored - evicted - cleared complete chunks.",
    "evicted_chunks_total": "Complete chunks evicted for newer ones, deleted, or let go after their use (--peer-keep no).",
    "cleared_chunks_total": "Complete chunks removed on request.",
    "incomplete_chunks_total": "Chunks evicted before all ranks had stored their shards.",
    "reserved_chunks_total": "Shards that got extents: reserved - committed - dropped are being filled.",
    "committed_chunks_total": "Shards that were filled.",
    "dropped_chunks_total": "Shards that got extents and were not filled, by reason in dropped_chunks_by_reason.",
    "refused_chunks_total": "Shards that got no extents.",
    "expired_chunks_total": "Leased or reserved chunks whose claim passed its deadline.",
    "evicted_chunks_by_reason_total": "Complete chunks that left L1, by reason.",
    "hit_chunks_by_reason_total": "Chunks that lookups found as ranks of another parallel split have stored them.",
    "missed_chunks_by_reason_total": "Chunks that lookups did not find, by reason.",
    "dropped_chunks_by_reason_total": "Shards that got extents and were not filled, by reason.",
    "refused_chunks_by_reason_total": "Shards that got no extents, by reason.",
    "expired_chunks_by_reason_total": "Leased or reserved chunks whose claim passed its deadline, by the kind of claim.",
    "engine_dropped_chunks_total": "Chunks that engines decided not to store, by reason.",
    "stored_tokens_total": "Tokens whose KV engines stored.",
    "retrieved_tokens_total": "Tokens whose KV engines loaded instead of computing it.",
    "renewed_leases_total": "Renewals of leases by engines that read leased extents for longer than a claim lasts.",
    "store_seconds_total": "Seconds that finished store copies took, summed over jobs.",
    "retrieve_seconds_total": "Seconds that finished load copies took, summed over jobs.",
    "failed_loads_total": "Loads that failed in engines, which computed the tokens instead.",
    "failed_stores_total": "Stores that failed in engines, so their chunks are not readable.",
    "malformed_messages_total": "Messages that could not be decoded; they were answered with an error or dropped.",
    "refused_engines_total": "Connections of engines that were refused, by reason; the log names the engines and the remedy.",
    "refused_requests_total": "Valid requests that the server declined.",
    "failed_requests_total": "Requests that failed with a known error.",
    "internal_errors_total": "Unexpected exceptions; each has a traceback in the log.",
    "failed_effects_total": "Internal steps that failed, such as writing an extent header; the log names the first of each kind.",
    "unanswered_messages_total": "Messages of connections that are not admitted, beyond those that are answered in a tick.",
    "unsent_answers_total": "Answers that could not be sent, because the engine had gone or did not read.",
    "news_chunks_total": "Changes of chunks that were noted for engines that publish KV events.",
    "news_overflows_total": "Times that such an engine asked too late, so that it withdraws what it has published.",
    "loop_errors_total": "Exceptions in callbacks of the server's main loop.",
    "chunks": "Chunks in L1 now, with those that are being filled.",
    "complete_chunks": "Complete chunks in L1 now, which lookups can find: stored - evicted - cleared.",
    "leases": "Open leases: sets of extents that engines may read.",
    "pins": "Pins of operators, which keep chunks in L1.",
    "pinned_chunks": "Chunks that pins keep in L1, each counted once.",
    "pinned_bytes": "Bytes of the arena that these chunks take.",
    "pinnable_bytes": "Bytes of the arena that pins may take at most (--pinned-share).",
    "prefetches_running": "Loads from tiers into L1 that operators have begun and that have not ended.",
    "reservations": "Open reservations: sets of extents that are being filled.",
    "engine_processes": "Engine processes connected now.",
    "pulling_servers": "Other servers that are connected to pull from this one.",
    "lent_shards_total": "Shards that other servers have pulled from this one.",
    "awaited_pulls_total": "Pulls of other servers that waited until an engine had stored what they asked for.",
    "lent_bytes_total": "Bytes of the shards that other servers have pulled from this one.",
    "lent_by_nixl_bytes_total": "Bytes of these that the other servers have read from L1 by NIXL.",
    "arena_bytes": "Size of the L1 arena.",
    "arena_backed_bytes": "Bytes of the arena for which memory is allocated.",
    "arena_used_bytes": "Bytes of the arena that hold chunks.",
    "quarantined_bytes": "Bytes of extents that are not reused until a dead or slow engine, or a tier, can no longer touch them.",
    "index_bytes": "Memory of the index of chunks.",
    "eviction_policy": "1 for the policy by which a full L1 evicts (--eviction-policy).",
    "eviction_prompts_total": "Lookups from which the learned policy of eviction has learned.",
    "trace_recorded_events_total": "Lookups and stores that have been written to the trace (--record-trace).",
    "trace_lost_events_total": "Lookups and stores that are missing from the trace, since the disk was full or too slow.",
    "chunk_first_hit_age_seconds": "Age of chunks when they were used for the first time, of a sample of 1 %.",
    "chunk_reuse_gap_seconds": "Time between two uses of a chunk, of the sample.",
    "chunk_eviction_age_seconds": "Age of chunks when they were evicted, of the sample.",
    "chunk_idle_before_eviction_seconds": "Time from a chunk's last use, or its store, to its eviction, of the sample.",
    "chunk_reuses": "How often a chunk had been used when it was evicted, of the sample.",
    "chunks_followed": "Chunks of the sample that are in L1 now.",
    "spans_sent_total": "Spans that the OpenTelemetry collector has taken (--otlp-endpoint).",
    "spans_dropped_total": "Spans that were dropped, since the collector did not take them or was too slow.",
    "span_notes_lost_total": "Events of requests that are missing from the spans, since too many waited.",
    "predicted_token_hit_ratio": "Share of the looked-up tokens that an L1 of so many times the size would find, estimated.",
    "predicted_token_hit_ratio_low": "Lower end of the interval that contains it 19 times of 20.",
    "predicted_token_hit_ratio_high": "Upper end of the interval that contains it 19 times of 20.",
    "fetches_total": "Lookups whose missing chunks were looked for in the tiers, or awaited from other engines.",
    "fetches_by_end_total": "Those of them that ended without all chunks, by reason: absent, not worth it, late ...",
    "fetches_open": "Lookups that wait for tiers or other engines now.",
    "fetched_chunks_arrived_total": "Chunks that arrived from tiers or other engines while a lookup waited for them.",
    "fetched_chunks_awaited_total": "Those of them that other engines computed.",
    "awaited_tokens_total": "The same in tokens.",
    "awaits_by_end_total": "Lookups that could wait for other engines, by the end: arrived, promise ended, late ...",
    "promised_chunks": "Chunks that engines compute now and have announced.",
    "fetched_chunks_failed_total": "Chunks that a tier reported to have and did not deliver.",
    "fetched_chunks_probes_total": "Loads that only measured whether a slow tier has become faster.",
    "fetched_chunks_late_answers_total": "Queries that tiers did not answer in time.",
    "fetched_chunks_too_many_total": "Lookups that waited for no tier, since too many others were waiting.",
    "last_fetch_expected_seconds": "Expected time of the load in the last decision between loading and computing.",
    "last_fetch_recompute_seconds": "Expected time of computing in the same decision; 0 if it is not known.",
    "last_fetch_loaded": "Result of the same decision: 1 if the chunks were loaded.",
    "tier_serving": "Whether the tier serves in full: its circuit breakers are closed.",
    "tier_stored_bytes": "Bytes that the tier holds, as far as this server knows.",
    "tier_shards": "Shards that the tier holds, as far as this server knows.",
    "tier_queued_bytes": "Bytes of chunks that wait to be written to the tier.",
    "tier_load_bytes_per_second": "Measured rate of loads from the tier.",
    "tier_ask_seconds": "Measured time until the tier answers which shards it has.",
    "tier_loaded_shards_total": "Shards loaded from the tier, complete and checked.",
    "tier_loaded_bytes_total": "Bytes of the shards loaded from the tier.",
    "tier_missed_total": "Shards that the tier did not deliver, by reason, which includes the kinds of damage.",
    "tier_kept_shards_total": "Shards that the tier acknowledged as stored.",
    "tier_written_shards_total": "Shards that the tier acknowledged as stored, and did not have before.",
    "tier_unwritten_total": "Shards that the tier did not store, by reason.",
    "tier_unwritten_bytes_total": "Bytes of the shards that the tier did not store, by reason.",
    "tier_queued_total": "Chunks that were queued to be written to the tier.",
    "tier_lost_total": "Chunks that were not written to the tier, by reason.",
    "tier_lost_bytes_total": "Bytes of the chunks that were not written to the tier, by reason.",
    "tier_encoded_bytes_total": "Bytes of the shards that the tier stores with a codec, before encoding.",
    "tier_encoded_stored_bytes_total": "Bytes of the same shards after encoding.",
    "tier_rounded_bytes_total": "Bytes of those of them that were rounded by int8, before encoding. 0: all KV here is exact.",
    "tier_failed_total": "Calls of the tier that failed, by reason.",
    "tier_opened_breaker_total": "How often one of the tier's circuit breakers opened.",
}
"""Name without prefix -> what it counts, and its unit."""

LABELS: dict[str, tuple[str, ...]] = {
    "lookup_tokens_total": ("source",),
    "missed_tokens_total": ("reason",),
    "evicted_chunks_by_reason_total": ("reason",),
    "hit_chunks_by_reason_total": ("reason",),
    "missed_chunks_by_reason_total": ("reason",),
    "refused_chunks_by_reason_total": ("reason",),
    "dropped_chunks_by_reason_total": ("reason",),
    "expired_chunks_by_reason_total": ("reason",),
    "engine_dropped_chunks_total": ("reason",),
    "refused_engines_total": ("reason",),
    "eviction_policy": ("policy",),
    "predicted_token_hit_ratio": ("times_l1",),
    "predicted_token_hit_ratio_low": ("times_l1",),
    "predicted_token_hit_ratio_high": ("times_l1",),
    "fetches_by_end_total": ("reason",),
    "awaits_by_end_total": ("reason",),
    "fetched_chunks_late_answers_total": ("tier",),
    "tier_serving": ("tier",),
    "tier_stored_bytes": ("tier",),
    "tier_shards": ("tier",),
    "tier_queued_bytes": ("tier",),
    "tier_load_bytes_per_second": ("tier",),
    "tier_ask_seconds": ("tier",),
    "tier_loaded_shards_total": ("tier",),
    "tier_encoded_bytes_total": ("tier",),
    "tier_encoded_stored_bytes_total": ("tier",),
    "tier_rounded_bytes_total": ("tier",),
    "tier_loaded_bytes_total": ("tier",),
    "tier_missed_total": ("tier", "reason"),
    "tier_kept_shards_total": ("tier",),
    "tier_written_shards_total": ("tier",),
    "tier_unwritten_total": ("tier", "reason"),
    "tier_unwritten_bytes_total": ("tier", "reason"),
    "tier_queued_total": ("tier",),
    "tier_lost_total": ("tier", "reason"),
    "tier_lost_bytes_total": ("tier", "reason"),
    "tier_failed_total": ("tier", "reason"),
    "tier_opened_breaker_total": ("tier",),
}
"""Name without prefix -> its labels, for the metrics that have some."""

_NAME = re.compile(r"(:?[a-z][a-zA-Z0-9_]*)(?:\{(.*)\})?", re.DOTALL)
_LABEL = re.compile(r'([a-z][a-z0-9_]*)="(.*?)"(?:,(?=[a-z][a-z0-9_]*=")|\Z)', re.DOTALL)  # a value may hold quotes
_PART = re.compile(r"_(?:bucket|sum|count)\Z")


def _words_of(name: str) -> str:
    return name.removesuffix("_total").replace("_", " ").capitalize()


def render(counters: Mapping[str, float], accept: str) -> tuple[bytes, str]:
    """Return the body of /metrics and its content type. `accept`: the value of the scraper's header."""
    encode, content_type = choose_encoder(accept)
    return encode(_Snapshot(counters)), content_type


class _Snapshot:
    """A Prometheus collector of these counters and of the process's CPU time, memory and descriptors."""

    def __init__(self, counters: Mapping[str, float]) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        yield from families(self._counters)
        yield from _PROCESS.collect()


def kind_of(name: str) -> str:
    """Return the type of a metric, which its name tells: `counter` or `gauge`."""
    return "counter" if name.endswith("_total") else "gauge"


def families(counters: Mapping[str, float]) -> Iterable[Metric]:
    """Return one metric for each name; `missed_chunks_total{reason="evicted"}` becomes a sample of `missed_chunks_total`, and the
    counters of a `Histogram` become a histogram.

    Raises:
        ValueError: a name is not valid in Prometheus.
    """
    found: dict[str, Metric] = {}
    histograms = {name.partition("_bucket{")[0] for name in counters if "_bucket{" in name}
    for full_name, value in counters.items():
        match = _NAME.fullmatch(full_name)
        if match is None or (match[2] is not None and _LABEL.sub("", match[2])) or match[2] == "":
            raise ValueError(f'counter {full_name!r}: use a_name or a_name{{label="value"}}')
        name, labels = match[1], dict(_LABEL.findall(match[2] or ""))
        of = _PART.sub("", name)
        family, kind = (of, "histogram") if of in histograms else (name, kind_of(name))
        prefix = "lmcache" if name.startswith(":") else "lmcache_"
        if family not in found:
            help_text = HELP.get(family) or HELP_0_5.get(family) or _words_of(family)
            found[family] = Metric(f"{prefix}{family.removesuffix('_total')}", help_text, kind)
        found[family].add_sample(f"{prefix}{name}", labels, value)
    return found.values()


_PROCESS = ProcessCollector(registry=None)
