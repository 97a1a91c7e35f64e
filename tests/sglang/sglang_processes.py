"""Real SGLang servers on the CPU, asked over HTTP. LMCACHE_TEST_SGLANG_PYTHON names SGLang's interpreter."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zygotes
from ports import free_port
from prompts import tokens
from servers import Process, Server, eventually

PYTHON = os.environ.get("LMCACHE_TEST_SGLANG_PYTHON", "")
START_SECONDS = 600.0
REPLY_SECONDS = 120.0
DEADLINE_SECONDS = 10.0
"""Of a call to the daemon: so long that no busy machine makes a miss of a hit, and so short that a test can wait for it."""
POOL_TOKENS = 4096
PREFILL_TOKENS = 256
CHUNK = 16
MODULES = (
    *("sglang.launch_server", "sglang.srt.entrypoints.http_server", "sglang.srt.managers.scheduler"),
    *("sglang.srt.managers.detokenizer_manager", "sglang.srt.models.registry"),
)
"""What SGLang's processes import."""
LONG = tokens(1500, 20)
"""More than SGLang computes in one step."""
Output = dict[str, Any]
Daemons = Callable[..., Server]
_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--disable-cuda-graph", "--skip-tokenizer-init", "--skip-server-warmup"),
    "--sleep-on-idle",  # else it takes a core from the others
    *("--dtype", "float32", "--random-seed", "0", "--context-length", "4000", "--host", "127.0.0.1"),
    *("--max-total-tokens", str(POOL_TOKENS), "--chunked-prefill-size", str(PREFILL_TOKENS)),
)


def environment() -> dict[str, str]:
    fixed = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    return {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_")} | fixed


def start_script(script: Path, *arguments: str) -> zygotes.Forked:
    """Run a script in SGLang's environment, with SGLang imported already."""
    command = [PYTHON, str(script), *arguments]
    assert sys.__stderr__ is not None
    return zygotes.start(MODULES, command, stderr=sys.__stderr__, env=environment(), cwd=script.parent)


def answer_of(process: zygotes.Forked) -> Any:
    """What a script says in its last line, as JSON."""
    said = process.stdout.read()
    assert process.wait() == 0
    return json.loads(said.splitlines()[-1])


class Engine(Process):
    """`python -m sglang.launch_server --enable-lmcache` with these settings in its config file; ready."""

    def __init__(self, folder: Path, model: Path, page_size: int, settings: dict[str, Any], **variables: str) -> None:
        self.port = free_port()
        file = folder / f"lmcache-{self.port}.yaml"
        settings = {"blocking_timeout_secs": DEADLINE_SECONDS} | settings
        file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()))
        launch = str(Path(__file__).with_name("launch.py"))
        command = [PYTHON, launch, "--model-path", str(model), "--port", str(self.port), *_FLAGS]
        command += ["--page-size", str(page_size), "--enable-lmcache", "--lmcache-config-file", str(file)]
        start = functools.partial(zygotes.start, MODULES)
        super().__init__(command, start, cwd=folder, env=environment() | variables)
        self.page_size = page_size
        try:
            eventually(self._healthy, START_SECONDS)
        except BaseException:
            self.kill()
            raise

    def answer(self, prompt: list[int], max_tokens: int = 8, **more: Any) -> Output:
        """Greedy tokens of one prompt, their log probabilities, the prompt's tokens that were cached."""
        found = self.ask(prompt, max_tokens, return_logprob=True, **more)
        return {
            "tokens": found["output_ids"],
            "logprobs": [entry[0] for entry in found["meta_info"]["output_token_logprobs"]],
            "cached": found["meta_info"]["cached_tokens"],
        }

    def connections(self) -> int:
        """How often its sessions have connected: two, and two more for each server that follows another."""
        return self.text().count("Connected to the LMCache server")

    def connected(self, sessions: int = 2) -> None:
        """Once they have so many times; they come up beside the engine. The server lists an engine a little before the engine
        knows of it, and a prompt that is asked in between is not looked up."""
        eventually(lambda: self.connections() >= sessions)

    def ask(self, prompt: list[int], max_tokens: int, **more: Any) -> Any:
        """SGLang's own words."""
        sampling = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
        return json.loads(self.post("/generate", {"input_ids": prompt, "sampling_params": sampling, **more}))

    def answers(self, prompts: list[list[int]], max_tokens: int = 8, **more: Any) -> list[Output]:
        """All prompts at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.answer(prompt, max_tokens, **more), prompts))

    def alone(self, prompt: list[int]) -> Output:
        """One prompt, with an empty radix tree before and after: KV of few bits differs where steps do."""
        self.flush()
        output = self.answer(prompt)
        self.flush()
        return output

    def post(self, path: str, body: Any = None) -> str:
        return self._ask(path, json.dumps(body or {}).encode())

    def get(self, path: str) -> str:
        return self._ask(path, None)

    def _ask(self, path: str, data: bytes | None) -> str:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=REPLY_SECONDS) as answer:
            text: str = answer.read().decode()
            return text

    def flush(self) -> None:
        """Empty the radix tree; SGLang refuses while a request or a copy is under way."""
        eventually(self._flushed)

    def text(self) -> str:
        return "".join(self.log)

    def text_of_serving(self) -> str:
        """
        What SGLang has logged since it said that it is ready. Before that it asks itself over HTTP to freeze the garbage
        collector; with --skip-server-warmup it may ask before it listens, and it logs a traceback of its own.
        """
        _, ready, text = self.text().partition("The server is fired up and ready to roll!")
        assert ready, self.text()
        return text

    def kill(self) -> None:
        """kill -9 of all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.child.wait()

    def end(self) -> int:
        """At once: an orderly end takes SGLang many seconds."""
        self.kill()
        return super().end()

    def _flushed(self) -> bool:
        try:
            self.post("/flush_cache")
        except urllib.error.HTTPError:
            return False
        return True

    def _healthy(self) -> bool:
        assert self.child.poll() is None, f"SGLang has ended:\n{self.text()[-4000:]}"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                return True
        except OSError:
            return False


@dataclass(frozen=True)
class World:
    """The daemon of all engines, the first of them, and what it answered before there was a daemon."""

    server: Server
    first: Engine
    expected: list[Output]
    long: Output
