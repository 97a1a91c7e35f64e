"""The two sides of a comparison: how to start each server, and each engine-side process."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.child import Child, end_with_parent
from benchmarks.scenarios import Shape

PROJECT = Path(__file__).resolve().parents[1]
START_SECONDS = 120.0
PEER_ENVIRONMENT = {
    "LMCACHE_TRACK_USAGE": "false",
    "DO_NOT_TRACK": "1",
    "LMCACHE_DISABLE_BANNER": "1",
    "LMCACHE_LOG_LEVEL": "ERROR",
}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Server:
    """A running `lmcache server` of either side. `ready_seconds`: from its start to its first healthy answer."""

    def __init__(
        self,
        side: Side,
        l1_gb: float,
        chunk_tokens: int,
        directory: Path,
        ports: tuple[int, int] | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        self._is_ours = side.name == "ours"
        self.ports = self.port, self.http_port = ports or (free_port(), free_port())
        self.address = f"tcp://127.0.0.1:{self.port}"
        self._log = directory / f"{side.name}-server.log"
        command = [*side.server_command, "--l1-size-gb", str(l1_gb), "--eviction-policy", "LRU"]
        command += ["--chunk-size", str(chunk_tokens), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--http-host", "127.0.0.1", "--http-port", str(self.http_port)]
        if side.name == "peer" and side.device == "cpu":
            command += ["--supported-transfer-mode", "engine_driven", "--shm-name", f"lmcache-bench-{os.getpid()}"]
            command += ["--no-l1-use-lazy", "--prometheus-port", str(free_port())]
        elif side.name == "peer":
            command += ["--prometheus-port", str(free_port())]
        else:
            command += ["--socket-dir", str(directory / "socket")]
        command += flags
        start = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=side.environment, cwd=directory, preexec_fn=end_with_parent
            )
        try:
            self._await_health()
        except BaseException:
            self.stop()
            raise
        self.ready_seconds = time.perf_counter() - start

    def _await_health(self) -> None:
        limit = time.monotonic() + START_SECONDS
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"the server does not answer:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.01)

    def _healthy(self) -> bool:
        try:
            return self.request("GET", "/healthcheck") in (200, 404)  # the peer has answered 404 here
        except OSError:
            return False

    def request(self, method: str, path: str) -> int:
        """The HTTP status of a request."""
        return self._ask(method, path)[0]

    def settle(self) -> None:
        """Wait until our server has pre-faulted its arena; the peer does that before it is ready."""
        limit = time.monotonic() + START_SECONDS
        while self._is_ours and time.monotonic() < limit:
            arena = self.status()["arena"]
            if arena["backed_bytes"] >= arena["bytes"]:
                break
            time.sleep(0.1)
        time.sleep(0.5)  # engines that have just mapped the arena still touch it

    def status(self) -> Any:
        """What `/status` answers."""
        return json.loads(self._ask("GET", "/status")[1])

    def _ask(self, method: str, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=30)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def clear(self) -> None:
        """Empty L1."""
        self.post("/clear-cache" if self._is_ours else "/cache/clear")

    def post(self, path: str) -> None:
        status = self.request("POST", path)
        if status != 200:
            raise RuntimeError(f"POST {path} was answered with {status}")

    def drop_l1(self) -> None:
        """Empty L1 until nothing is left in it: what is still being written to a tier stays for a while."""
        limit = time.monotonic() + START_SECONDS
        while True:
            self.clear()
            left = self._l1_chunks()
            if not left:
                return
            if time.monotonic() > limit:
                raise RuntimeError(f"L1 still has {left} chunks {START_SECONDS:.0f} s after it was to be emptied")
            time.sleep(0.01)

    def _l1_chunks(self) -> int:
        status = self.status()
        if self._is_ours:
            return int(status["index"]["chunks"])
        return sum(int(one["total_object_count"]) for one in status["storage_manager"]["l1_managers"].values())

    def memory_bytes(self) -> dict[str, int]:
        """Resident bytes of the process: `private` (anonymous and files), `shared` (the arena)."""
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines())
        kib = {name: int(fields[name].split()[0]) for name in ("RssAnon", "RssFile", "RssShmem")}
        return {"private": (kib["RssAnon"] + kib["RssFile"]) * 1024, "shared": kib["RssShmem"] * 1024}

    def cpu_seconds(self) -> float:
        """CPU time so far, user and kernel, of all its threads."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """With SIGKILL, as a crash ends it."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Worker(Child):
    """An engine-side process of either side; `call` runs one of `Scenarios`' methods in it."""

    def __init__(self, side: Side, server: Server, shape: Shape, directory: Path, seed: int, **arguments: Any) -> None:
        command = [side.python, "-m", "benchmarks.worker", side.name]
        super().__init__(side.name, command, directory / f"{side.name}-worker.log", side.environment, side.checkout)
        self.call("open", address=server.address, shape=shape.name, seed=seed, **arguments)

    def end(self) -> Any:
        reply = super().end()
        if "error" in reply:
            raise RuntimeError(f"{self.name}: {reply['error']}")
        return reply["answer"]


