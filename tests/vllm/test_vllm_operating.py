"""What operators name by token ids is what a real vLLM has stored: looked up, pinned, prefetched, deleted."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

from vllm_processes import REPLY_SECONDS, Engine, Server

from prompts import assert_same, tokens


def ask(server: Server, method: str, path: str, content: Any = None) -> Any:
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.http_port}{path}", body, method=method)
    with urllib.request.urlopen(request, timeout=REPLY_SECONDS) as answer:
        return json.load(answer)


def test_a_prompt_is_named_by_its_tokens(folder: Path, model: Path) -> None:
    server = Server(folder, 16, 0, "operating", "--l2", f"disk://{folder}/operating-tier?max_gb=1", "--worth", "always")
    engine = Engine(folder, "operated", model, kv_transfer_config=server.config(), max_model_len=1024)
    prompt = tokens(304, 901)
    named = {"tokens": prompt}

    def in_l1() -> int:
        (found,) = ask(server, "POST", "/cache/lookup", {**named, "tiers": False})["models"]
        return int(found["l1_tokens"])

    try:
        engine.connected()
        cold = engine.generate([prompt])
        server.wait_until(lambda: in_l1() == 304, "the prompt in L1", 60)
        server.wait_until(lambda: server.status()["tiers"][0]["shards"] >= 19, "the prompt in the tier", 60)
        pin = ask(server, "POST", "/cache/pins", named)
        assert pin["pinned_tokens"] == 304
        assert ask(server, "POST", "/cache/delete", named)["kept_chunks"]["pinned"] == 19
        ask(server, "DELETE", "/cache/pins", named)
        assert ask(server, "POST", "/cache/clear")["status"] == "ok" and in_l1() == 0
        begun = ask(server, "POST", "/cache/prefetches", {**named, "pin_seconds": 600})
        state = f"/cache/prefetches/{begun['id']}"
        server.wait_until(lambda: ask(server, "GET", state)["state"] == "done", "the prefetch", 60)
        assert in_l1() == 304
        engine.forget()
        warm = engine.generate([prompt])
        assert_same(warm, cold)
        assert warm[0]["cached"] >= 288
        assert engine.text().count("Traceback") == 0
    finally:
        engine.end()
        server.end()
