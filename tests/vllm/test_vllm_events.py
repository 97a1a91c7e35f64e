"""KV events: what a router learns of LMCache from vLLM's own event stream."""

from __future__ import annotations

import urllib.request
from pathlib import Path

from routers import Router, publishing
from vllm_processes import Engine, Server

from prompts import tokens

PROMPT, SALTED = tokens(300, 601), tokens(280, 602)
BLOCK = 128
"""Tokens of a block of vLLM-CPU: eight chunks."""


def test_routers_learn_what_the_server_has(folder: Path, model: Path) -> None:
    config = publishing()
    small = "--l1-size-gb", "0.02", "--l2", f"disk://{folder}/events?max_gb=1", "--worth", "always"
    server = Server(folder, 16, 0, "events", *small)
    engine = Engine(
        *(folder, "events", model),
        kv_transfer_config=server.config(),
        kv_events_config=config,
        max_model_len=2048,
    )
    try:
        engine.connected()
        router = Router(engine, config, BLOCK)
        gpu, cpu, storage = (router.media[medium] for medium in ("GPU", "CPU", "STORAGE"))
        engine.generate([PROMPT, SALTED], salts=["", "salt"])
        router.until(lambda: len(cpu) == len(storage) == 4, "both prompts' two full blocks")
        assert cpu == storage == gpu, "the same blocks as in vLLM's own events, with the same tokens and parents"
        assert router.prefix(PROMPT, "CPU") == 2 * BLOCK == router.prefix(SALTED, "STORAGE")
        assert sorted(str(one["extra"]) for one in cpu.values()) == ["None", "None", "None", "['salt']"]
        engine.generate([tokens(600, 610 + at) for at in range(3)])
        router.until(lambda: not router.prefix(PROMPT, "CPU"), "the eviction of the prompt")
        assert router.prefix(PROMPT, "STORAGE") == 2 * BLOCK and cpu
        engine.forget()
        engine.generate([PROMPT])
        router.until(lambda: router.prefix(PROMPT, "CPU") == 2 * BLOCK, "what a tier has brought back")
        url = f"http://127.0.0.1:{server.http_port}/clear-cache"
        urllib.request.urlopen(urllib.request.Request(url, b"", method="POST"), timeout=60).close()
        router.until(lambda: not cpu, "the end of all blocks of L1")
        assert router.prefix(PROMPT, "GPU") == 2 * BLOCK
        server.end()
        router.until(lambda: not storage, "the end of everything with the server")
        assert "publishes no KV events any more" not in engine.text()
    finally:
        engine.end()
        server.end()
