"""KV events: what a router learns of LMCache from vLLM's own event stream."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_processes import Engine, Server

from ports import free_port
from prompts import tokens

Event = dict[str, Any]
PROMPT = tokens(300, 601)
BLOCK = 128
"""Tokens of a block of vLLM-CPU: eight chunks."""


class Router:
    """Follows the events of one engine, and keeps which block hashes each medium has, as a router does."""

    def __init__(self, engine: Engine, endpoint: str) -> None:
        self.engine, self.endpoint, self.next = engine, endpoint, 0
        self.events: list[Event] = []
        self.media: dict[str, dict[int, Event]] = {"GPU": {}, "CPU": {}, "STORAGE": {}}

    def follow(self) -> None:
        """Let the engine make a step, since it is silent while it is idle, and take what it has published."""
        self.engine.generate([tokens(4, 9)], max_tokens=1)
        told = self.engine.ask("kv_events", endpoint=self.endpoint, start=self.next)
        self.next = told["next"]
        for event in told["events"]:
            self.take(event)

    def take(self, event: Event) -> None:
        self.events.append(event)
        if event["type"] == "AllBlocksCleared":
            for medium in self.media.values():
                medium.clear()
            return
        medium = self.media[event["medium"]]
        if event["type"] == "BlockRemoved":
            for block in event["block_hashes"]:
                assert block in medium, "nothing is removed that was not stored"
                del medium[block]
            return
        size, parent = event["block_size"], event["parent_block_hash"]
        assert parent is None or parent in medium, "a router drops events whose parent it does not know"
        assert size == BLOCK and len(event["token_ids"]) == size * len(event["block_hashes"])
        for at, block in enumerate(event["block_hashes"]):
            assert block not in medium, "nothing is stored twice"
            medium[block] = {"tokens": event["token_ids"][at * size : (at + 1) * size], "parent": parent}
            medium[block] |= {
                key: event.get(key) for key in ("group_idx", "kv_cache_spec_kind", "lora_id", "lora_name")
            }
            parent = block

    def until(self, ready: Callable[[], bool], what: str) -> None:
        def followed() -> bool:
            self.follow()
            return ready()

        self.engine.wait_until(followed, what, 120)


def test_routers_learn_what_the_server_has(folder: Path, model: Path) -> None:
    endpoint, replay = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    config = {"enable_kv_cache_events": True, "endpoint": endpoint.replace("127.0.0.1", "*"), "replay_endpoint": replay}
    small = "--l1-size-gb", "0.02", "--l2", f"disk://{folder}/events?max_gb=1", "--worth", "always"
    server = Server(folder, 16, 0, "events", *small)
    engine = Engine(
        folder,
        "events",
        model,
        kv_transfer_config=server.config(),
        kv_events_config=config,
        max_model_len=2048,
    )
    try:
        engine.connected()
        router = Router(engine, replay)
        gpu, cpu, storage = (router.media[medium] for medium in ("GPU", "CPU", "STORAGE"))
        engine.generate([PROMPT])
        router.until(lambda: len(cpu) == len(storage) == 2, "the prompt's two full blocks")
        assert cpu == storage == gpu, "the same blocks as in vLLM's own events, with the same tokens and parents"
        first, second = cpu
        assert [one["tokens"] for one in cpu.values()] == [PROMPT[:BLOCK], PROMPT[BLOCK : 2 * BLOCK]]
        engine.generate([tokens(600, 610 + at) for at in range(3)])
        router.until(lambda: first not in cpu and second not in cpu, "the eviction of the prompt")
        assert {first, second} <= set(storage)
        assert cpu, "the later ones are there"
        engine.forget()
        engine.generate([PROMPT])
        router.until(lambda: {first, second} <= set(cpu), "what a tier has brought back")
        urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{server.http_port}/clear-cache", b"", method="POST"), timeout=60
        ).close()
        router.until(lambda: not cpu, "the end of all blocks of L1")
        assert {first, second} <= set(gpu)
        server.end()
        router.until(lambda: not storage, "the end of everything with the server")
        assert "publishes no KV events any more" not in engine.text()
    finally:
        engine.end()
        server.end()
