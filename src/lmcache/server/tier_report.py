"""Reports on the tiers: /status, /metrics, records of fetches, and log lines about chunks that were not written."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from lmcache.cache.fetch import Fetches
from lmcache.cache.waits import AWAITED, REMOVED, FetchRecord
from lmcache.observability.log import init_logger
from lmcache.server.tier_runner import TierRunner

logger = init_logger(__name__)
_LOSSES_SECONDS = 10.0
"""Losses of a tier are logged at most that often, in one line for all since the last line."""
_REMEDIES = {
    "queue full": "a higher --l2-queue-gb lets more chunks wait",
    "evicted": "a higher --l1-size-gb keeps chunks longer",
    "full": "set its max_gb below the capacity of its store",
    "too large": "set a higher max_gb or a lower --chunk-size",
}
"""Reason for which something was not written -> remedy."""


class TierReport:
    """Reports on these tiers, nearest first, on those that are leaving, and on the fetches from them and from other engines. now:
    the loop's clock. All methods but `describe` are called in the loop's thread."""

    def __init__(
        self,
        now: Callable[[], float],
        runners: Sequence[TierRunner],
        leaving: Sequence[TierRunner],
        fetches: Fetches,
        names: Mapping[int, str],
        chunk_tokens: int,
    ) -> None:
        self._now, self._runners, self._fetches, self._chunk_tokens = now, runners, fetches, chunk_tokens
        self._leaving, self._names = leaving, names
        self.gone: dict[str, tuple[Counter[str], Counter[str]]] = {}
        """Name of a removed tier -> the counters of its runner and of its queue, which go on if it returns."""
        self._losses = dict[TierRunner, tuple[float, Counter[str]]]()
        """Runner -> time of the last line about losses, and all counters at that time."""
        self._unwritten: Counter[str] = Counter()
        """Name of the tier -> number of unwritten chunks in the last log line."""

    def joined(self, runner: TierRunner) -> None:
        """Note a tier that has joined."""
        for counters, before in zip(
            (runner.counters, runner.queue.counters), self.gone.pop(runner.name, ()), strict=False
        ):
            counters.update(before)
        self._losses[runner] = float("-inf"), runner.counters + runner.queue.counters

    def left(self, runner: TierRunner) -> None:
        """Note a tier that has left, and log what was not written to it."""
        if runner in self._losses:
            self.log_losses(math.inf, [runner])
            del self._losses[runner]
            self.gone[runner.name] = runner.counters, runner.queue.counters

    def degraded(self) -> list[str]:
        """Return the tiers that do not serve now, or only in part, each with the reason."""
        states = [(runner.name, runner.state(self._now())[1]) for runner in self._runners]
        return [f"{name}: {trouble}" for name, trouble in states if trouble]

    def status(self) -> list[dict[str, object]]:
        """Return the tiers for /status, nearest first. JSON types only."""
        found = []
        for runner in self._runners:
            usage, (state, trouble) = runner.usage(), runner.state(self._now())
            pace = self._fetches.paces[runner.number]
            rate, ask = pace.bytes_per_second, pace.ask_seconds
            found.append(
                {
                    "name": runner.name,
                    "url": runner.spec.url,
                    "state": state,
                    "reason": trouble or runner.breaker.reason,
                    "read": runner.spec.read,
                    "write": runner.spec.write,
                    "stored_bytes": usage.stored_bytes,
                    "shards": usage.shards,
                    "max_bytes": usage.max_bytes,
                    "queued_bytes": runner.queue.queued_bytes,
                    "queued_chunks": len(runner.queue),
                    "kept_back_chunks": runner.queue.kept_back,
                    "load_bytes_per_second": None if rate is None else round(rate),
                    "ask_seconds": None if ask is None else round(ask, 6),
                    "codec": None if runner.coder is None else runner.coder.status(),
                    "counters": dict(runner.counters) | dict(runner.queue.counters),
                }
            )
        return found

    def describe(self, record: FetchRecord) -> dict[str, object]:
        """Return a fetch's record with the names of the tiers. JSON types only."""

        def name(tier: int) -> str:
            return "other engines" if tier == AWAITED else self._names.get(tier, REMOVED)

        return {
            "request": " ".join(record.requests),
            "prompt": record.prompt[-4:].hex(),
            "space": record.space,
            "ended_seconds_ago": round(self._now() - record.ended, 1),
            "asked_chunks": record.asked_chunks,
            "l1_chunks": record.l1_chunks,
            "expected_seconds": _finite(record.expected_seconds),
            "recompute_seconds": _finite(record.recompute_seconds),
            "decision": record.decision,
            "waited_seconds": round(record.waited_seconds, 6),
            "outcome": record.outcome,
            "arrived_chunks": record.arrived_chunks,
            "from": {name(tier): chunks for tier, chunks in record.planned.items()},
            "events": dict(record.events),
            "left_out": {name(tier): why for tier, why in record.left_out.items()},
        }

    def counters(self) -> dict[str, float]:
        """Return the counters for /metrics, labelled by tier."""
        awaited = self._fetches.counters["awaited"]
        out: dict[str, float] = {
            "fetches_open": self._fetches.open,
            "awaited_tokens_total": awaited * self._chunk_tokens,
        }
        now = self._now()
        for name, value in self._fetches.counters.items():
            kind, _, reason = name.partition(":")
            if kind in ("fetches", "awaits") and reason:
                out[f'{kind}_by_end_total{{reason="{reason}"}}'] = value
            elif kind == "late_answers":
                out[f'fetched_chunks_late_answers_total{{tier="{reason}"}}'] = value
            elif not reason:
                out[f"{'fetches' if kind == 'fetches' else f'fetched_chunks_{kind}'}_total"] = value
        last = self._fetches.last
        if last is not None:
            out["last_fetch_expected_seconds"] = last.expected_seconds or 0.0
            out["last_fetch_recompute_seconds"] = last.recompute_seconds or 0.0
            out["last_fetch_loaded"] = last.decision == "load"
        for runner in self._runners:
            label, usage, pace = f'{{tier="{runner.name}"}}', runner.usage(), self._fetches.paces[runner.number]
            out |= {
                f"tier_serving{label}": not runner.state(now)[1],
                f"tier_stored_bytes{label}": usage.stored_bytes,
                f"tier_shards{label}": usage.shards,
                f"tier_queued_bytes{label}": runner.queue.queued_bytes,
                f"tier_load_bytes_per_second{label}": pace.bytes_per_second or 0.0,
                f"tier_ask_seconds{label}": pace.ask_seconds or 0.0,
            }
            if runner.coder is not None:
                out[f"tier_encoded_bytes_total{label}"] = runner.coder.raw_bytes
                out[f"tier_encoded_stored_bytes_total{label}"] = runner.coder.stored_bytes
                out[f"tier_rounded_bytes_total{label}"] = runner.coder.rounded_bytes
        for tier, both in self.counted().items():
            for name, value in (*both[0].items(), *both[1].items()):
                kind, _, reason = name.partition(":")
                labels = f'{{tier="{tier}",reason="{reason}"}}' if reason else f'{{tier="{tier}"}}'
                out[f"tier_{kind}_total{labels}"] = value
        return out

    def counted(self) -> dict[str, tuple[Counter[str], Counter[str]]]:
        """Return the counters of each tier and of its queue by name, with those of removed tiers, which go on if they return."""
        joined = [one for one in (*self._leaving, *self._runners) if one in self._losses]  # not one that never opened
        return self.gone | {one.name: (one.counters, one.queue.counters) for one in joined}

    def leaving(self) -> list[dict[str, object]]:
        """Return the tiers that are being removed. JSON types only."""
        return [
            {
                "name": runner.name,
                "url": runner.spec.url,
                "queued_chunks": len(runner.queue),
                "queued_bytes": runner.queue.queued_bytes,
                "under_way": dict(runner.under_way),
            }
            for runner in self._leaving
        ]

    def log_losses(self, now: float, runners: Sequence[TierRunner] | None = None) -> None:
        """Log what was not written since the last line, for each tier whose last line is old enough. now: infinity at the end."""
        for runner in self._runners if runners is None else runners:
            logged_at, before = self._losses[runner]
            counters = runner.counters + runner.queue.counters
            parts = _losses(counters - before) if now - logged_at >= _LOSSES_SECONDS else []
            if parts:
                self._losses[runner] = now, counters
                logger.warning("Tier %s: not written: %s", runner.name, "; ".join(parts))

    def log_drain(self, seconds: float) -> None:
        """Log how many chunks are still written before the end, which takes at most `seconds`."""
        waiting = sum(len(runner.queue) + runner.chunks_being_written for runner in (*self._runners, *self._leaving))
        if waiting:
            logger.info(
                "Writing %d chunks to tiers before the server ends, for up to %g s; a second signal ends this",
                waiting,
                seconds,
            )

    def log_left_behind(self, waited_seconds: float) -> None:
        """Log the tiers that could not be closed, because their operations have not ended."""
        for runner in (one for one in (*self._runners, *self._leaving) if not one.closed):
            methods = runner.under_way
            logger.warning(
                "Tier %s is abandoned: %d calls (%s) have not returned after %.1f s; check whether %s answers",
                runner.name,
                methods.total(),
                ", ".join(f"{count} of {method}" for method, count in methods.items()),
                waited_seconds,
                runner.spec.url,
            )

    def log_unwritten(self, given_up: bool = False) -> None:
        """Log the chunks that still wait when the server ends. given_up: count those being written as unwritten, too."""
        for runner in self._runners:
            left = len(runner.queue) + given_up * runner.chunks_being_written
            if left > self._unwritten[runner.name]:
                logger.warning("Tier %s: %d chunks could not be written before the server ended", runner.name, left)
                self._unwritten[runner.name] = left


