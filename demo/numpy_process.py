"""The quick demo: a small NumPy transformer with paged KV, whose process is restarted midway. Needs the base install only."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from demo.processes import Child, DemoFailed, Server
from demo.show import Row, report

PROMPT_TOKENS = 1_600
PROMPTS = 2
ANSWER_TOKENS = 8
VOCABULARY = 4_096
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}
"""Two threads are a third faster on two idle cores, and several times slower when something else runs: they spin."""


class Engine(Child):
    """`python -m demo.numpy_engine` as a process: requests in, answers out, one JSON object a line."""

    def __init__(self, name: str, server: Server | None) -> None:
        where = [] if server is None else ["--address", f"127.0.0.1:{server.port}"]
        super().__init__(name, [sys.executable, "-m", "demo.numpy_engine", *where], _ENVIRONMENT, talk=True)

    def await_ready(self) -> None:
        """Wait for the process, and let what happens once happen untimed."""
        self.ask(None)
        self.ask({"tokens": [1] * 100, "max_tokens": 2})

    def ask(self, request: dict[str, object] | None) -> dict[str, object]:
        """Send a request (None: none, only read), and return the next line of the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if request is not None:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise DemoFailed(f"{self.name} ended without an answer\n{self.tail()}")
        answer: dict[str, object] = json.loads(line)
        return answer

    def time(self, row: Row, prompts: list[list[int]]) -> Row:
        """Answer all prompts and note the times."""
        for tokens in prompts:
            answer = self.ask({"tokens": tokens, "max_tokens": ANSWER_TOKENS})
            row.ttft_seconds.append(float(str(answer["ttft_seconds"])))
            row.answers.append(list(answer["tokens"]))  # type: ignore[call-overload]
            row.cached_tokens += int(str(answer["hit_tokens"]))
        print(f"  {row.title}: {row.median:.3f} s", flush=True)
        return row


def run(png: Path) -> bool:
    """Run the demo; True when every answer was right."""
    print("The NumPy demo takes about 10 seconds.")
    rng = random.Random(7)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]
    running: list[Child] = []
    try:
        running.append(server := Server(l1_size_gb=1))
        running.append(alone := Engine("numpy engine alone", None))
        alone.await_ready()
        print(f"  lmcache server: ready after {server.await_healthy():.1f} s", flush=True)
        rows = [alone.time(Row("without LMCache", False), prompts)]
        alone.stop()
        running.append(first := Engine("numpy engine", server))
        first.await_ready()
        rows.append(first.time(Row("LMCache, cold", True), prompts))
        rows.append(first.time(Row("LMCache, warm", True, warm=True), prompts))
        first.stop()
        running.append(second := Engine("numpy engine restarted", server))
        second.await_ready()
        rows.append(second.time(Row("LMCache, warm, engine restarted", True, warm=True), prompts))
    finally:
        for child in reversed(running):
            child.stop()
    return report("a NumPy transformer", PROMPT_TOKENS, rows, png)
