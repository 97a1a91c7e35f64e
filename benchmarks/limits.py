"""What the machine can do at all, measured in the same run: copies, round trips, dictionary lookups, hashing."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from blake3 import blake3

from benchmarks.echo import make_keys, receive, send
from benchmarks.scenarios import Shape

EXTENTS_BYTES = 1 << 30


def times(call: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of `count` calls."""
    samples = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


def compile_copy(directory: Path) -> ctypes.CDLL | None:
    """`limits.c` for this very CPU, or None without a compiler (the limit is then NumPy's)."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = directory / "limits.so"
    source = Path(__file__).with_name("limits.c")
    command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(library))


class CopyLimit:
    """Gather and scatter between paged memory of one shape and touched shared memory, by the shortest possible C."""

    def __init__(self, shape: Shape, library: ctypes.CDLL | None, rng: random.Random) -> None:
        self.shape = shape
        self._library = library
        self._run_bytes = shape.block_bytes
        self._paged = aligned((shape.planes, shape.blocks, self._run_bytes))
        self._paged[:] = np.arange(shape.planes, dtype=np.uint8)[:, None, None]
        self._extents = shared_memory(EXTENTS_BYTES)
        self._planes = (ctypes.c_void_p * shape.planes)(*(plane.ctypes.data for plane in self._paged))
        self._free_blocks = list(range(shape.blocks))
        rng.shuffle(self._free_blocks)
        self._pool = ThreadPoolExecutor(2)
        self._next = 0

    def copy(self, scatter: bool, chunks: int, threads: int) -> float:
        """Seconds to move `chunks` chunks, each to (from) the next slot."""
        jobs = [self._next_chunk() for _ in range(chunks)]
        start = time.perf_counter()
        if threads == 1:
            self._part(scatter, jobs, 0, self.shape.planes)
        else:
            edges = [self.shape.planes * part // threads for part in range(threads + 1)]
            parts = [self._pool.submit(self._part, scatter, jobs, a, b) for a, b in itertools.pairwise(edges)]
            for part in parts:
                part.result()
        return time.perf_counter() - start

    def _next_chunk(self) -> tuple[np.ndarray, int]:
        per_chunk, size = self.shape.blocks_per_chunk, self.shape.chunk_bytes
        number, self._next = self._next, self._next + 1
        first = number * per_chunk % (self.shape.blocks - per_chunk + 1)
        blocks = np.array(self._free_blocks[first : first + per_chunk], dtype=np.int32)
        return blocks, number % (EXTENTS_BYTES // size) * size

    def _part(self, scatter: bool, jobs: list[tuple[np.ndarray, int]], first: int, end: int) -> None:
        run, address = self._run_bytes, self._extents.ctypes.data
        for blocks, offset in jobs:
            if self._library is not None:
                self._library.copy_chunk(
                    int(scatter),
                    self._planes,
                    first,
                    end,
                    ctypes.c_size_t(run),
                    ctypes.c_void_p(blocks.ctypes.data),
                    len(blocks),
                    ctypes.c_void_p(address + offset),
                )
                continue
            extent = self._extents[offset : offset + self.shape.chunk_bytes].reshape(
                self.shape.planes, len(blocks), run
            )
            if scatter:
                self._paged[first:end, blocks] = extent[first:end]
            else:
                np.take(self._paged[first:end], blocks, axis=1, out=extent[first:end])


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Bytes that start on a page, as streaming stores want it."""
    return np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), dtype=np.uint8).reshape(shape)


def shared_memory(size: int) -> np.ndarray:
    """Touched pages of /dev/shm, without a name."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), size)
        memory = np.frombuffer(mmap.mmap(file.fileno(), size), dtype=np.uint8)
    memory[:] = 1
    return memory


def first_touch(size: int = 256 << 20) -> float:
    """Bytes a second when a copy goes into shared memory that nobody has touched."""
    source = np.ones(size, dtype=np.uint8)
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), size)
        fresh = np.frombuffer(mmap.mmap(file.fileno(), size), dtype=np.uint8)
    start = time.perf_counter()
    fresh[:] = source
    return size / (time.perf_counter() - start)


def memcpy(size: int = 64 << 20) -> float:
    """Bytes a second of NumPy's plain copy between touched private memory."""
    source, target = np.ones(size, dtype=np.uint8), np.ones(size, dtype=np.uint8)
    return size / min(times(lambda: np.copyto(target, source), 5))


@contextlib.contextmanager
def echo_server(keys: int = 0) -> Iterator[str]:
    """`benchmarks.echo` in a process of its own; yields the path of its socket."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/echo"
        command = [sys.executable, "-m", "benchmarks.echo", path, str(keys)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                yield path
            finally:
                process.kill()


def round_trips(path: str, payload: bytes, count: int) -> list[float]:
    """Seconds of each round trip of `payload` to the echo server."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)

        def once() -> None:
            send(connection, payload)
            receive(connection)

        times(once, 20)
        return times(once, count)


def lookup_payload(chunks: int) -> bytes:
    """The keys of one lookup, known to an echo server with at least as many."""
    return b"".join(make_keys(chunks))


def hash_tokens(token_ids: list[int], chunk_tokens: int) -> bytes:
    """Chained BLAKE3 of full chunks from a Python list: what any engine has to spend on a new prompt."""
    raw, step, parent, out = array("I", token_ids).tobytes(), chunk_tokens * 4, bytes(16), []
    for at in range(0, len(raw), step):
        parent = blake3(parent + raw[at : at + step]).digest(16)
        out.append(parent)
    return b"".join(out)


def dict_lookups(entries: int, asked: int, count: int, rng: random.Random) -> list[float]:
    """Seconds for `asked` dictionary lookups at random places among `entries` 16-byte keys."""
    index = {key: number for number, key in enumerate(make_keys(entries))}
    samples = []
    for _ in range(count):
        start_at = rng.randrange(max(1, entries - asked))
        wanted = b"".join(number.to_bytes(8, "little") * 2 for number in range(start_at, start_at + asked))
        start = time.perf_counter()
        for at in range(0, len(wanted), 16):
            index.get(wanted[at : at + 16])
        samples.append(time.perf_counter() - start)
    return samples


def shared_round_trips(path: str, clients: int, seconds: float) -> float:
    """Round trips a second of `clients` processes that ask the echo server at once."""
    program = f"from benchmarks.limits import count_round_trips as c; print(c({path!r}, {seconds}))"
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(clients)
    ]
    return sum(float(process.communicate()[0]) for process in started)


def count_round_trips(path: str, seconds: float) -> float:
    """Round trips a second of this process, by wall time from its first to its last."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        payload, done, start = lookup_payload(1), 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            send(connection, payload)
            receive(connection)
            done += 1
        return done / (time.perf_counter() - start)


def thread_hops(count: int) -> list[float]:
    """Seconds to hand something to another thread and back."""
    there, back = threading.Semaphore(0), threading.Semaphore(0)

    def answer() -> None:
        for _ in range(count):
            there.acquire()
            back.release()

    thread = threading.Thread(target=answer)
    thread.start()

    def hop() -> None:
        there.release()
        back.acquire()

    samples = times(hop, count)
    thread.join()
    return samples


def interpreter_start() -> tuple[float, int]:
    """Seconds and resident bytes of a Python that imports what a server of ours depends on, and nothing of ours."""
    program = (
        "import blake3, msgspec, numpy, starlette.applications, uvicorn, zmq\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmRSS')).split()[1])"
    )
    start = time.perf_counter()
    kib = int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
    return time.perf_counter() - start, kib * 1024