def _finite(seconds: float | None) -> float | None:
    """Return seconds for JSON, which has no infinity: a rate that an engine tells may be as good as 0."""
    return None if seconds is None or not math.isfinite(seconds) else round(seconds, 6)


def _losses(new: Counter[str]) -> list[str]:
    """Describe the chunks and shards that these counters report as not written, by reason, with the remedy."""
    parts = []
    for name, count in new.items():
        kind, _, reason = name.partition(":")
        unit = {"lost": "chunks", "unwritten": "shards"}.get(kind)
        if unit is not None:
            mebibytes = new[f"{kind}_bytes:{reason}"] / 2**20
            remedy = f": {_REMEDIES[reason]}" if reason in _REMEDIES else ""
            parts.append(f"{count} {unit} ({mebibytes:,.1f} MiB), {reason}{remedy}")
    return parts


def log_decision(record: FetchRecord) -> None:
    """Log the decision between loading and computing, with the two times."""
    if logger.isEnabledFor(logging.DEBUG):
        requests = " ".join(record.requests)
        logger.debug(
            "Prompt %s (%s): loading is expected to take %.3f s, computing %.3f s: %s",
            record.prompt[-4:].hex(),
            requests or "no request id",
            record.expected_seconds or 0.0,
            record.recompute_seconds or 0.0,
            "loading" if record.decision == "load" else record.decision,
            extra={"request": requests},
        )
