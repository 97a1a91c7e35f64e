"""Predicting: what other sizes of L1 would find, estimated while the server runs (`sizing.curve`), for /status and /metrics."""

from __future__ import annotations

from collections import Counter

from lmcache.cache import Event, Heart
from lmcache.server.aside import Aside, chunk_sizes
from lmcache.server.loop import Loop
from lmcache.sizing.curve import FACTORS, Curve, Estimate, Point


class Predicting:
    """The estimate of one server. tiers: whether lookups also find what tiers have."""

    def __init__(self, loop: Loop, l1: Heart, chunk_tokens: int, tiers: bool) -> None:
        self._l1, self._chunk_tokens, self._curve = l1, chunk_tokens, Curve(l1.total_bytes, by_found=not tiers)
        self._sizes: Counter[int] = Counter()
        self._estimate: Estimate | None = None
        self._heard_events = self._estimated_events = 0
        self._aside = Aside(loop.runtime, "lmcache-predict", self._handle, self._after)
        self.close = self._aside.close
        l1.events.listen(["stored"], self._heard)
        l1.events.listen(["answered"], self._heard, named=False)
        l1.events.listen(["cleared"], self._aside.put, named=False)
        loop.on_tick.append(self._note_sizes)

    def tiers_joined(self) -> None:
        """Note that from now on lookups also find what tiers have. It stays so if they leave: the counts until then are
        theirs."""
        self._curve.by_found = False

    def _heard(self, event: Event) -> None:
        if event.space not in self._sizes:
            self._note_sizes()
        self._aside.put(event)

    def _note_sizes(self) -> None:
        self._sizes = chunk_sizes(self._l1.spaces)

    # In the thread

    def _handle(self, now: float, event: Event) -> None:
        self._heard_events += 1
        size = self._sizes[event.space]
        if event.kind == "cleared":
            self._curve.clear()
        elif size:  # 0 if the space has been closed meanwhile
            if event.kind == "stored":
                self._curve.stored(event.hashes, size)
            else:
                self._curve.looked_up(event.hashes, event.found, size)

    def _after(self) -> None:
        if self._heard_events != self._estimated_events:
            self._estimate, self._estimated_events = self._curve.estimate(), self._heard_events

    # What it tells. Any thread may ask.

    def status(self) -> dict[str, object]:
        """Return the estimate as /status has it; {} before the first lookup."""
        estimate = self._estimate
        if estimate is None:
            return {}
        sizes = zip(FACTORS, estimate.sizes, strict=True)
        return {
            "asked_tokens": estimate.asked_chunks * self._chunk_tokens,
            "sizes": [
                {"times_l1": factor, "l1_bytes": int(factor * self._l1.total_bytes), **_as_json(point)}
                for factor, point in sizes
            ],
            "unlimited": _as_json(estimate.unlimited),
            "sampling_rate": round(estimate.rate, 6),
            "sampled_chunks": estimate.sampled_chunks,
            "lost_events": self._aside.lost,
        }

    def counters(self) -> dict[str, float]:
        """Return the estimate as /metrics has it."""
        estimate = self._estimate
        if estimate is None:
            return {}
        points = [*((f"{factor:g}", point) for factor, point in zip(FACTORS, estimate.sizes, strict=True))]
        out: dict[str, float] = {}
        for times, point in [*points, ("unlimited", estimate.unlimited)]:
            out[f'predicted_token_hit_ratio{{times_l1="{times}"}}'] = point.ratio
            out[f'predicted_token_hit_ratio_low{{times_l1="{times}"}}'] = point.low
            out[f'predicted_token_hit_ratio_high{{times_l1="{times}"}}'] = point.high
        return out


def _as_json(point: Point) -> dict[str, float]:
    return {"token_hit_ratio": round(point.ratio, 6), "low": round(point.low, 6), "high": round(point.high, 6)}