@dataclasses.dataclass(frozen=True)
class Side:
    """`ours` or `peer`: which Python, which `lmcache`. path: first on PYTHONPATH. device: the engines'. checkout: of this
    project, whose benchmarks run."""

    name: str
    python: str
    path: str = ""
    device: str = "cpu"
    checkout: Path = PROJECT

    @property
    def server_command(self) -> list[str]:
        if self.name == "peer" and not self.path:
            return [str(Path(self.python).with_name("lmcache")), "server"]
        return [self.python, "-m", "lmcache.cli.main", "server"]

    @property
    def environment(self) -> dict[str, str]:
        if self.name == "peer":
            inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            return inherited | PEER_ENVIRONMENT | ({"PYTHONPATH": self.path} if self.path else {})
        return os.environ | {"LMCACHE_LOG_LEVEL": "WARNING"} | ({"PYTHONPATH": self.path} if self.path else {})

    def version(self) -> str:
        program = "import importlib.metadata as m; print(m.version('lmcache'))"
        done = subprocess.run([self.python, "-c", program], capture_output=True, text=True, env=self.environment)
        return done.stdout.strip() or "not installed"

    @contextlib.contextmanager
    def serve(self, l1_gb: float, chunk_tokens: int = 256, flags: Sequence[str] = ()) -> Iterator[Server]:
        with tempfile.TemporaryDirectory(prefix="lmcache-bench-") as directory:
            server = Server(self, l1_gb, chunk_tokens, Path(directory), flags=flags)
            try:
                yield server
            finally:
                server.stop()

    @contextlib.contextmanager
    def session(self, server: Server, shape: Shape, threads: int = 1, **arguments: Any) -> Iterator[Worker]:
        """An engine-side process on that server. Its log is shown when it fails."""
        with tempfile.TemporaryDirectory(prefix="lmcache-bench-") as directory:
            try:
                worker = Worker(
                    self, server, shape, Path(directory), seed=hash(shape) & 0xFFFF, threads=threads, **arguments
                )
            except RuntimeError:
                print((Path(directory) / f"{self.name}-worker.log").read_text()[-3000:], file=sys.stderr)
                raise
            try:
                yield worker
            finally:
                worker.stop()


def sides_of(peer_python: str | None) -> tuple[Side, ...]:
    """Ours, and the peer where there is one."""
    ours = Side("ours", sys.executable)
    return (ours, Side("peer", peer_python)) if peer_python else (ours,)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run: who takes part, and how long it may take. `rounds` is how often sides alternate."""

    sides: tuple[Side, ...]
    quick: bool
    rng: random.Random

    @property
    def rounds(self) -> int:
        return 2 if self.quick else 5

    def count(self, full: int) -> int:
        """Samples a round, fewer in a quick run."""
        return max(2, full // 5) if self.quick else full
