"""Processes of the demo: each is started with its own log, awaited with a progress line, and ended by process id."""

from __future__ import annotations

import ctypes
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "demo"
_PR_SET_PDEATHSIG = 1
_RETRIEVED = "lmcache_retrieved_tokens_total"


class DemoFailed(Exception):
    """A process of the demo failed; the message says which, and where its log is."""


class Child:
    """A process with its own process group, whose output goes to `.cache/demo/NAME.log`.

    It ends with this object's `stop`, and with this process however that ends.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None, talk: bool = False
    ) -> None:
        self.name = name
        self.began = time.monotonic()
        CACHE.mkdir(parents=True, exist_ok=True)
        self.log = CACHE / f"{name.replace(' ', '-')}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talk else log,
                stderr=log,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
                preexec_fn=_die_with_parent,
                text=True,
            )

    def await_http(self, port: int, path: str, seconds: float) -> float:
        """Wait until GET 127.0.0.1:port/path answers 200; return the seconds since the process was started."""
        return self.wait_until(lambda: _answers(port, path), seconds)

    def wait_until(self, ready: Callable[[], bool], seconds: float) -> float:
        """Wait until `ready()`, with a line that moves on a terminal.

        Raises:
            DemoFailed: the process ended, or the time is over.
        """
        while not ready():
            passed = time.monotonic() - self.began
            if self.process.poll() is not None:
                raise DemoFailed(f"{self.name} ended with code {self.process.returncode}\n{self.tail()}")
            if passed > seconds:
                raise DemoFailed(f"{self.name} was not ready after {seconds:.0f} s\n{self.tail()}")
            _moving_line(f"  {self.name} is starting ... {passed:3.0f} s")
            time.sleep(0.1)
        _moving_line("")
        return time.monotonic() - self.began

    def tail(self, lines: int = 15) -> str:
        """Return the end of the log, and where the complete log is."""
        text = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join([*(f"    {line}" for line in text), f"  the complete log: {self.log}"])

    def stop(self) -> None:
        """Ask the process to end, then its complete process group, then kill the processes that are left.

        The group is asked before it is killed, since only processes that end by themselves remove their shared memory.
        """
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()
        if self._gone(0.0):
            return
        steps = ((os.kill, signal.SIGTERM, 5.0), (os.killpg, signal.SIGTERM, 3.0), (os.killpg, signal.SIGKILL, 3.0))
        for send, number, seconds in steps:
            with suppress(ProcessLookupError):
                send(self.process.pid, number)
            if self._gone(seconds):
                return

    def _gone(self, seconds: float) -> bool:
        """Whether the process and its group have ended, after waiting for at most so long."""
        end = time.monotonic() + seconds
        while self.process.poll() is None or _alive(self.process.pid):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True


class Server(Child):
    """`lmcache server` on free ports of this host."""

    def __init__(self, l1_size_gb: float) -> None:
        self.port, self.http_port = free_ports(2)
        command = [
            *(str(Path(sys.executable).with_name("lmcache")), "server"),
            *("--l1-size-gb", f"{l1_size_gb:g}", "--eviction-policy", "LRU"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--http-host", "127.0.0.1", "--http-port", str(self.http_port)),
            *_arena_options(l1_size_gb),
        ]
        super().__init__("lmcache server", command)

    def await_healthy(self) -> float:
        """Wait for GET /healthcheck; return the seconds since it was started."""
        return self.await_http(self.http_port, "/healthcheck", 30.0)

    def retrieved_tokens(self) -> int:
        """Tokens whose KV engines have loaded so far, as the server's own metrics count them."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=5.0)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        except (OSError, http.client.HTTPException) as failure:
            raise DemoFailed(f"{self.name} gave no metrics: {failure}\n{self.tail()}") from failure
        finally:
            connection.close()
        return int(sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(_RETRIEVED)))


def free_ports(count: int) -> list[int]:
    """Return distinct TCP ports of 127.0.0.1 that no process uses now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP unwind as Ctrl-C does, so that all started processes are ended."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)


def _arena_options(l1_size_gb: float) -> list[str]:
    """Return flags that put the arena in a folder of the demo if /dev/shm is too small (64 MB in many containers)."""
    with suppress(OSError):
        if shutil.disk_usage("/dev/shm").free > (l1_size_gb + 0.25) * 2**30:
            return []
    folder = CACHE / "arena"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    print(f"  /dev/shm is too small for {l1_size_gb:g} GB of L1; the arena lies in {folder}")
    return ["--arena-dir", str(folder)]


def _alive(group: int) -> bool:
    """Whether a process of this group lives; one that has ended and waits for its parent does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                return True
    return False


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _moving_line(text: str) -> None:
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
