"""`python -m benchmarks.pulls`: a server pulls from another one over loopback TCP, beside plain sockets in the same run.

limit: as many plain sockets as ours has for payload, to a process of their own, with memory that is in use at both ends and
nothing checked. ours: the tier of peers in this process loads from a real `lmcache server`. Wall time.

Where NIXL is installed, pulls by it are measured too: over UCX's TCP beside the same sockets, and over shared memory beside one
thread that copies as many bytes from another process's memory file into the same arena (np.copyto, nothing checked).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import mmap
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from benchmarks.rows import Goal, Row, report
from benchmarks.run import about
from lmcache.chunks import Layout, space_fingerprint
from lmcache.memory.arena import Arena
from lmcache.peers.dial import Myself
from lmcache.peers.tier import PeersTier
from lmcache.runtime import RUNTIME
from lmcache.tiers import OK, Region, ShardKey
from lmcache.tiers.operation import Close, Contains, Load, Open, Operation
from lmcache.wire import messages as m
from lmcache.wire.carriers import UnixCarrier

MIB = 1 << 20
TOTAL = 256 * MIB
"""Of one sample."""
LOOKED_UP = 512
_SENDER = """
import socket, sys
size, total = int(sys.argv[1]), int(sys.argv[2])
data = memoryview(bytearray(b"x") * size)
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
import threading
def serve(one):
    while one.recv(1):
        for _ in range(total // size):
            one.sendall(data)
while True:
    one, _ = listener.accept()
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=serve, args=(one,), daemon=True).start()
"""


class Plain:
    """Some sockets to a process that sends as many bytes over each as are asked for."""

    def __init__(self, sockets: int) -> None:
        self.share = TOTAL // sockets
        command = [sys.executable, "-c", _SENDER, str(4 * MIB), str(self.share)]
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.child.stdout is not None
        port = int(self.child.stdout.readline())
        self.sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(sockets)]
        self.memory = [memoryview(bytearray(b"y") * (4 * MIB)) for _ in range(sockets)]

    def seconds(self) -> float:
        threads = [
            threading.Thread(target=self._receive, args=both) for both in zip(self.sockets, self.memory, strict=True)
        ]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - began

    def _receive(self, one: socket.socket, memory: memoryview) -> None:
        one.sendall(b"?")
        left = self.share
        while left:
            left -= one.recv_into(memory, min(left, len(memory)))

    def close(self) -> None:
        self.child.kill()
        self.child.wait()


class Copied:
    """One thread that copies from one memory file into another."""

    def __init__(self, into: memoryview) -> None:
        descriptor = os.memfd_create("lmbench")
        os.ftruncate(descriptor, TOTAL)
        self.memory = mmap.mmap(descriptor, TOTAL)
        os.close(descriptor)
        self.memory[:] = b"x" * TOTAL
        self.into = np.frombuffer(into, np.uint8)

    def seconds(self) -> float:
        source, size = np.frombuffer(self.memory, np.uint8), 8 * MIB
        began = time.perf_counter()
        for at in range(0, TOTAL, size):
            np.copyto(self.into[at : at + size], source[at : at + size])
        return time.perf_counter() - began

    def close(self) -> None:
        pass  # the memory ends with the object


@contextmanager
def served(key: Path | None, *more: str) -> Iterator[tuple[int, str]]:
    """A real server: its port, and the path of its socket."""
    with tempfile.TemporaryDirectory(prefix="lmbench-") as folder:
        flags = [
            "--l1-size-gb",
            "1",
            "--port",
            "0",
            "--http-port",
            "0",
            "--http-host",
            "127.0.0.1",
            "--socket-dir",
            folder,
        ]
        flags += ["--auth-key-file", str(key)] if key else []
        flags += more
        command = [sys.executable, "-m", "lmcache.cli.main", "server", *flags]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            assert child.stdout is not None
            port = 0
            for line in child.stdout:
                if "Engines' port" in line:
                    port = int(line.partition("tcp://127.0.0.1:")[2].partition(":")[0])
                if "is running" in line:
                    break
            threading.Thread(target=child.stdout.read, daemon=True).start()
            (path,) = Path(folder).glob("*.sock")
            yield port, str(path)
        finally:
            child.terminate()
            child.wait()


class Filled:
    """An engine that has stored chunks of one shard of `size` bytes; their keys."""

    def __init__(self, path: str, size: int, chunks: int) -> None:
        self.carrier = UnixCarrier(path, m.Hello(m.PROTOCOL_VERSION, "", "bench", "bench", 0, os.getpid()), 10.0)
        os.close(self.carrier.descriptor)
        layout = Layout("bench", "bfloat16", 1, 1, size // 2, 1, kind="mla")
        layout = msgspec.structs.replace(layout, chunk_tokens=self.carrier.welcome.chunk_tokens)
        space = self._ask(m.Register(layout, 1, 0, size)).space
        hashes = os.urandom(16 * chunks)
        granted = self._ask(m.Reserve(space, 0, b"", True, hashes))
        self._ask(m.Commit(granted.reservation, True))
        name = space_fingerprint(layout, [], None)
        self.keys = [ShardKey(name, hashes[at : at + 16], 0, 1) for at in range(0, len(hashes), 16)]

    def _ask(self, request: m.Message) -> Any:
        return self.carrier.exchange(request, 10.0)[0]


class Pulling:
    """arena: what is pulled goes there by NIXL."""

    def __init__(self, port: int, connections: int, key: Path | None, arena: Arena | None = None) -> None:
        self.tier = PeersTier([("127.0.0.1", port)], RUNTIME, connections)
        self.tier.introduce(Myself(key_file=key, devices="lo" if arena is not None else ""))
        if arena is not None:
            memory = arena.mapping.view(0, arena.size_bytes)
            self.tier.attach(Region(arena.mapping.address, arena.size_bytes, arena.descriptor, memory))
        self.do(Open)
        while not self.tier._roster.peers or self.tier._roster.peers[0].asks is None:
            time.sleep(0.01)
        while arena is not None and self.tier._roster.peers[0].source is None:
            time.sleep(0.01)

    def do(self, kind: Any, *arguments: Any) -> Any:
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        operation: Operation[Any] = kind(RUNTIME.now() + 60, lambda *end: ended.put(end), *arguments)
        self.tier.submit(operation)
        result, error = ended.get()
        if error is not None:
            raise error
        return result

    def load_seconds(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> float:
        """As a server does: four loads of 32 MiB at a time."""
        assert all(self.do(Contains, keys))
        each = max(1, self.tier.batch_bytes // len(into[0]))
        batches = [slice(at, at + each) for at in range(0, len(keys), each)]
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        began = time.perf_counter()
        for number, batch in enumerate(batches):
            if number >= self.tier.concurrency:
                assert set(ended.get()[0]) == {OK}
            self.tier.submit(Load(RUNTIME.now() + 60, lambda *end: ended.put(end), keys[batch], into[batch]))
        for _ in batches[-self.tier.concurrency :]:
            assert set(ended.get()[0]) == {OK}
        return time.perf_counter() - began


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pulls", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure there")
    parser.add_argument("--connections", type=int, default=2, help="to the peer, for payload; as many plain sockets")
    parser.add_argument("--only-nixl", action="store_true", help="leave out the pulls over connections")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: does it work, not how fast is it")
    options = parser.parse_args(argv)
    keys = () if options.only_nixl else (False, True)
    rows = [row for key in keys for row in measured(options.connections, key, 4 if options.quick else 12)]
    if importlib.util.find_spec("nixl_cu12") is None:
        print("NIXL is not installed (pip install --no-deps nixl-cu12), so pulls by it are not measured")
    else:
        rows += [
            row for tls in ("tcp", "cma,tcp") for row in by_nixl(options.connections, tls, 4 if options.quick else 12)
        ]
    facts = about((), argv, "benchmarks.pulls")
    if options.json:
        options.json.write_text(json.dumps({**facts, "rows": [row.as_json() for row in rows]}, indent=1) + "\n")
    print(report(facts, rows, as_markdown=False))
    return 0


def measured(connections: int, with_key: bool, rounds: int) -> list[Row]:
    said = "encrypted" if with_key else "plain"
    pull = {
        size: Row(f"pull_{said}_{name}", f"Pull from a peer, {name} shards, {said}", "GB/s", Goal(0.8, "more", 1.0))
        for size, name in ((8 * MIB, "8 MiB"), (MIB // 2, "0.5 MiB"))
    }
    lookup = Row(f"ask_{said}", f"Which of {LOOKED_UP} chunks a peer has, {said}", "ms", Goal(1.0, "less"))
    with tempfile.TemporaryDirectory(prefix="lmbench-") as folder:
        key = Path(folder, "key") if with_key else None
        if key is not None:
            key.write_bytes(zmq.curve_keypair()[1])
            key.chmod(0o600)
        with served(key) as (port, path):
            plain, ours = Plain(connections), Pulling(port, connections, key)
            memory = memoryview(bytearray(b"z") * TOTAL)
            filled = {size: Filled(path, size, TOTAL // size) for size in pull}
            try:
                for round_ in range(rounds + 1):
                    for size, row in pull.items():
                        into = [memory[at : at + size] for at in range(0, TOTAL, size)]
                        limit, own = plain.seconds(), ours.load_seconds(filled[size].keys, into)
                        if round_:
                            row.add("limit", [TOTAL / limit / 1e9])
                            row.add("ours", [TOTAL / own / 1e9])
                    times = []
                    for _ in range(20):
                        began = time.perf_counter()
                        assert all(ours.do(Contains, filled[MIB // 2].keys[:LOOKED_UP]))
                        times.append((time.perf_counter() - began) * 1000)
                    if round_:
                        lookup.add("ours", times)
            finally:
                plain.close()
                ours.do(Close)
    return [*pull.values(), lookup]


def by_nixl(connections: int, tls: str, rounds: int) -> list[Row]:
    """tls: what UCX may use, as its variable of this name says."""
    said, name = ("UCX TCP", "tcp") if tls == "tcp" else ("shared memory", "shared")
    goal = Goal(0.8, "more", 1.0) if tls == "tcp" else Goal(8.0, "more", 10.0)  # of memcpy's 10 GB/s
    pull = {
        size: Row(f"pull_nixl_{name}_{key}", f"Pull by NIXL, {key} shards, {said}", "GB/s", goal)
        for size, key in ((8 * MIB, "8 MiB"), (MIB // 2, "0.5 MiB"))
    }
    os.environ["UCX_TLS"] = tls
    with tempfile.TemporaryDirectory(prefix="lmbench-", dir="/dev/shm") as folder:
        arena = Arena(Path(folder), TOTAL)
        try:
            arena.back([0], TOTAL)
            memory = arena.mapping.view(0, TOTAL)
            with served(None, "--peer-transport", "nixl") as (port, path):
                limit = Plain(connections) if tls == "tcp" else Copied(memory)
                ours = Pulling(port, connections, None, arena)
                filled = {size: Filled(path, size, TOTAL // size) for size in pull}
                try:
                    for round_ in range(rounds + 1):
                        for size, row in pull.items():
                            into = [memory[at : at + size] for at in range(0, TOTAL, size)]
                            other, own = limit.seconds(), ours.load_seconds(filled[size].keys, into)
                            if round_:
                                row.add("limit", [TOTAL / other / 1e9])
                                row.add("ours", [TOTAL / own / 1e9])
                    assert ours.tier._roster.peers[0].source is not None, "it went over TCP in between"
                finally:
                    limit.close()
                    ours.do(Close)
        finally:
            arena.close()
    return list(pull.values())


if __name__ == "__main__":
    sys.exit(main())
