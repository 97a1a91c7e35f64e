"""Is a load worth its wait, on real vLLM (CPU) with a throttled store: `python -m benchmarks.vllm_load_cost --vllm-python PATH`.

One vLLM, one server over a real Valkey. It writes there directly and reads through a proxy, which lets through so many bytes a
second that loading a prompt takes `slowness` times as long as computing it. Each prompt is computed once (cold), L1 and the
engine's own cache are emptied, and it is asked for again. With `--worth auto` the server must notice and let the engine
compute; with `always` it loads.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.child import end_with_parent
from benchmarks.rows import Goal, Row
from benchmarks.run import about, arguments, give_out
from benchmarks.sides import PROJECT, Side, free_port
from benchmarks.vllm_ttft import PROMPT_TOKENS, VOCABULARY, Engine, transfer_config, write_model

sys.path.insert(0, str(PROJECT / "tests"))  # the proxy and the store are the tests' own

from proxy import Proxy
from stores import RedisServer, binary_of

SLOWNESS = (0.2, 5.0)
START_SECONDS = 60.0


class Server:
    """`lmcache server` over one tier, always on the same port, so that the engine finds each of them."""

    def __init__(self, directory: Path) -> None:
        self.port, self.http_port, self._directory = free_port(), free_port(), directory

    @contextlib.contextmanager
    def serving(self, urls: tuple[str, str], worth: str) -> Iterator[None]:
        """The first of the tiers is read, the second one written."""
        command = [sys.executable, "-m", "lmcache.cli.main", "server", "--l1-size-gb", "1", "--worth", worth]
        command += ["--l2", urls[0], "--l2", urls[1], "--l2-patience-seconds", "60"]
        command += ["--port", str(self.port), "--http-port", str(self.http_port)]
        with (self._directory / "server.log").open("a") as log:
            process = subprocess.Popen(
                [*command, "--socket-dir", str(self._directory / "socket")],
                stdout=log,
                stderr=log,
                preexec_fn=end_with_parent,
            )
        try:
            wait_until(lambda: len(self.status()["engines"]) == 2, "the engine has not found the server")
            yield
        finally:
            process.terminate()
            process.wait(60)

    def status(self) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/status", timeout=10) as answer:
                status: dict[str, Any] = json.load(answer)
                return status
        except OSError:
            return {"engines": []}

    def clear(self) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}/clear-cache", method="POST")
        urllib.request.urlopen(request, timeout=30).close()

    def kept(self) -> int:
        return int(self.status()["tiers"][1]["counters"].get("kept_shards", 0))


def wait_until(what: Any, why: str) -> None:
    limit = time.monotonic() + START_SECONDS
    while not what():
        if time.monotonic() > limit:
            raise RuntimeError(why)
        time.sleep(0.05)


def measure(engine: Engine, server: Server, proxy: Proxy, urls: tuple[str, str], rounds: int) -> list[Row]:
    rng = random.Random(11)
    rows: list[Row] = []
    for slowness in SLOWNESS:
        for worth in ("auto", "always"):
            goal = Goal(1.05, "less") if worth == "auto" else None
            what = f"loading takes {slowness:g} x computing, --worth {worth}: TTFT over computing"
            row = Row(f"worth-{worth}-{slowness:g}", what, "x", goal)
            with server.serving(urls, worth):
                _rounds(engine, server, proxy, slowness, rounds, rng, row)
            rows.append(row)
    return rows


def _rounds(
    engine: Engine, server: Server, proxy: Proxy, slowness: float, rounds: int, rng: random.Random, row: Row
) -> None:
    """The first two rounds teach the server both paces."""
    cold: list[float] = []
    for turn in range(-2, rounds):
        prompt = rng.choices(range(1, VOCABULARY), k=PROMPT_TOKENS)
        before = server.kept()
        cold.append(engine.first_token(prompt)[0])
        chunks = PROMPT_TOKENS // server.status()["config"]["chunk-size"]
        wait_until(lambda want=before + chunks: server.kept() >= want, "the store does not take it")
        tier = server.status()["tiers"][1]
        size = tier["stored_bytes"] / tier["shards"] * chunks
        proxy.rate = size / (slowness * median(cold)) / CONNECTIONS
        server.clear()
        engine.forget()
        seconds, cached = engine.first_token(prompt)
        print(f"  {row.name} round {turn}: cold {cold[-1]:.3f}, again {seconds:.3f}, cached {cached}", file=sys.stderr)
        if turn >= 0:
            row.add("ours", [seconds / median(cold)])
        engine.forget()


CONNECTIONS = 4
"""Of the tier; the proxy throttles each."""


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 when something failed."""
    parser = arguments("vllm_load_cost", __doc__, vllm=True, update=False)
    parser.add_argument("--rounds", metavar="N", type=int, default=6, help="rounds after two to learn. Default: 6")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="lmcache-worth-") as name:
        directory = Path(name)
        server = Server(directory)
        store = RedisServer(binary_of("valkey"), directory)
        proxy = Proxy(store.port)
        engine = Engine("ours", options.vllm_python, write_model(options.vllm_python, directory / "model"), directory,
                        transfer_config("ours", server.port))  # fmt: skip
        try:
            engine.call("ready")
            slow = store.url(f"?connections={CONNECTIONS}&timeout=60&write=none", port=proxy.port)
            rows = measure(engine, server, proxy, (slow, store.url("?read=no")), options.rounds)
        except RuntimeError as error:
            print(error, (directory / "server.log").read_text()[-2000:], file=sys.stderr)
            return 1
        finally:
            engine.kill()
            proxy.close()
            store.end()
    facts = about([Side("ours", sys.executable)], argv, "benchmarks.vllm_load_cost")
    facts["prompt"] = f"{PROMPT_TOKENS} tokens, float32, the demo's model"
    give_out(options, facts, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
