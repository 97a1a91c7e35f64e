"""Real servers and engine processes for tests, and how to stop, kill and question them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import zmq
from prometheus_client.parser import text_string_to_metric_families

from lmcache.cache import L1
from lmcache.chunks import Layout
from lmcache.memory.arena import Arena
from lmcache.runtime import RUNTIME, Runtime
from lmcache.server.loop import Loop
from lmcache.server.service import Service
from lmcache.server.tiering import Tiering
from lmcache.server.unix_endpoint import UnixEndpoint
from lmcache.server.zmq_endpoint import ZmqEndpoint
from lmcache.tiers import Region
from lmcache.tiers.registry import tiers_of
from lmcache.wire import messages as m
from lmcache.wire.carriers import UnixCarrier
from lmcache.wire.sockets import listen_unix
from ports import free_port

PATIENCE = 60.0  # for what should come soon: on a machine that was starved, starts of half a second took 18
_RESOLVE = socket.getaddrinfo
T = TypeVar("T")
READY = "LMCache cache server is running..."


def eventually(what: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """The first true value of `what`; for what no event tells. Fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, f"not so within {seconds} s; last: {value!r}"
        time.sleep(0.01)
    return value


def key_file(folder: Path, name: str = "key", mode: int = 0o600) -> Path:
    """A fresh key, as server and engines share it."""
    path = folder / name
    path.write_bytes(zmq.curve_keypair()[1])
    path.chmod(mode)
    return path


