"""The scheduler's half for TensorRT-LLM, without a server. What it does with one is in tests/tensorrt_llm."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lmcache.chunks import TokenChain
from lmcache.integration.tensorrt_llm import scheduler as module
from lmcache.integration.tensorrt_llm.scheduler import SchedulerHalf


class Session:
    """Knows nothing of any prompt, and keeps what it was asked."""

    epoch = b"epoch"

    def __init__(self) -> None:
        self.rates: list[float] = []

    def new_chain(self, *salts: Any, **more: Any) -> TokenChain:
        return TokenChain(bytes(16), 16)

    def lookup(self, chain: TokenChain, skip_tokens: int, prefill_rate: float, *, request_id: str) -> None:
        self.rates.append(prefill_rate)


class Request(SimpleNamespace):
    def get_tokens(self, beam: int) -> list[int]:
        return list(range(100))


def test_how_fast_prompts_were_computed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load from a tier is judged by it."""
    session, now = Session(), [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    watch = SimpleNamespace(all_have=lambda epoch: True)
    half = SchedulerHalf(session, watch, 16)  # type: ignore[arg-type]
    monkeypatch.setattr(half, "_chain", lambda tracker: session.new_chain())
    half.match(Request(request_id=1), 0)
    for seconds, new, cached in ((0.0, 600, 400), (0.5, 0, 8), (9.0, 0, 400), (0.8, 1, 0)):
        now[0] += seconds
        step = [[SimpleNamespace(request_id=9, num_scheduled_tokens=tokens)] * bool(tokens) for tokens in (new, cached)]
        half.plan_step(SimpleNamespace(new_requests=step[0], cached_requests=step[1]))
    half.match(Request(request_id=2), 0)
    assert session.rates == [0.0, pytest.approx(2000 - 0.05 * (2000 - 500))], "decodes and pauses count little"
