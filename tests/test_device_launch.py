"""What native code hands to a GPU's driver, with a driver of our own that does it at once, in host memory."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from lmcache.errors import LayoutError
from lmcache.transfer.gpu.launch import Launcher, Tables, staging_bytes

pointer, u32, u64, size_t = ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint64, ctypes.c_size_t
LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, pointer, *(u32,) * 7, pointer, ctypes.POINTER(pointer), pointer)
UPLOAD = ctypes.CFUNCTYPE(ctypes.c_int, u64, pointer, size_t, pointer)
DOWNLOAD = ctypes.CFUNCTYPE(ctypes.c_int, pointer, u64, size_t, pointer)
RECORD = ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer)
WAIT = ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer, u32)
KERNEL, KERNELS, COPIES = 7, 1, 2
PLANES, CHUNK, ROW, PLACES = 6, 4, 8, 3
PLANE_BYTES = CHUNK * ROW
EXTENT_BYTES = PLANES * PLANE_BYTES
TOKENS = 64


class Driver:
    """Does what it is told at once, and keeps what it was told. Paged KV: [plane][token][row], one block a token."""

    def __init__(self, to_host: bool, fails_at: int = -1) -> None:
        self.to_host, self.fails_at, self.calls = to_host, fails_at, list[tuple[Any, ...]]()
        self.paged = np.random.default_rng(1).integers(0, 255, (PLANES, TOKENS, ROW), dtype=np.uint8)
        self.bases = np.array([plane.ctypes.data for plane in self.paged], dtype=np.int64)
        self.functions = (
            *(LAUNCH(self.launch), UPLOAD(self.upload), DOWNLOAD(self.download)),
            *(RECORD(self.record), WAIT(self.wait)),
        )
        self.addresses = tuple(ctypes.cast(one, pointer).value or 0 for one in self.functions)

    def told(self, *call: Any) -> int:
        self.calls.append(call)
        return 700 if len(self.calls) == self.fails_at else 0

    def launch(self, kernel: int, tiles: int, planes: int, runs: int, *rest: Any) -> int:
        threads, one, two, shared, stream, parameters, _ = rest
        kinds = (u64, u64, u64, u64, ctypes.c_int32, ctypes.c_int32)
        given = [ctypes.cast(parameters[at], ctypes.POINTER(kind))[0] for at, kind in enumerate(kinds)]
        bases, blocks, meta, staging, first_plane, piece_words = given
        assert (kernel, threads, one, two, shared, stream) == (KERNEL, 256, 1, 1, 16, KERNELS)
        for run in range(runs):
            first, count, in_extent = (ctypes.c_int64 * 3).from_address(meta + 24 * run)
            assert tiles * 2 >= (CHUNK if self.to_host else count), "tiles of 2 tokens"
            for plane in range(planes):
                if self.to_host:
                    ctypes.memset(staging + 2 * piece_words * run + plane * PLANE_BYTES, 0, PLANE_BYTES)
                base = ctypes.c_int64.from_address(bases + 8 * (first_plane + plane)).value
                for token in range(count):
                    paged = base + ROW * ctypes.c_int64.from_address(blocks + 8 * (first + token)).value
                    staged = staging + 2 * piece_words * run + plane * PLANE_BYTES + (in_extent + token) * ROW
                    ctypes.memmove(*((staged, paged) if self.to_host else (paged, staged)), ROW)
        return self.told("launch", stream, staging)

    def upload(self, device: int, host: int, size: int, stream: int) -> int:
        ctypes.memmove(device, host, size)
        return self.told("upload", stream, device, host, size)

    def download(self, host: int, device: int, size: int, stream: int) -> int:
        ctypes.memmove(host, device, size)
        return self.told("download", stream, device, host, size)

    def record(self, event: int, stream: int) -> int:
        return self.told("record", stream, event)

    def wait(self, stream: int, event: int, flags: int) -> int:
        return self.told("wait", stream, event)

    def copies(self) -> list[tuple[int, int]]:
        """(host address, bytes) of each DMA of KV."""
        return [(call[3], call[4]) for call in self.calls if call[1] == COPIES and call[0].endswith("load")]


class Copy:
    """A ring on such a driver, a copy of random runs through it, and where it has to go."""

    def __init__(
        self, to_host: bool, fails_at: int = -1, yield_bytes: int = 1 << 40, registration_bytes: int = 1 << 30
    ) -> None:
        self.driver, rng = Driver(to_host, fails_at), np.random.default_rng(2)
        self.ring = np.zeros((PLACES, 2 * EXTENT_BYTES), dtype=np.uint8)
        self.arena = rng.integers(0, 255, 20 * EXTENT_BYTES, dtype=np.uint8)
        self.launcher = Launcher(
            self.driver.addresses,
            [100 + place for place in range(PLACES)],
            [200 + place for place in range(PLACES)],
            kernel=KERNEL,
            threads=256,
            shared_bytes=16,
            kernels=KERNELS,
            copies=COPIES,
            to_host=to_host,
            bases=self.driver.bases.ctypes.data,
            ring=self.ring.ctypes.data,
            places=PLACES,
            place_bytes=2 * EXTENT_BYTES,
            plane_bytes=PLANE_BYTES,
            word_bytes=2,
            chunk_tokens=CHUNK,
            tile_tokens=2,
            row_tiles=1,
            yield_bytes=yield_bytes,
            registration_bytes=registration_bytes,
        )
        extents = [3, 4, 9, 0, 1, 2, 17]
        counts = [4, 4, 4, 3, 4, 4, 2]
        self.runs = np.array(
            [(s * EXTENT_BYTES, 4 * i, c, 4 - c) for i, (s, c) in enumerate(zip(extents, counts, strict=True))]
        )
        self.table = rng.permutation(TOKENS)[: 4 * len(extents)].astype(np.int64)
        self.host_tables = np.concatenate([self.table, self.runs[:, 1:].reshape(-1)])
        self.device_tables = np.zeros_like(self.host_tables)

    def run(self, planes: range, runs_in_piece: int, slabs: bool = False, upload: bool = True) -> None:
        blocks, base = self.device_tables.ctypes.data, self.arena.ctypes.data
        size = self.host_tables.nbytes if upload else 0
        tables = Tables(self.host_tables.ctypes.data, blocks, blocks + self.table.nbytes, size)
        self.launcher.launch(base, base if slabs else 0, tables, self.runs, planes, runs_in_piece)

    def pairs(self, planes: range) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """(row in paged KV, row in its slot) of every token and plane."""
        found = []
        for offset, first, count, in_extent in self.runs.tolist():
            extent = self.arena[offset : offset + EXTENT_BYTES].reshape(PLANES, CHUNK, ROW)
            for plane in planes:
                for token in range(count):
                    found.append(
                        (self.driver.paged[plane, self.table[first + token]], extent[plane, in_extent + token])
                    )
        return found


@pytest.mark.parametrize("to_host", [True, False])
@pytest.mark.parametrize(("step", "runs_in_piece"), [(6, 1), (6, 2), (4, 1), (1, 2), (5, 1)])
@pytest.mark.parametrize("registration_bytes", [1 << 30, 4096, 1000])
def test_every_row_arrives(to_host: bool, step: int, runs_in_piece: int, registration_bytes: int) -> None:
    copy = Copy(to_host, registration_bytes=registration_bytes)
    source = copy.driver.paged if to_host else copy.arena
    before = source.copy()
    copy.run(range(0, PLANES, step), runs_in_piece, slabs=True)
    assert all((paged == extent).all() for paged, extent in copy.pairs(range(PLANES)))
    assert (source == before).all()
    base = copy.arena.ctypes.data
    for host, size in copy.driver.copies():
        assert (host - base) // registration_bytes == (host - base + size - 1) // registration_bytes, (
            "no DMA across registrations"
        )


def test_neighbours_in_the_arena_go_together() -> None:
    copy = Copy(to_host=False)
    copy.run(range(0, PLANES, PLANES), 2)
    base = copy.arena.ctypes.data
    sent = [((host - base) // EXTENT_BYTES, size // EXTENT_BYTES) for host, size in copy.driver.copies()]
    assert sent == [(3, 2), (9, 1), (0, 1), (1, 2), (17, 1)]


def test_some_planes_only_and_tables_that_are_there() -> None:
    copy = Copy(to_host=False)
    kept = copy.driver.paged.copy()
    copy.run(range(2, 4, 2), 1)
    assert all((paged == extent).all() for paged, extent in copy.pairs(range(2, 4)))
    assert (copy.driver.paged[[0, 1, 4, 5]] == kept[[0, 1, 4, 5]]).all()
    copy.run(range(4, 6, 2), 1, upload=False)
    assert all((paged == extent).all() for paged, extent in copy.pairs(range(2, 6)))
    assert sum(call[0] == "upload" and call[1] == KERNELS for call in copy.driver.calls) == 1


@pytest.mark.parametrize("to_host", [True, False])
def test_a_place_is_used_again_only_when_it_is_empty(to_host: bool) -> None:
    copy = Copy(to_host)
    first, second = (KERNELS, COPIES) if to_host else (COPIES, KERNELS)
    copy.run(range(0, PLANES, 2), 1)
    steps = [call for call in copy.driver.calls if call[0] in ("wait", "record")]
    for number, at in enumerate(range(0, len(steps), 4)):
        place = number % PLACES
        assert steps[at : at + 4] == [
            ("wait", first, 200 + place),
            ("record", first, 100 + place),
            ("wait", second, 100 + place),
            ("record", second, 200 + place),
        ]


@pytest.mark.parametrize("to_host", [True, False])
def test_the_copy_engine_is_let_go_once_in_a_while(to_host: bool) -> None:
    """Also where copies are small: what was copied is counted from one to the next."""
    copy = Copy(to_host, yield_bytes=4 * EXTENT_BYTES)
    copy.run(range(0, PLANES, PLANES), 1)
    copy.run(range(0, PLANES, PLANES), 1)
    waits, piece, yields = [call for call in copy.driver.calls if call[0] == "wait"], 0, []
    for wait in waits:
        if wait[2] >= 200 and wait[2] != 200 + piece % PLACES:
            assert wait == ("wait", KERNELS if to_host else COPIES, 200 + (piece - 1) % PLACES)
            yields.append(piece)
        elif wait[2] < 200:
            piece += 1
    assert yields == [4, 9], "every fifth of 14"


def test_an_error_of_the_driver_is_told_and_ends_the_copy() -> None:
    copy = Copy(to_host=True, fails_at=9)
    with pytest.raises(RuntimeError, match="error 700"):
        copy.run(range(0, PLANES, PLANES), 1)
    assert len(copy.driver.calls) == 9


def test_a_ring_that_makes_no_sense_is_refused() -> None:
    copy = Copy(to_host=True)
    with pytest.raises(ValueError, match="at least one plane and run"):
        copy.run(range(0, PLANES, PLANES), 0)
    assert not copy.driver.calls


def test_the_size_of_the_staging_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, mebibytes in (("", 128), ("64", 64), (" 1 ", 1)):
        monkeypatch.setenv("LMCACHE_GPU_STAGING_MB", text)
        assert staging_bytes() == mebibytes << 20
    for text in ("0", "-1", "1.5", "much"):
        monkeypatch.setenv("LMCACHE_GPU_STAGING_MB", text)
        with pytest.raises(LayoutError, match=f"LMCACHE_GPU_STAGING_MB is '{text}': give a whole number of MiB"):
            staging_bytes()
