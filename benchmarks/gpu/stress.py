"""Many requests with shared beginnings, too little GPU memory, and a server that dies: `python -m benchmarks.gpu.stress`.

A small float32 model (`python -m demo.model DIR`, then --model DIR) answers the same requests five times: on vLLM alone, on
vLLM alone three times more, and through us, with a server that is killed with SIGKILL and started again twice on the way.
Beginnings are shared as conversations share them; the GPU's KV is so small that requests are preempted. Answers are compared
token for token: how far runs of vLLM alone agree (batches differ, and so do sums) is what ours is held to.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.sides import END_SECONDS, Engine, hosts, parser, transfer_config
from benchmarks.sides import Server, Side

Answers = list[dict[str, Any]]
CONTROLS = 3
"""Further runs of vLLM alone."""


def main(argv: list[str] | None = None) -> int:
    """1 when ours answers otherwise more often than vLLM alone does, or when nothing was hit."""
    made = parser("stress", __doc__)
    made.add_argument("--requests", metavar="N", type=int, default=500)
    made.add_argument("--at-once", metavar="N", type=int, default=20)
    made.add_argument("--blocks", metavar="N", type=int, default=700, help="the GPU's KV, in blocks. Default: 700")
    made.add_argument("--longest", metavar="N", type=int, default=2000, help="tokens of a prompt. Default: 2000")
    options = made.parse_args(argv)
    if options.model is None:
        made.error("--model DIR is needed: a small model whose answers two runs can repeat (python -m demo.model DIR)")
    small = {"max_model_len": 4096, "num_gpu_blocks_override": options.blocks, "dtype": "float32"}
    with hosts(options, gpu_memory_utilization=0.3, **small) as started:
        prompts = conversations(options.requests, options.longest, started.settings["vocabulary"])
        with started.engine("alone") as engine:
            alone, *again = [run_anew(engine, prompts, options.at_once) for _ in range(1 + CONTROLS)]
        with Restarted(Side("ours", options.python, device="gpu"), options.cache_gb) as server:
            settings = started.settings | {"kv_transfer_config": transfer_config(server.port)}
            engine = Engine("ours", Side("ours", options.python), settings, started.directory / "ours.log", {})
            try:
                engine.call("ready")
                thirds = [len(prompts) // 3, 2 * len(prompts) // 3]
                server.log = started.directory / "ours.log"
                ours = run(
                    engine, prompts, options.at_once, dict.fromkeys(thirds, server.kill_and_restart), server.found
                )
                log = server.log.read_text()
                copied = server.copied()
            finally:
                engine.stop(END_SECONDS)
    control, mine = [differing(alone, one) for one in again], differing(alone, ours)
    loaded = sum(one["cached"] for one in ours)
    print(
        f"{len(prompts)} requests, {sum(map(len, prompts))} tokens, {options.blocks} blocks, {server.kills} times kill -9"
    )
    counts = ", ".join(str(len(one)) for one in control)
    print(f"answers that differ from the first run of vLLM alone: {counts} of its further runs', ours {len(mine)}")
    print(f"of ours, in none of those: {sorted(set(mine).difference(*control))}")
    print(f"tokens that ours did not compute: {loaded}; vLLM alone: {sum(one['cached'] for one in alone)}")
    print(f"until the engine had found the new server: {', '.join(f'{one:.1f} s' for one in server.seconds)}")
    print(f"the last server's copies, tokens: {copied}; errors in the engine's log: {log.count('ERROR')}")
    if options.json:
        options.json.write_text(
            json.dumps({"control": control, "ours": mine, "loaded": loaded, "copied": copied}) + "\n"
        )
    return int(len(mine) > max(map(len, control)) + len(prompts) // 100 or not copied.get("load"))


class Restarted:
    """A server that comes back on the same ports after SIGKILL."""

    def __init__(self, side: Side, l1_gb: float) -> None:
        self._side, self._l1_gb, self.kills = side, l1_gb, 0
        self.log: Path | None = None
        """The engine's."""
        self.seconds: list[float] = []
        """After each start, until scheduler and rank had connected: the rank lets go of the old arena first."""
        self._connections, self._started = 0, 0.0
        self._folder = tempfile.TemporaryDirectory(prefix="lmcache-gpu-bench-")
        self._server = Server(side, l1_gb, 64, Path(self._folder.name))
        self.port = self._server.port

    def __enter__(self) -> Restarted:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()
        self._folder.cleanup()

    def kill_and_restart(self) -> None:
        self.kills += 1
        self._server.kill()
        self._connections = self._connected()
        time.sleep(0.3)  # requests meet the absence
        self._server = Server(self._side, self._l1_gb, 64, Path(self._folder.name), self._server.ports)
        self._started = time.monotonic()

    def found(self) -> None:
        """Wait until the engine has found the server that was started last."""
        while self._connected() < self._connections + 2:
            if time.monotonic() > self._started + END_SECONDS:
                raise TimeoutError(f"the engine has not found its new server in {END_SECONDS} s")
            time.sleep(0.05)
        self.seconds.append(time.monotonic() - self._started)

    def _connected(self) -> int:
        return self.log.read_text().count("Connected to the LMCache server") if self.log is not None else 0

    def copied(self) -> dict[str, int]:
        """Tokens that the present server's engines have stored and loaded, from its metrics."""
        address = f"http://127.0.0.1:{self._server.http_port}/metrics"
        found: dict[str, int] = {}
        for line in urllib.request.urlopen(address, timeout=10).read().decode().splitlines():
            for kind, name in (("load", "lmcache_retrieved_tokens_total"), ("store", "lmcache_stored_tokens_total")):
                if line.startswith(name):
                    found[kind] = found.get(kind, 0) + int(float(line.rsplit(" ", 1)[1]))
        return found


def conversations(count: int, longest: int, vocabulary: int) -> list[list[int]]:
    """Prompts that go on from the beginning of an earlier one, as turns of a conversation do, or begin anew."""
    rng, made = random.Random(11), list[list[int]]()
    while len(made) < count:
        begin: list[int] = []
        if made and rng.random() < 0.8:
            earlier = rng.choice(made)
            begin = earlier[: rng.randrange(len(earlier))]
        new = rng.choices(range(1, vocabulary), k=rng.randrange(20, 400))
        made.append(begin + new if len(begin) + len(new) <= longest else new)
    return made


def run_anew(engine: Engine, prompts: list[list[int]], at_once: int) -> Answers:
    """With nothing left of the run before."""
    engine.forget()
    return run(engine, prompts, at_once)


def run(
    engine: Engine,
    prompts: list[list[int]],
    at_once: int,
    at: dict[int, Any] | None = None,
    after: Callable[[], None] = lambda: None,
) -> Answers:
    """All answers, `at_once` requests at a time; the function of a number in `at` runs beside that request, and then two more
    batches do; `after` comes before the next."""
    answers: Answers = []
    with ThreadPoolExecutor(1) as pool:
        for first in range(0, len(prompts), at_once):
            asked = pool.submit(engine.call, "first_tokens", prompts=prompts[first : first + at_once], tokens=8)
            for number, beside in (at or {}).items():
                if first <= number < first + at_once:
                    beside()  # in this thread: what it starts ends with the thread that started it
            answers += asked.result()
            if any(first == number // at_once * at_once + 2 * at_once for number in at or ()):
                after()
    return answers


def differing(these: Answers, those: Answers) -> list[int]:
    """Numbers of the requests that were answered otherwise."""
    pairs = enumerate(zip(these, those, strict=True))
    return [number for number, (one, other) in pairs if one["answer"] != other["answer"]]


if __name__ == "__main__":
    sys.exit(main())