def signed_by_itself(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's side of TLS for localhost, and the file of its certificate."""
    key, certificate = folder / "key.pem", folder / "ca.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate


def unresolved(host: str, *rest: Any, **more: Any) -> Any:
    """A resolver (`socket.getaddrinfo`) that knows numbers and no name."""
    if any(letter.isalpha() for letter in host) and ":" not in host:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return _RESOLVE(host, *rest, **more)


def beside(call: Callable[[], T]) -> Future[T]:
    """Run `call` in a thread of its own, for which a test that fails does not wait."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class Process:
    """A child whose lines of output arrive in a queue. Ended by its own pid, and never left behind."""

    def __init__(self, command: list[str], start: Callable[..., Any] = subprocess.Popen, **more: Any) -> None:
        self.child = start(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
        )
        self.pid = self.child.pid
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.log: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        with contextlib.suppress(ValueError):
            for line in self.child.stdout:
                self.log.append(line)
                self.lines.put(line)
        self.lines.put(None)

    def _next(self, deadline: float) -> str | None:
        try:
            return self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise AssertionError(f"nothing more was said in time:\n{''.join(self.log[-30:])}") from None

    def line_with(self, word: str, seconds: float = PATIENCE) -> str:
        """The next line that contains `word`."""
        deadline = time.monotonic() + seconds
        while (line := self._next(deadline)) is not None:
            if word in line:
                return line
        raise AssertionError(f"ended with {self.child.wait()} before saying {word!r}:\n{''.join(self.log[-30:])}")

    def said_once(self, words: str) -> None:
        """It is in the log, now or soon, and no more than once."""
        eventually(lambda: words in "".join(self.log))
        assert "".join(self.log).count(words) == 1, "".join(self.log[-30:])

    def signal(self, number: int) -> None:
        self.child.send_signal(number)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.child.kill()
        self.child.wait()

    def freeze(self) -> None:
        """SIGSTOP, and wait until it stands still."""
        self.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def end(self) -> int:
        """SIGTERM (SIGKILL for one that does not listen); the exit code."""
        if self.child.poll() is None:
            self.thaw()
            self.child.terminate()
            try:
                self.child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.kill()
        for stream in (self.child.stdin, self.child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        return self.child.wait()


class Server(Process):
    """A real `lmcache server`. `l1` is its size in MiB."""

    def __init__(self, folder: Path, arena_dir: Path, l1: float, chunk: int, port: int, flags: tuple[str, ...]) -> None:
        self.port, self.http_port = port, free_port()
        self.address, self.arena_dir, self.socket_dir = f"tcp://127.0.0.1:{port}", arena_dir, folder
        super().__init__(
            [
                *(sys.executable, "-m", "lmcache.cli.main", "server", "--eviction-policy", "LRU"),
                *("--l1-size-gb", str(l1 / 1024), "--chunk-size", str(chunk)),
                *("--port", str(port), "--http-host", "127.0.0.1", "--http-port", str(self.http_port)),
                *("--socket-dir", str(folder), "--arena-dir", str(arena_dir), *flags),
            ]
        )

    def get(self, path: str) -> Any:
        """The JSON of a page. A heart that has not answered within a second is asked again: the machine may be busy."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=PATIENCE) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                reason = error.read()
                if b"main loop does not answer" not in reason or time.monotonic() > deadline:
                    raise AssertionError(f"{path}: {error.code} {reason!r}\n{self.complaints()}") from None

    def status(self) -> Any:
        return self.get("/status")

    def counters(self) -> dict[str, float]:
        counters: dict[str, float] = self.status()["counters"]
        return counters

    def metrics(self) -> dict[str, float]:
        """Name -> value of /metrics, which has more than the counters of /status; without labels, so of several the last."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/metrics", timeout=PATIENCE) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return {one.name: one.value for family in families for one in family.samples}

    def clear(self) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}/clear-cache", method="POST")
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            assert json.load(answer)["status"] == "ok"

    def healthy(self) -> bool:
        return bool(self.get("/healthcheck")["status"] == "healthy")

    def complaints(self) -> str:
        """The tracebacks in the log."""
        return "".join(line for line in self.log if "INFO" not in line and "WARNING" not in line)[-5000:]

    def socket_path(self) -> str:
        (path,) = self.socket_dir.glob("*.sock")
        return str(path)


@contextlib.contextmanager
def server_parts(
    folders: Callable[[str], Path],
    l1_bytes: int,
    key: Path | None = None,
    open_door: bool = True,
    runtime: Runtime = RUNTIME,
    l2: Sequence[str] = (),
) -> Iterator[tuple[Service, int]]:
    """A server's parts in this process, in a running loop and without prefaulting: its service, and the port of its ZMQ face.

    open_door: nobody needs a proof. l2: URLs of tiers, which are waited for.
    """
    loop, arena, folder = Loop(runtime), Arena(folders("/dev/shm"), l1_bytes), folders("/tmp")
    workers, l1 = ThreadPoolExecutor(1), L1(arena)
    patient: dict[str, Any] = {
        "chunk_tokens": 16,
        "always": True,
        "patience_seconds": PATIENCE,
        "queue_bytes": l1_bytes,
    }
    tiering = Tiering(loop, l1, tiers_of(l2, ()), **patient) if l2 else None
    if tiering is not None:
        memory = arena.mapping.view(0, arena.size_bytes)
        tiering.attach(Region(arena.mapping.address, arena.size_bytes, arena.descriptor, memory))
        tiering.open(required=True)
    service = Service(loop, l1, 16, workers, tiering)
    unix = UnixEndpoint(loop, service, listen_unix(folder / "socket"), folder / "socket")
    door = ZmqEndpoint(loop, service, "127.0.0.1", 0, folder, key, open_door)
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        yield service, door.port
    finally:
        loop.stop()
        thread.join()
        if tiering is not None:
            tiering.close()
        workers.shutdown()
        unix.close()
        door.close()
        arena.close()
        loop.close()


class Impostor:
    """A ZMQ server of somebody else, that speaks our protocol up to a point: `answers` is asked what to say to each request.

    heard: every request so far, and how many payload frames came with it. names: ZMQ's, of the connections that they came from.
    """

    def __init__(
        self, answers: Callable[[int, m.Message], list[bytes] | None], port: int = 0, host: str = "127.0.0.1"
    ) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.port = port or free_port()
        self.address = f"tcp://{host}:{self.port}"
        self.socket.bind(self.address)
        self.answers, self.stop = answers, threading.Event()
        self.heard: list[tuple[m.Message, int]] = []
        self.names: set[bytes] = set()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    @property
    def asked(self) -> int:
        return len(self.heard)

    def _serve(self) -> None:
        while not self.stop.is_set():
            if self.socket.poll(20):
                identity, head, *frames = self.socket.recv_multipart()
                sequence, request = m.decode_request(head)
                self.heard.append((request, len(frames)))
                self.names.add(identity)
                answer = self.answers(sequence, request)
                if answer is not None:
                    self.socket.send_multipart([identity, *answer])

    def close(self) -> None:
        self.stop.set()
        self.thread.join()
        self.socket.close()
        self.context.term()


class EngineProcess(Process):
    """An `Engine` in a process of its own."""

    def __init__(self, prefix: tuple[str, ...] = (), **config: Any) -> None:
        script = Path(__file__).with_name("engine_process.py")
        super().__init__([*prefix, sys.executable, str(script), json.dumps(config)])

    def say(self, **command: Any) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(command) + "\n")
        self.child.stdin.flush()

    def hear(self, seconds: float = PATIENCE) -> Any:
        """The next answer; lines of the log are passed over."""
        deadline = time.monotonic() + seconds
        while True:
            line = self._next(deadline)
            assert line is not None, f"the engine has ended:\n{''.join(self.log[-30:])}"
            with contextlib.suppress(json.JSONDecodeError):
                answer = json.loads(line)
                if not isinstance(answer, dict) or "logger" not in answer:
                    return answer

    def ask(self, do: str, **command: Any) -> Any:
        self.say(do=do, **command)
        return self.hear()


class Raw:
    """A client that speaks the messages themselves, as an engine process of `instance`, over the Unix socket."""

    def __init__(self, server: Server, instance: str = "raw", shards: int = 1, shard_bytes: int = 4096) -> None:
        hello = m.Hello(m.PROTOCOL_VERSION, "test", instance, "raw", 0, os.getpid(), session=os.urandom(16))
        self.hello, self.path = hello, server.socket_path()
        self.layout = Layout("raw", "bfloat16", 1, 1, shard_bytes // 2, 1, kind="mla")
        self.connect(shards, shard_bytes)

    def connect(self, shards: int = 1, shard_bytes: int = 4096) -> None:
        self.carrier = UnixCarrier(self.path, self.hello, PATIENCE)
        os.close(self.carrier.descriptor)
        chunk_tokens = self.carrier.welcome.chunk_tokens
        layout = msgspec.structs.replace(self.layout, chunk_tokens=chunk_tokens)
        for shard in range(shards):
            self.space = self.ask(m.Register(layout, shards, shard, shard_bytes)).space

    def ask(self, request: m.Message) -> Any:
        return self.carrier.exchange(request, PATIENCE)[0]

    def reserve(self, hashes: bytes, parent: bytes = b"", shard: int = 0) -> Any:
        return self.ask(m.Reserve(self.space, shard, parent, not parent, hashes))

    def store(self, hashes: bytes, parent: bytes = b"") -> int:
        """Reserve and commit, without a byte; how many chunks were to be stored."""
        granted = self.reserve(hashes, parent)
        if granted.reservation:
            self.ask(m.Commit(granted.reservation, True))
        return len(hashes) // 16 - granted.extents.count(b"\xff\xff\xff\xff")

    def hits(self, hashes: bytes) -> int:
        """Chunks that are there; leaves no lease, but touches them."""
        found = self.ask(m.Lookup(self.space, hashes))
        self.ask(m.Release([found.lease]))
        return found.chunks

    def close(self) -> None:
        self.carrier.close()
