"""What the server says about itself: health, status and counters, read in the loop's thread on behalf of the HTTP face."""

from __future__ import annotations

import os
import time

from lmcache import __version__
from lmcache.config.server import ServerConfig
from lmcache.server.loop import Loop
from lmcache.server.service import Service


class Report:
    """Implements `control.Control`. Every method may be called from any thread and answers within a second, or raises
    TimeoutError, which the face tells as an unhealthy server."""

    def __init__(self, config: ServerConfig, loop: Loop, service: Service) -> None:
        self._config, self._loop, self._service = config, loop, service

    def health(self) -> tuple[bool, str]:
        """(True, "") when the heart answers; the faces live in the same thread as the heart."""
        arena = self._service.arena
        if self._loop.ask(lambda: arena.named and not arena.path.exists()):
            return False, f"the arena file {arena.path} has been removed"
        return True, ""

    def clear(self) -> dict[str, object]:
        """Empty L1; chunks that are leased vanish from the index at once and from memory when their readers are done."""
        return {"cleared_chunks": self._loop.ask(self._service.clear, 30.0)}

    def status(self) -> dict[str, object]:
        return self._loop.ask(self._status)

    def counters(self) -> dict[str, float]:
        return self._loop.ask(self._counters)

    def _status(self) -> dict[str, object]:
        service, heart, arena = self._service, self._service.heart, self._service.arena
        return {
            "version": __version__,
            "pid": os.getpid(),
            "server_id": service.server_id.hex(),
            "uptime_seconds": round(time.time() - service.started, 1),
            "config": self._config.redacted(),
            "arena": {
                "path": str(arena.path),
                "bytes": arena.size_bytes,
                "backed_bytes": arena.backed_bytes,
                "used_bytes": heart.used_bytes(),
                "free_bytes": heart.slabs.free_bytes,
                "quarantined_bytes": heart.quarantined_bytes,
            },
            "index": {
                "chunks": heart.chunks,
                "index_bytes": heart.index_bytes(),
                "leases": heart.open_leases,
                "reservations": heart.open_reservations,
                "spaces": [
                    {
                        "space": space.number,
                        "shards": space.shards,
                        "chunks": len(space.table),
                        "slot_bytes": space.slot_bytes,
                    }
                    for space in heart.spaces
                ],
            },
            "engines": [
                {
                    "instance": peer.instance,
                    "role": peer.role,
                    "rank": peer.rank,
                    "pid": peer.pid,
                    "face": peer.face,
                    "payload_frames": peer.payload,
                    "connected_seconds": round(time.time() - peer.since, 1),
                    "layout": peer.layout,
                }
                for peer in service.peers
            ],
            "counters": self._counters(),
        }

    def _counters(self) -> dict[str, float]:
        service, heart, arena = self._service, self._service.heart, self._service.arena
        out: dict[str, float] = {}
        for kind in ("hit", "missed", "stored", "evicted", "cleared", "incomplete", "reserved", "committed", "dropped",
                     "refused", "expired"):  # fmt: skip
            out[f"{kind}_chunks_total"] = heart.counters[kind]
        for name, value in heart.counters.items():
            kind, _, reason = name.partition(":")
            if reason:
                out[f'{kind}_chunks_by_reason_total{{reason="{reason}"}}'] = value
        for name in ("stored_tokens", "retrieved_tokens", "failed_loads", "failed_stores", "malformed_messages", "turned_away",
                     "refused_requests", "failed_requests", "internal_errors", "unsent_answers"):  # fmt: skip
            out[f"{name}_total"] = service.counters[name]
        out["store_seconds_total"] = service.counters["stored_microseconds"] / 1e6
        out["retrieve_seconds_total"] = service.counters["retrieved_microseconds"] / 1e6
        for name, value in service.counters.items():
            kind, _, reason = name.partition(":")
            if reason:
                out[f'{kind}_chunks_total{{reason="{reason}"}}'] = value
        out["loop_errors_total"] = self._loop.errors
        out |= {
            "chunks": heart.chunks,
            "leases": heart.open_leases,
            "reservations": heart.open_reservations,
            "engine_processes": len(service.peers),
            "arena_bytes": arena.size_bytes,
            "arena_backed_bytes": arena.backed_bytes,
            "arena_used_bytes": heart.used_bytes(),
            "quarantined_bytes": heart.quarantined_bytes,
            "index_bytes": heart.index_bytes(),
        }
        return out
