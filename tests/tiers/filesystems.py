"""Media that fail, and media that end the process, at an operation that the test names by its number or its kind."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from lmcache.tiers.filesystem import BLOCK_BYTES, Filesystem, blocks
from lmcache.tiers.frame import HEADER_BYTES

WRITES = ("open", "close", "pwritev", "allocate", "punch", "truncate", "sync", "rename", "unlink", "touch")
"""All that changes something; each is a boundary at which a crash can come."""


class FaultyFilesystem(Filesystem):
    """`fail["pwritev"] = errno.EIO` and the like, by operation; `after` so many operations of that kind that still work."""

    def __init__(self) -> None:
        self.fail: dict[str, int] = {}
        self.after: dict[str, int] = {}
        self.seen: list[tuple[str, Any]] = []

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in (*WRITES, "preadv"):
            return method

        def call(*arguments: Any) -> Any:
            code = self.fail.get(name)
            if code and self.after.get(name, 0) > 0:
                self.after[name] -= 1
            elif code and self.applies(name, arguments):
                self.seen.append((name, arguments))
                if name == "close":
                    method(*arguments)
                raise OSError(code, os.strerror(code))
            return method(*arguments)

        return call

    def read_frames(
        self, fd: int, frames: Sequence[tuple[int, int, int]], piece_bytes: int
    ) -> list[tuple[int, bytes, bytes]]:
        """As the native code does it, except that each read is a `preadv`."""
        return [self.read_frame(fd, *one) for one in frames]

    def read_frame(self, fd: int, offset: int, size: int, address: int) -> tuple[int, bytes, bytes]:
        complete = blocks(size) + BLOCK_BYTES
        memory = memoryview(mmap.mmap(-1, complete))
        try:
            if self.read(fd, [memory], offset) < complete:
                return -1, b"", b""
        except OSError as error:
            return error.errno or 0, b"", b""
        payload, header = bytes(memory[:size]), bytes(memory[blocks(size) :][:HEADER_BYTES])
        ctypes.memmove(address, payload, size)
        return 0, header, xxhash.xxh3_128_digest(payload + header[:112])

    def applies(self, name: str, arguments: Sequence[Any]) -> bool:
        """For tests that fail one file only."""
        return True


class EndingFilesystem(Filesystem):
    """Kills this process before operation number `at`; with `torn`, when half of its bytes are written."""

    def __init__(self, at: int, torn: bool, said: Callable[[str], None]) -> None:
        self.at, self.torn, self.said = at, torn, said
        self.count = 0
        self.kinds: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in WRITES:
            return method

        def call(*arguments: Any) -> Any:
            if self.count == self.at:
                if self.torn and name == "pwritev":
                    self.tear(*arguments)
                self.said(f"killed {name}")
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            self.kinds.append(name)
            return method(*arguments)

        return call

    def tear(self, fd: int, buffers: list[memoryview], offset: int) -> None:
        """Half of it, in blocks where it is as large as that, as a device would."""
        data = b"".join(buffers)
        half = len(data) // 2 // 4096 * 4096 or len(data) // 2
        path = Path(f"/proc/self/fd/{fd}").resolve()
        plain = os.open(path, os.O_WRONLY)  # not direct: the half may lie anywhere
        os.pwrite(plain, data[:half], offset)
        os.close(plain)
