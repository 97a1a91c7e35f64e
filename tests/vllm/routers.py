"""A router that follows the KV events of an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_processes import Engine

from ports import free_port
from prompts import tokens

Event = dict[str, Any]


def publishing() -> dict[str, Any]:
    """The value of --kv-events-config for an engine that publishes at ports of its own."""
    endpoint, replay = (f"tcp://{host}:{free_port()}" for host in ("*", "127.0.0.1"))
    return {"enable_kv_cache_events": True, "endpoint": endpoint, "replay_endpoint": replay}


class Router:
    """Keeps which blocks each medium has, by vLLM's hashes, and fails where a router would be misled or drop an event."""

    def __init__(self, engine: Engine, config: dict[str, Any], block_tokens: int) -> None:
        self.engine, self.endpoint, self.block_tokens = engine, config["replay_endpoint"], block_tokens
        self.next = 0
        self.media: dict[str, dict[int, Event]] = {"GPU": {}, "CPU": {}, "STORAGE": {}}
        self.cleared: set[int] = set()
        """What went with `AllBlocksCleared`, by which some routers forget the GPU's blocks and others everything."""

    def follow(self) -> None:
        """Let the engine make a step, since it is silent while it is idle, and take what it has published."""
        self.engine.generate([tokens(4, 9)], max_tokens=1)
        told = self.engine.ask("kv_events", endpoint=self.endpoint, start=self.next)
        self.next = told["next"]
        for event in told["events"]:
            self.take(event)

    def take(self, event: Event) -> None:
        if event["type"] == "AllBlocksCleared":
            for medium in self.media.values():
                self.cleared |= set(medium)
                medium.clear()
            return
        medium = self.media[event["medium"]]
        if event["type"] == "BlockRemoved":
            for block in event["block_hashes"]:
                assert block in medium or block in self.cleared, "removed, and not stored"
                medium.pop(block, None)
            return
        size, parent = event["block_size"], event["parent_block_hash"]
        assert parent is None or parent in medium, "a router drops events whose parent it does not know"
        assert size == self.block_tokens and len(event["token_ids"]) == size * len(event["block_hashes"])
        for at, block in enumerate(event["block_hashes"]):
            assert block not in medium or event["medium"] == "GPU", "stored twice"
            medium[block] = {"tokens": event["token_ids"][at * size : (at + 1) * size], "parent": parent}
            medium[block] |= {
                name: event.get(name) for name in ("group_idx", "kv_cache_spec_kind", "lora_id", "lora_name")
            }
            medium[block]["extra"] = (event.get("extra_keys") or {at: None})[at]
            parent = block

    def until(self, ready: Callable[[], bool], what: str) -> None:
        def followed() -> bool:
            self.follow()
            return ready()

        self.engine.wait_until(followed, what, 120)

    def prefix(self, prompt: list[int], medium: str) -> int:
        """How many tokens of the prompt the router believes to be there."""
        children = {(one["parent"], tuple(one["tokens"])): block for block, one in self.media[medium].items()}
        parent, at, size = None, 0, self.block_tokens
        while (parent := children.get((parent, tuple(prompt[at : at + size])))) is not None:
            at += size
        return at
