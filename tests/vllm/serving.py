"""A model with several kinds of KV, the engine that serves it, and its server."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_processes import Engine, Server

from prompts import assert_same, tokens

CHUNK = 128
"""Tokens. vLLM-CPU keeps a state of linear attention after so many tokens."""
KINDS = {"gemma3": 12, "mistral": 6, "gptoss": 8, "qwen3next": 4, "llama4": 8, "nemotron_nas": 12}
"""Model -> MiB of KV, for two or three of the long prompts at once."""
FULL = ("nemotron_nas", "mtp")
"""Of these all layers need all tokens. In Nemotron-NAS they differ in the shape of their KV, in one group of vLLM."""
IN_PROCESS = {
    "kv_connector": "LMCacheConnectorV1",
    "kv_connector_module_path": "lmcache.integration.vllm.lmcache_connector",
    "kv_role": "kv_both",
}
STEM = tokens(1000, 600)
PROMPTS = [
    STEM,
    STEM[:300] + tokens(500, 601),  # shared up to within a chunk
    STEM[:640] + tokens(1, 602),
    STEM[:768],  # whole chunks,
    STEM[:769],  # one token more,
    STEM[:767],  # and one less
    tokens(90, 603),
]
Outputs = list[dict[str, Any]]


@dataclass
class Serving:
    """A model, the engine that serves it, and its server (None: the engine's own). expected: what vLLM has computed without a
    hit."""

    folder: Path
    kind: str
    path: Path
    server: Server | None
    engine: Engine
    expected: dict[str, Outputs] = field(default_factory=dict)
    sessions: int = 2

    def options(self, **more: Any) -> dict[str, Any]:
        dtype = "bfloat16" if self.kind == "qwen3next" else "float32"
        config = self.server.config() if self.server is not None else IN_PROCESS
        if self.kind == "nemotron_nas":
            more["trust_remote_code"] = True  # its configuration is code of its own
        return {"dtype": dtype, "max_model_len": 2048, "kv_transfer_config": config, **more}

    def another_server(self, name: str, *flags: str, chunk: int = CHUNK) -> None:
        """kill -9, and a new one on the same port. The engine finds it by itself, unless the server refuses it."""
        self.sessions = self.engine.connections() + 2
        self.server.end(signal.SIGKILL)
        self.server = Server(self.folder, chunk, self.server.port, f"{self.kind}-{name}", *flags)

    def warm(self, prompts: list[list[int]] = PROMPTS, **more: Any) -> Outputs:
        """The answers when the engine's own cache is empty."""
        self.engine.forget()
        return self.engine.generate(prompts, **more)

    def same(self, outputs: Outputs, expected: Outputs) -> None:
        """In bfloat16 the first tokens only, and roughly: rounding differs with the sizes of the steps."""
        if self.kind != "qwen3next":
            assert_same(outputs, expected)
            return
        for one, other in zip(outputs, expected, strict=True):
            assert one["tokens"][0] == other["tokens"][0]
            assert abs(one["logprobs"][0] - other["logprobs"][0]) < 0.25

    def are_whole(self, outputs: Outputs, prompts: list[list[int]] = PROMPTS) -> bool:
        """Return whether loads have brought all that they can: full chunks, before the last token where windows or states end.
        A forward that waits for its load computes the last token, too."""
        most = [(len(one) - (self.kind not in FULL)) // CHUNK * CHUNK for one in prompts]
        return all(
            min(count, len(one) - 1) <= found <= count
            for one, count, found in zip(prompts, most, cached(outputs), strict=True)
        )


def cached(outputs: Outputs) -> list[int]:
    return [output["cached"] for output in outputs]
