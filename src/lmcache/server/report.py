"""Reports health, status and counters of the server. The HTTP endpoint asks; the loop's thread reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from itertools import islice
from urllib.parse import parse_qsl, unquote

from lmcache import __version__
from lmcache.cache import KINDS
from lmcache.cache.records import Blocks, select
from lmcache.config.server import ServerConfig
from lmcache.errors import ConfigError
from lmcache.server.attaching import Attaching
from lmcache.server.controller import Controller, Here, There, instance_name
from lmcache.server.history import COLUMNS, History
from lmcache.server.loop import Loop
from lmcache.server.operating import Operating
from lmcache.server.service import Service
from lmcache.wire.messages import PEER

REPORTED_FETCHES = 16
"""How many records of fetches /status contains. /fetches returns all records that are kept."""
_OPEN_TIER_SECONDS, _REMOVE_TIER_SECONDS = 20.0, 20.0
"""How long a caller waits for a tier to open or to be closed; the server goes on with it afterwards."""
_SEND_CREDENTIALS = "az", "gs"
"""Schemes of stores that are sent a token or signature that is valid elsewhere, too; S3 gets signatures of single requests."""
_CLEAR_TIERS_SECONDS = 25.0
"""Timeout of clearing tiers, below the timeout of the HTTP endpoint."""


class Report:
    """Implements `control.Control`. Any thread may call any method. Each returns within a second or raises TimeoutError, which
    the HTTP endpoint reports as an unhealthy server."""

    def __init__(self, config: ServerConfig, loop: Loop, service: Service, attaching: Attaching | None = None) -> None:
        self._config, self._loop, self._service, self._attaching = config, loop, service, attaching
        self.operating = Operating(config, loop, service, instance_name(config))
        here = Here(self.operating, self.clear, self.health)
        self.api_token: Callable[[], str] = lambda: config.api_token
        """Returns the token in force, which SIGHUP may have changed."""
        others = [There(url, lambda: self.api_token()) for url in config.control_peers]
        self.controller = Controller([here, *others], loop.runtime)
        self._history = History(loop.now, loop.runtime.wall, self._counters)
        loop.on_tick.append(self._history.tick)

    def health(self) -> tuple[bool, str]:
        """Return (True, "") if the loop's thread answers, which runs L1 and the engine endpoints, and the arena file exists."""
        arena = self._service.l1.arena
        if self._loop.ask(lambda: arena.named and not arena.path.exists()):
            return False, f"the arena file {arena.path} has been removed"
        return True, ""

    def clear(self, tiers: str = "") -> dict[str, object]:
        """Empty L1. Leased chunks leave the index at once, and their memory is freed when the leases end.

        tiers: tiers to empty too: `all`, or names separated by commas.

        Raises:
            ConfigError: there is no tier of such a name, or it is read-only.
        """
        names = {name.strip() for name in tiers.split(",") if name.strip()}
        runners = self._service.tiering.runners if self._service.tiering is not None else []
        for name in (one.name for one in runners if one.tier.read_only and one.name in names):
            raise ConfigError(f"tiers={name}: this tier is the memory of other servers: clear it there")
        known = [runner.name for runner in runners if not runner.tier.read_only]
        for name in names - {"all", *known}:
            raise ConfigError(f"tiers={name}: there is no such tier; known: {', '.join(['all', *known])}")
        pins = len(self._service.l1.pins)
        cleared: dict[str, object] = {"cleared_chunks": self._loop.ask(self._service.clear, 30.0)}
        if pins:
            cleared["ended_pins"] = pins
        if names and known:
            wrong = self._clear_tiers([name for name in known if "all" in names or name in names])
            cleared["cleared_tiers"] = [
                name for name in known if ("all" in names or name in names) and name not in wrong
            ]
            if wrong:
                cleared["failed_tiers"] = wrong
        return cleared

    def _clear_tiers(self, names: list[str]) -> dict[str, str]:
        """Empty these tiers. Return those that are not empty yet, each with the reason."""
        tiering, answer = self._service.tiering, Future[dict[str, str]]()
        assert tiering is not None
        self._loop.ask(lambda: tiering.clear(set(names), answer.set_result))
        try:
            return answer.result(_CLEAR_TIERS_SECONDS)
        except FutureTimeout:
            return dict.fromkeys(
                names, f"may still be being emptied after {_CLEAR_TIERS_SECONDS:g} s; the server goes on with it"
            )

    def tiers(self) -> dict[str, object]:
        """Return the tiers, nearest first, and those that are being removed."""
        tiering = self._service.tiering
        if tiering is None:
            return {"tiers": [], "leaving": []}
        return self._loop.ask(lambda: {"tiers": tiering.report.status(), "leaving": tiering.report.leaving()})

    def add_tier(self, url: str, before: str = "") -> dict[str, object]:
        """Open a tier and attach it, before the tier of a name or as the farthest.

        Raises:
            ConfigError: the URL or a name is wrong, or the tier cannot be opened. Then nothing has changed.
        """
        attaching, text = self._attaches(), url.strip()
        _check_reads_no_secrets(text)
        spec, opened = attaching.make(text), Future[str]()
        name = self._loop.ask(lambda: attaching.add(spec, text, opened.set_result, before))
        try:
            wrong = opened.result(_OPEN_TIER_SECONDS)
        except FutureTimeout:
            wrong = "it is not open yet; the server goes on with it, and GET /tiers shows it when it is"
        if wrong:
            raise ConfigError(f"{spec.url}: {wrong}")
        return {"name": name, "url": spec.url}

    def remove_tier(self, name: str, drain_seconds: float | None = None) -> dict[str, object]:
        """Remove a tier, after what is queued for it has been written for so long.

        Raises:
            ConfigError: there is no tier of this name.
        """
        attaching, closed = self._attaches(), Future[str]()
        self._loop.ask(lambda: attaching.remove(name, closed.set_result, drain_seconds))
        try:
            wrong = closed.result(_REMOVE_TIER_SECONDS)
        except FutureTimeout:
            return {"name": name, "state": "leaving"}
        return {"name": name, "state": "removed", **({"left_behind": wrong} if wrong else {})}

    def pause_tier(self, name: str, paused: bool) -> dict[str, object]:
        """Pause a tier, or let it go on. Returns the calls that have not returned yet.

        Raises:
            ConfigError: there is no tier of this name.
        """
        attaching = self._attaches()
        under_way = self._loop.ask(lambda: dict(attaching.pause(name, paused).under_way))
        return {"name": name, "state": "paused" if paused else "resumed", "under_way": under_way}

    def _attaches(self) -> Attaching:
        if self._attaching is None:
            raise ConfigError("the tiers of this server cannot be changed while it runs")
        return self._attaching

    def degraded(self) -> list[str]:
        """Return the tiers that do not serve now, each with the reason."""
        tiering = self._service.tiering
        return [] if tiering is None else self._loop.ask(tiering.report.degraded)

    def refused(self) -> list[str]:
        """Return the engines that were refused within the last minute, each with the remedy."""
        return self._loop.ask(self._service.sessions.refused.lately)

    def fetches(self) -> list[dict[str, object]]:
        """Return records of the fetches that ended last, the latest first (`cache.waits.FetchRecord`)."""
        tiering = self._service.tiering
        if tiering is None:
            return []
        records = self._loop.ask(lambda: list(tiering.fetches.records))  # formatted in this thread, to spare the loop
        return [tiering.report.describe(one) for one in reversed(records)]

    def history(self) -> tuple[list[str], list[tuple[float, ...]]]:
        """Return the names of a few counters, and their samples of the last hour (`history.History`)."""
        return list(COLUMNS), self._loop.ask(self._history.samples)

    def requests(
        self, request: str = "", misses: bool = False, since: float = 0.0, before: int = 0, limit: int = 100
    ) -> dict[str, object]:
        """Return the latest records of requests, and what to pass as `before` for those before them (`cache.records.select`)."""
        accounts = self._service.accounts
        if not accounts.records.most_bytes:
            raise ConfigError("the server remembers no requests: start it with --records-mb 64")
        blocks, totals = self._loop.ask(self._blocks_and_totals)
        pause = partial(self._loop.runtime.sleep, 0.0)  # lets the loop have Python's lock
        found, rest = select(
            blocks, request=request, misses=misses, since=since, before=before, limit=limit, pause=pause
        )
        copies, positions = self._loop.ask(
            lambda: (
                accounts.copies_of((one.engine, one.request) for one in found),
                [accounts.position_of(one) for one in found],
            )
        )
        described = [
            one.described() | {"copies": copies.get((one.engine, one.request), {}), "differs_at": position}
            for one, position in zip(found, positions, strict=True)
        ]
        return {"requests": described, "next": rest, "totals": totals}

    def status(self) -> dict[str, object]:
        return self._loop.ask(self._status)

    def counters(self) -> dict[str, float]:
        """Return the counters of /metrics: those of /status, the histograms, and the public project's names."""
        return self._loop.ask(self._metrics)

    def _metrics(self) -> dict[str, float]:
        service, out = self._service, self._counters()
        if service.lifetimes is not None:
            out |= service.lifetimes.counters()
        for counters in service.more_counters:
            out |= counters()
        return out

    def _status(self) -> dict[str, object]:
        service, l1, arena, now = self._service, self._service.l1, self._service.l1.arena, self._loop.now()
        return {
            "is_healthy": not arena.named or arena.path.exists(),
            "version": __version__,
            "pid": os.getpid(),
            "server_id": service.sessions.server_id.hex(),
            "wall_seconds": self._loop.runtime.wall(),
            "uptime_seconds": round(now - service.started, 1),
            "chunk_size": self._config.chunk_size,
            "hash_algorithm": "blake3",
            "active_sessions": len(service.sessions.peers),
            "active_prefetch_jobs": service.tiering.fetches.open if service.tiering is not None else 0,
            "config": self._config.redacted(),
            "arena": {
                "path": str(arena.path),
                "bytes": arena.size_bytes,
                "numa_nodes": arena.nodes,
                "backed_bytes": arena.backed_bytes,
                "huge_bytes": arena.huge_bytes,
                "pages": arena.pages,
                "used_bytes": l1.used_bytes(),
                "free_bytes": l1.slabs.free_bytes,
                "quarantined_bytes": l1.quarantined_bytes,
            },
            "index": {
                "chunks": l1.chunks,
                "index_bytes": l1.index_bytes(),
                "leases": l1.open_leases,
                "reservations": l1.open_reservations,
                "pins": len(l1.pins),
                "pinned_chunks": l1.pinned_chunks,
                "pinned_bytes": l1.pinned_bytes,
                "pinnable_bytes": l1.pinnable_bytes,
                "spaces": [
                    {
                        "space": space.number,
                        "model": service.model_of(space.number),
                        "shards": space.shards,
                        "chunks": len(space.table),
                        "shard_bytes": space.shard_bytes,
                        "sisters": [one.number for one in space.sisters],
                        "evicts_as_lru": space.table.follows_lru(),
                    }
                    for space in l1.spaces
                ],
            },
            "eviction": {
                "policy": self._service.eviction.name,
                "prompts_learned_from": self._service.eviction.prompts,
                "answers_learned_from": self._service.eviction.answers,
            },
            "engines": [
                {
                    "instance": peer.instance,
                    "role": peer.role,
                    "rank": peer.rank,
                    "pid": peer.pid,
                    "endpoint": peer.endpoint,
                    "payload_frames": peer.payload,
                    "connected_seconds": round(now - peer.since, 1),
                    "layout": peer.layout,
                }
                for peer in service.sessions.peers
                if peer.role != PEER
            ],
            "pulling_servers": [
                {
                    "instance": peer.instance,
                    "host": peer.host,
                    "connected_seconds": round(now - peer.since, 1),
                    "held_bytes": peer.held_bytes,
                }
                for peer in service.sessions.peers
                if peer.role == PEER
            ],
            "refused_engines": service.sessions.refused.status(),
            "tiers": service.tiering.report.status() if service.tiering is not None else [],
            "fetches": self._last_fetches(),
            "prediction": service.predicting.status() if service.predicting is not None else None,
            "counters": self._counters(),
        }

    def _last_fetches(self) -> list[dict[str, object]]:
        tiering = self._service.tiering
        if tiering is None:
            return []
        return [tiering.report.describe(one) for one in islice(reversed(tiering.fetches.records), REPORTED_FETCHES)]

    def _counters(self) -> dict[str, float]:
        service, l1, arena = self._service, self._service.l1, self._service.l1.arena
        out: dict[str, float] = {}
        for kind in KINDS:
            out[f"{kind}_chunks_total"] = l1.events.counters[kind]
        for name, value in l1.events.counters.items():
            kind, _, reason = name.partition(":")
            if reason and kind in KINDS:
                out[f'{kind}_chunks_by_reason_total{{reason="{reason}"}}'] = value
        for name in ("stored_tokens", "retrieved_tokens", "renewed_leases", "failed_loads", "failed_stores", "malformed_messages",
                     "refused_requests", "failed_requests", "internal_errors",
                     "unsent_answers", "unanswered_messages", "news_chunks", "news_overflows", "lent_shards", "lent_bytes",
                     "lent_by_nixl_bytes", "awaited_pulls"):  # fmt: skip
            out[f"{name}_total"] = service.counters[name]
        out |= self._token_counters()
        accounts = service.accounts
        out |= {"blended_requests_total": accounts.blended_requests, "blended_tokens_total": accounts.blended_tokens}
        out["blend_recomputed_tokens_total"] = accounts.recomputed_tokens
        out["failed_effects_total"] = l1.events.counters["failed_effects"]
        for reason, count in service.sessions.refused.counts.items():
            out[f'refused_engines_total{{reason="{reason}"}}'] = count
        out["store_seconds_total"] = service.counters["stored_microseconds"] / 1e6
        out["retrieve_seconds_total"] = service.counters["retrieved_microseconds"] / 1e6
        for name, value in service.counters.items():
            kind, _, reason = name.partition(":")
            if reason:
                out[f'{kind}_chunks_total{{reason="{reason}"}}'] = value
        out[f'eviction_policy{{policy="{service.eviction.name}"}}'] = 1
        out["eviction_prompts_total"] = service.eviction.prompts
        if service.recording is not None:
            out["trace_recorded_events_total"] = service.recording.recorded
            out["trace_lost_events_total"] = service.recording.lost
        if service.predicting is not None:
            out |= service.predicting.counters()
        if service.tiering is not None:
            out |= service.tiering.report.counters()
        if service.tracing is not None:
            out |= service.tracing.counters()
        out["loop_errors_total"] = self._loop.errors
        out |= {
            "chunks": l1.chunks,
            "complete_chunks": sum(space.complete for space in l1.spaces),
            "leases": l1.open_leases,
            "reservations": l1.open_reservations,
            "pins": len(l1.pins),
            "pinned_chunks": l1.pinned_chunks,
            "pinned_bytes": l1.pinned_bytes,
            "pinnable_bytes": l1.pinnable_bytes,
            "prefetches_running": self.operating.running_prefetches,
            "promised_chunks": len(l1.promises.by_chunk),
            "engine_processes": sum(peer.role != PEER for peer in service.sessions.peers),
            "pulling_servers": len({peer.instance for peer in service.sessions.peers if peer.role == PEER}),
            "arena_bytes": arena.size_bytes,
            "arena_backed_bytes": arena.backed_bytes,
            "arena_used_bytes": l1.used_bytes(),
            "quarantined_bytes": l1.quarantined_bytes,
            "index_bytes": l1.index_bytes(),
        }
        return out

    def _blocks_and_totals(self) -> tuple[Blocks, dict[str, float]]:
        totals = self._token_counters()  # accounts for what waits for that, so it comes first
        return self._service.accounts.records.blocks(), totals

    def _token_counters(self) -> dict[str, float]:
        self._loop.settle()
        accounts = self._service.accounts
        out: dict[str, float] = {"requested_tokens_total": accounts.requested}
        out |= {f'lookup_tokens_total{{source="{source}"}}': count for source, count in accounts.found.items()}
        out |= {f'missed_tokens_total{{reason="{reason}"}}': count for reason, count in accounts.missed.items()}
        return out


def _check_reads_no_secrets(url: str) -> None:
    """Check that a URL that came over HTTP makes the server read neither its environment nor files with secrets, and send no
    credentials of its own to a place that the URL names: whoever names a store could have them sent there."""
    scheme, _, rest = url.partition("://")
    # Not `urlsplit`, which refuses lists of hosts that a tier may have.
    options = [name for name, _ in parse_qsl(rest.partition("?")[2], keep_blank_values=True)]
    if scheme in _SEND_CREDENTIALS and "endpoint" in options:
        raise ConfigError(
            f"over HTTP the URL of a tier may not name the endpoint of {scheme}://, to which the server would send its own "
            "credentials: write the tier into the server's configuration file, and send SIGHUP"
        )
    if scheme == "peer" and "directory" in options:
        raise ConfigError("over HTTP no directory of peers can be named: write --peers into the server's settings")
    if "${" in unquote(url) or any(name.endswith("_file") for name in options):
        raise ConfigError(
            "over HTTP the URL of a tier may name neither ${VARIABLES} of the server nor files with secrets (..._file=): write "
            "the tier into the server's configuration file, and send SIGHUP"
        )
