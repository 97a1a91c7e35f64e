"""A real server and real vLLM engines, each in a process of its own. LMCACHE_TEST_VLLM_PYTHON names vLLM's interpreter."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import zygotes
from ports import free_port

PYTHON = os.environ.get("LMCACHE_TEST_VLLM_PYTHON", "")
START_SECONDS = 600  # `vllm serve` once took more than 240 where much else ran
REPLY_SECONDS = 480
KV_BYTES = 256 << 20
"""Of an engine's own cache: 16,384 tokens of the model. vLLM writes all of it when it starts."""
FOR_EVER = 3000.0
"""Seconds of a deadline that must not be waited for: the engine's answer would not come in time."""
MODULES = (
    *("vllm", "vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"),
    *("vllm.model_executor.models.qwen3", "vllm.model_executor.model_loader"),
)
"""What `drive.py` imports, most of it when an engine starts: half of the time that a start takes."""


def environment(**more: str) -> dict[str, str]:
    fixed = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "TORCHDYNAMO_DISABLE": "1",  # it compiles a few small functions otherwise, in each process anew
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LMCACHE_", "VLLM_"))}
    return {**kept, **fixed, **more}


class Process:
    """A child in a session of its own, its output in a file, gone when the test is."""

    TALKS = False
    """Whether somebody reads its stdout. A process waits as soon as a pipe that nobody reads is full."""

    def __init__(
        self, command: list[str], log: Path, start: Callable[..., Any] = subprocess.Popen, **environ: str
    ) -> None:
        self.log = log
        with log.open("ab") as file:
            self._process = start(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if self.TALKS else file,
                stderr=file,
                env=environment(**environ),
                cwd=log.parent,
                start_new_session=True,
                preexec_fn=zygotes.die_with_parent,
                text=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, number: int) -> None:
        """To the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def end(self, number: int = signal.SIGTERM) -> None:
        self.send(signal.SIGCONT)
        self.send(number)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            self._process.wait(30)
        self.send(signal.SIGKILL)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def connections(self) -> int:
        """How often its sessions have connected: the scheduler's and the ranks', again to each server that follows another."""
        return self.text().count("Connected to the LMCache server")

    def connected(self, sessions: int = 2) -> None:
        """Once they have so many times. They come up beside the engine, and a prompt that is asked before is neither looked up
        nor stored. The server lists an engine a little before the engine knows of it."""
        self.wait_until(lambda: self.connections() >= sessions, f"{sessions} connections", 120)

    def wait_until(self, ready: Callable[[], bool], what: str, seconds: float) -> None:
        """Fails, with the end of the log, when the process ends or the time is over."""
        end = time.monotonic() + seconds
        while not ready():
            if self._process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"{what}: not within {seconds} s, or the process ended\n{self.text()[-4000:]}")
            time.sleep(0.1)


class Server(Process):
    """`lmcache server` on ports of its own, in the environment of the tests: it needs nothing of vLLM's."""

    def __init__(self, folder: Path, chunk_size: int = 16, port: int = 0, name: str = "server", *flags: str) -> None:
        self.port, self.http_port = port or free_port(), free_port()
        command = [sys.executable, "-m", "lmcache.cli.main", "server", "--l1-size-gb", "1", "--eviction-policy", "LRU"]
        command += ["--chunk-size", str(chunk_size), "--port", str(self.port)]
        command += ["--http-host", "127.0.0.1", "--http-port", str(self.http_port), *flags]
        super().__init__(command, folder / f"{name}.log")
        self.wait_until(lambda: "LMCache cache server is running..." in self.text(), "server", 60)

    def status(self) -> dict[str, Any]:
        """What GET /status answers. A heart that has not answered within a second is asked again: the machine may be busy."""
        found: dict[str, Any] = {}

        def answered() -> bool:
            url = f"http://127.0.0.1:{self.http_port}/status"
            with (
                contextlib.suppress(urllib.error.HTTPError),
                urllib.request.urlopen(url, timeout=REPLY_SECONDS) as answer,
            ):
                found.update(json.load(answer))
            return bool(found)

        self.wait_until(answered, "/status", 60)
        return found

    def config(self, **more: Any) -> dict[str, Any]:
        """The value of --kv-transfer-config for an engine that uses this server, with a long deadline: no store is given up
        because the machine was busy. An engine's command `deadline` gives it another.
        """
        extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": self.port}
        extra |= {"lmcache.mp.mq_timeout": 60.0, **more}
        return {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


class Engine(Process):
    """vLLM's engine, driven by `drive.py`."""

    TALKS = True

    def __init__(
        self, folder: Path, name: str, model: Path, environ: dict[str, str] | None = None, **arguments: Any
    ) -> None:
        options = {"model": str(model), "dtype": "float32", "enforce_eager": True, "max_model_len": 4096}
        options |= {"kv_cache_memory_bytes": KV_BYTES, **arguments}
        inside = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(environ or {})}
        command = [
            PYTHON,
            str(Path(__file__).with_name("drive.py")),
            json.dumps({**options, "disable_log_stats": False}),
        ]
        super().__init__(command, folder / f"{name}.log", functools.partial(zygotes.start, MODULES), **inside)
        self._answer(START_SECONDS)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.tell(do, **arguments)
        return self.hear()

    def tell(self, do: str, **arguments: Any) -> None:
        """Give a command; its answer is still to be heard."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        return self._answer(REPLY_SECONDS)

    def generate(self, prompts: list[list[int]], **arguments: Any) -> list[dict[str, Any]]:
        outputs: list[dict[str, Any]] = self.ask("generate", prompts=prompts, **arguments)["outputs"]
        return outputs

    def forget(self) -> None:
        """Empty the engine's own prefix cache."""
        assert self.ask("reset")["ok"]

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(seconds) else ""
        if not line:
            pytest.fail(f"no answer from the engine within {seconds} s, or it ended\n{self.text()[-6000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Api(Process):
    """`vllm serve`, asked over HTTP."""

    def __init__(self, folder: Path, name: str, model: Path, *options: str, **environ: str) -> None:
        self.port = free_port()
        command = [str(Path(PYTHON).with_name("vllm")), "serve", str(model), "--dtype", "float32", "--enforce-eager"]
        command += ["--kv-cache-memory-bytes", str(KV_BYTES), "--max-model-len", "4096"]
        command += ["--port", str(self.port), "--served-model-name", "m", *options]
        super().__init__(command, folder / f"{name}.log", **environ)
        self.wait_until(self._healthy, "vllm serve", START_SECONDS)

    def complete(self, prompt: list[int], max_tokens: int = 4) -> dict[str, Any]:
        """Text and log probabilities of one greedy completion."""
        body = {
            "model": "m",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": 1,
            "ignore_eos": True,
        }
        answer = self.post("/v1/completions", body)
        choice = answer["choices"][0]
        return {"tokens": choice["logprobs"]["tokens"], "logprobs": choice["logprobs"]["token_logprobs"]}

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body or {}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=REPLY_SECONDS) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def metric(self, name: str) -> float:
        """The value of a counter of the engine."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=REPLY_SECONDS) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            return False
