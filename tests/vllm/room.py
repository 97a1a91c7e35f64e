"""Prints after how many steps a passage gets room for which it has to wait, while a passage is stored at every step."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

sys.modules["lmcache.integration.vllm.blender"] = SimpleNamespace(Blender=None)  # type: ignore[assignment]  # needs all of vLLM
from lmcache.chunks.passages import Passage  # noqa: E402
from lmcache.engine import Done  # noqa: E402
from lmcache.integration.vllm.passages import Passages, Room  # noqa: E402


class Session:
    """Copies of which each ends one step late. dropped: why passages were not stored."""

    def __init__(self) -> None:
        self.running: list[Done] = []
        self.ended: list[Done] = []
        self.dropped: list[str] = []

    def load(self, job_id: str, load: Any) -> None:
        self.running.append(Done(job_id, "load", True, 0, 0.0))

    def store(self, job_id: str, store: Any) -> None:
        self.running.append(Done(job_id, "store", True, 0, 0.0))

    def drop(self, chunks: int, reason: str) -> None:
        self.dropped.append(reason)

    def finished(self) -> list[Done]:
        ended, self.ended, self.running = self.ended, self.running, []
        return ended


class FakeRoom(Room):
    """Room for 64 tokens, of which nothing is copied."""

    def __init__(self) -> None:
        self.tokens, self._free = 64, [Passage(0, 64)]

    def get(self, place: int, tokens: Passage, blocks: Any) -> None: ...


def plan(number: int) -> Any:
    from lmcache.engine import StorePlan

    store = StorePlan(f"store-{number}", "r", 16, b"p" * 16, b"h" * 16, 0, [])
    return SimpleNamespace(plan=store, passage=Passage(0, 16), blocks=[])


def main() -> None:
    session = Session()
    passages = Passages(SimpleNamespace(turns=()), FakeRoom(), session, 0)  # type: ignore[arg-type]
    load = SimpleNamespace(job_id="load-1", job=lambda *_: None)
    blend: Any = SimpleNamespace(request_id="b", passages=[(Passage(0, 64), load)], prefix=None)
    steps = 0
    passages.store([plan(0)], True)
    passages.begin([blend], 0, None)  # type: ignore[arg-type]
    (waiting,) = passages._waiting
    while not waiting.places and steps < 100:
        steps += 1
        passages.store([plan(steps)], True)
        passages._copies.collect()
        passages.begin([], 0, None)  # type: ignore[arg-type]
    print("ANSWER", json.dumps({"steps": steps, "dropped": session.dropped}))


if __name__ == "__main__":
    main()
