"""The demo: real vLLM on the CPU, with and without LMCache, and restarted midway."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from demo.processes import CACHE, Child, DemoFailed, Server, free_ports
from demo.show import Row, report

PROMPT_CHARACTERS = 24_000
"""Enough Python source for `PROMPT_TOKENS` tokens, of some 3.5 characters each."""
PROMPT_TOKENS = 4_160
PROMPTS = 3
ANSWER_TOKENS = 8
MAX_MODEL_TOKENS = 8_192
START_SECONDS = 900.0
"""The longest start seen on two slow cores is 100 s, and 240 s where others kept them busy."""
TWO_ENGINES_GIB = 10.0
"""Two engines take 2.6 GiB each, L1 2 GiB. Starting both at once saves 20 s; an idle one takes no time from the other."""


class Vllm(Child):
    """`vllm serve` with the demo's model; with a server, its KV goes to LMCache and its own prefix cache is off."""

    def __init__(self, name: str, model: Path, server: Server | None) -> None:
        self.port, self.server = free_ports(1)[0], server
        command = [
            *(str(engine_folder() / "vllm"), "serve", str(model), "--served-model-name", "demo"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_TOKENS)),
            *("--max-num-seqs", "8", "--disable-uvicorn-access-log"),
        ]
        if server is not None:
            transfer = {
                "kv_connector": "LMCacheMPConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"lmcache.mp.port": server.port},
            }
            command += ["--kv-transfer-config", json.dumps(transfer), "--no-enable-prefix-caching"]
        super().__init__(name, command, _ENVIRONMENT)

    def await_healthy(self) -> None:
        """Wait for GET /health, then send a short prompt, so that what happens once is not timed."""
        seconds = self.await_http(self.port, "/health", START_SECONDS)
        print(f"  {self.name}: ready after {seconds:.0f} s", flush=True)
        self.ask([1] * 300)

    def tokens(self, text: str) -> list[int]:
        """The first `PROMPT_TOKENS` tokens of a text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30.0)
        connection.request("POST", "/tokenize", json.dumps({"model": "demo", "prompt": text}), _JSON)
        tokens: list[int] = json.loads(connection.getresponse().read())["tokens"]
        connection.close()
        return tokens[:PROMPT_TOKENS]

    def ask(self, prompt: list[int]) -> tuple[float, list[object]]:
        """Answer greedily: seconds to the first token, and the answer's tokens."""
        request = {
            "model": "demo",
            "prompt": prompt,
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "return_tokens_as_token_ids": True,
            "stream": True,
        }
        began, first = time.perf_counter(), 0.0
        tokens: list[object] = []
        for event in self._events(json.dumps(request)):
            first = first or time.perf_counter() - began
            for choice in event.get("choices", []):
                tokens += choice["logprobs"]["tokens"]
        if len(tokens) != ANSWER_TOKENS:
            raise DemoFailed(f"{self.name} answered {len(tokens)} tokens instead of {ANSWER_TOKENS}\n{self.tail()}")
        return first, tokens

    def time(self, row: Row, prompts: list[list[int]]) -> Row:
        """Answer all prompts and note the times."""
        before = self.server.retrieved_tokens() if self.server else 0
        for prompt in prompts:
            seconds, answer = self.ask(prompt)
            row.ttft_seconds.append(seconds)
            row.answers.append(answer)
        row.cached_tokens = self.server.retrieved_tokens() - before if self.server else 0
        print(f"  {row.title}: {row.median:.3f} s", flush=True)
        return row

    def _events(self, body: str) -> Iterator[dict]:  # type: ignore[type-arg]
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120.0)
        try:
            connection.request("POST", "/v1/completions", body, _JSON)
            response = connection.getresponse()
            if response.status != 200:
                raise DemoFailed(f"{self.name} answered {response.status}: {response.read(500)!r}\n{self.tail()}")
            for line in response:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    yield json.loads(line[6:])
        except (OSError, http.client.HTTPException) as failure:
            raise DemoFailed(f"{self.name} did not answer: {failure}\n{self.tail()}") from failure
        finally:
            connection.close()


_JSON = {"Content-Type": "application/json"}
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # left alone, vLLM computes with another number of cores when it has a connector (on 2 cores: with 2 instead of 1)
    **({"VLLM_CPU_NUM_OF_RESERVED_CPU": "1"} if (os.cpu_count() or 1) > 1 else {}),
    "TORCHDYNAMO_DISABLE": "1",  # else the first request compiles a few small functions, and needs a C++ compiler
}


def engine_folder() -> Path:
    """Return the folder of the `vllm` program, which ./run gives."""
    return Path(os.environ["LMCACHE_DEMO_VLLM"])


def run(png: Path) -> bool:
    """Run the demo; True when every answer was right."""
    print(
        "The vLLM demo takes 90 seconds on two free cores: vLLM starts three times, at 15 to 60 seconds each.",
        flush=True,
    )
    began = time.monotonic()
    model = _model()
    running: list[Child] = []
    try:
        running.append(server := Server(l1_size_gb=2))
        running.append(alone := Vllm("vLLM alone", model, None))
        first = _start_first(model, server) if _available_gib() > TWO_ENGINES_GIB else None
        running += [first] if first else []
        print(f"  lmcache server: ready after {server.await_healthy():.1f} s", flush=True)
        alone.await_healthy()
        if first:
            first.await_healthy()
        prompts = [alone.tokens(text) for text in _texts()]
        rows = [alone.time(Row("without LMCache", False), prompts)]
        rows.append(alone.time(Row("vLLM's own prefix cache", False), prompts))
        alone.stop()
        if not first:
            running.append(first := _start_first(model, server))
            first.await_healthy()
        rows.append(first.time(Row("LMCache, cold", True), prompts))
        rows.append(first.time(Row("LMCache, warm", True, warm=True), prompts))
        first.stop()
        running.append(second := Vllm("vLLM with LMCache, restarted", model, server))
        second.await_healthy()
        rows.append(second.time(Row("LMCache, warm, vLLM restarted", True, warm=True), prompts))
    finally:
        for child in reversed(running):
            child.stop()
    right = report("vLLM on this CPU", PROMPT_TOKENS, rows, png)
    print(f"{time.monotonic() - began:.0f} s in all; logs: {CACHE}")
    return right


def _start_first(model: Path, server: Server) -> Vllm:
    return Vllm("vLLM with LMCache", model, server)


def _available_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return 0.0


def _model() -> Path:
    """The model's folder, written at the first run."""
    folder = CACHE / "model"
    if not (folder / "config.json").exists():
        print("  writing a small random-weight model (134 MB)", flush=True)
        command = [str(engine_folder() / "python"), "-m", "demo.model", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise DemoFailed(f"the model could not be written: {result.stderr[-1500:]}")
    return folder


def _texts() -> list[str]:
    """Return long texts with nothing in common: source of Python's standard library."""
    files = ("argparse.py", "tarfile.py", "typing.py", "subprocess.py", "inspect.py")[:PROMPTS]
    folder = Path(sysconfig.get_path("stdlib"))
    return [f"# {name}\n" + (folder / name).read_text(encoding="utf-8")[:PROMPT_CHARACTERS] for name in files]
