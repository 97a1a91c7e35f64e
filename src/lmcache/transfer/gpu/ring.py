"""The staging ring: the copies of one direction (stores or loads), cut into pieces that pass through GPU memory.

The ring is an array of equal buffers in GPU memory, called *places*. Each piece of a copy takes the next place. The kernels and
the DMA transfers have a CUDA stream each, and each place has two events, recorded when the place has been filled and when it has
been emptied. The host waits for the end of a copy, not of each piece, and does not hold the GIL meanwhile.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
import triton

from lmcache.errors import LayoutError
from lmcache.observability.log import init_logger
from lmcache.transfer.bounds import Blocks, Runs
from lmcache.transfer.gpu.driver import find_driver, using_device
from lmcache.transfer.gpu.kernel import WARPS, WORD_TYPES, copy_kernel, kernel_constants
from lmcache.transfer.gpu.launch import MAX_PLACES, Launcher, Shape, Tables
from lmcache.transfer.gpu.pinned import REGISTRATION_BYTES, PinnedArena
from lmcache.transfer.progress import Progress, planes_in_group

logger = init_logger(__name__)

_PIECES_IN_RING = 4
"""Measured on an H200: 8 pieces of half the size lose a quarter of the rate to launches when both directions run."""
_SPIN_BYTES = 64 << 20
"""The host spins while it waits for a smaller copy, which ends within a millisecond: waking up would take a tenth of that."""
_GROUP_BYTES = 4 << 20
"""Bytes of one chunk in one transfer if the engine waits for layers one by one. Smaller transfers lower the rate."""
_YIELD_BYTES = 90 << 20
"""After so many bytes a copy waits 19 microseconds for the kernel of the previous piece. The copy engine serves one queue for as
long as that queue need not wait, and the engine's own small copies (token ids in and out) are in another queue. On an H100 a step
of 1.5 ms beside a load of 45 ms took 46 ms without this wait and takes 2.0 ms with it, at a cost of 1 % of the rate."""
_COPIES_LAUNCHED = 2
"""How many copies of one direction may be in flight: while one runs, the next one is launched behind it."""


@dataclass(frozen=True)
class Source:
    """The paged KV that a ring copies from or to.

    bases: int64 [planes], the planes' addresses, on `device`. shape: the strides that all planes share. shard_bytes: bytes of the
    extent of a full chunk, which has `chunk_tokens` tokens.
    """

    device: torch.device
    bases: torch.Tensor
    shape: Shape
    block_tokens: int
    chunk_tokens: int
    shard_bytes: int

    @property
    def planes(self) -> int:
        return len(self.bases)


class _DeviceTables:
    """The block table of a copy and (first token, token count, token in extent) of its runs, in pinned and device memory."""

    def __init__(self, words: int, device: torch.device) -> None:
        self.used = torch.cuda.Event()
        """The event after the last kernel that reads the tables."""
        self._make(words, device)

    def _make(self, words: int, device: torch.device) -> None:
        self._host = torch.empty(words, dtype=torch.int64, pin_memory=True)
        self._words = self._host.numpy()
        self._device = torch.empty_like(self._host, device=device)
        self._addresses = self._host.data_ptr(), self._device.data_ptr()

    def fill(self, blocks: Blocks, runs: Runs) -> None:
        """Overwrite the tables with those of the next copy, once the device has read the previous ones."""
        self.used.synchronize()
        self._blocks, words = len(blocks), len(blocks) + 3 * len(runs)
        if words > len(self._words):
            self._make(2 * words, self._device.device)
        self._words[: self._blocks] = blocks
        self._words[self._blocks : words].reshape(-1, 3)[:] = runs[:, 1:]
        self._filled = self._unsent = words

    def addresses(self) -> Tables:
        """Return where the tables are. The launcher uploads them before its first kernel."""
        words, self._unsent = self._unsent, 0
        host, device = self._addresses
        return Tables(host, device, device + 8 * self._blocks, 8 * words)

    def uploaded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (blocks, runs) on the device, for kernels of the current stream. The first call uploads them, behind a load's
        first transfer."""
        if self._unsent:
            words, self._unsent = self._unsent, 0
            self._device[:words].copy_(self._host[:words], non_blocking=True)
        return self._device[: self._blocks], self._device[self._blocks : self._filled].view(-1, 3)


class StagingRing:
    """The copies of one direction. Any thread may call `run`. One launches at a time; `_COPIES_LAUNCHED` may be in flight.

    ring_bytes: GPU memory of the ring. to_host: True for stores (paged KV to arena), False for loads.

    Raises:
        LayoutError: the ring does not fit in GPU memory.
    """

    def __init__(self, source: Source, arena: PinnedArena, ring_bytes: int, to_host: bool) -> None:
        self._source, self._arena, self._to_host = source, arena, to_host
        extent, planes, device = source.shard_bytes, source.planes, source.device
        self._plane_bytes = extent // planes
        target = ring_bytes // _PIECES_IN_RING
        in_piece = max(1, min(planes, target // self._plane_bytes))
        self._planes_in_piece = -(
            -planes // -(-planes // in_piece)
        )  # evens out the pieces, so that the last is not tiny
        self._chunks_in_piece = max(1, target // extent) if in_piece == planes else 1
        piece_bytes = self._planes_in_piece * self._plane_bytes * self._chunks_in_piece
        self._planes_in_group = planes_in_group(self._plane_bytes, _GROUP_BYTES, self._planes_in_piece)
        self._chunks_of_group = piece_bytes // (self._planes_in_group * self._plane_bytes)
        count = max(2, ring_bytes // piece_bytes)
        try:
            ring = torch.empty((count, piece_bytes), dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise LayoutError(
                f"no {ring_bytes >> 20} MiB of GPU memory for staging: lower LMCACHE_GPU_STAGING_MB"
            ) from error
        self._places = [(piece, piece.view(WORD_TYPES[source.shape.word_bytes][0])) for piece in ring]
        self._kernels, self._copies = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._last_step = self._copies if to_host else self._kernels
        """The stream of a piece's second step (the transfer of a store, the kernel of a load)."""
        self._filled = [torch.cuda.Event() for _ in range(count)]
        self._emptied = [torch.cuda.Event() for _ in range(count)]
        self._tables = [_DeviceTables(1 << 12, device) for _ in range(_COPIES_LAUNCHED)]
        self._copies_begun = self._pieces_begun = self._unyielded_bytes = 0
        self._constants = kernel_constants(source.shape, source.chunk_tokens, source.block_tokens, to_host)
        self._lock = threading.Lock()
        self._launcher = self._make_launcher()

    def run(self, base: int, blocks: Blocks, runs: Runs, progress: Progress | None = None) -> None:
        """Copy all runs and return when the copy has ended. Another thread may launch the next copy meanwhile.

        base: the address at which the arena is mapped. blocks, runs: as in `CpuCopier`, and checked. progress: for loads only;
        the planes are then copied in order, and each group of them is reported.

        Raises:
            RuntimeError: the driver refused the copy, or the device failed.
        """
        if not len(runs):
            return
        with using_device(self._source.device):
            self._launch_all(base, blocks, runs, progress).synchronize()

    def _launch_all(self, base: int, blocks: Blocks, runs: Runs, progress: Progress | None) -> torch.cuda.Event:
        """Launch all pieces and return the event after the last one."""
        with self._lock:
            before = torch.cuda.current_stream()
            try:
                torch.cuda.set_stream(self._kernels)
                tables = self._tables[self._copies_begun % len(self._tables)]
                self._copies_begun += 1
                tables.fill(blocks, runs)
                if progress is None:
                    self._by_chunks(base, tables, runs)
                else:
                    self._by_planes(base, tables, runs, progress)
                tables.used.record(self._kernels)
                last = torch.cuda.Event(blocking=len(runs) * self._source.shard_bytes > _SPIN_BYTES)
                last.record(self._last_step)
                return last
            except Exception:  # the caller learns of the failure and may reuse the blocks and the extents
                self._copies.synchronize()
                self._kernels.synchronize()
                raise
            finally:
                torch.cuda.set_stream(before)

    def _by_chunks(self, base: int, tables: _DeviceTables, runs: Runs) -> None:
        planes = range(0, self._source.planes, self._planes_in_piece)
        self._pieces(base, tables, runs, planes, self._chunks_in_piece)

    def _by_planes(self, base: int, tables: _DeviceTables, runs: Runs, progress: Progress) -> None:
        step, planes = self._planes_in_group, self._source.planes
        for plane in range(0, planes, step):
            end = min(plane + step, planes)
            self._pieces(base, tables, runs, range(plane, end, step), self._chunks_of_group)
            point = torch.cuda.Event()
            point.record(self._kernels)
            progress.arrived(end, point)

    def _pieces(self, base: int, tables: _DeviceTables, runs: Runs, planes: range, chunks: int) -> None:
        """Launch the planes `planes` of all runs. Each piece has `planes.step` planes of `chunks` chunks."""
        if self._launcher is not None:
            registered_from = self._arena.registrations_from(base)
            self._launcher.launch(base, registered_from, tables.addresses(), runs, planes, chunks)
            return
        for at in range(0, len(runs), chunks):
            for plane in planes:
                self._piece(base, tables, runs[at : at + chunks], at, plane, min(planes.step, planes.stop - plane))

    def _make_launcher(self) -> Launcher | None:
        """Return an object that launches pieces from C; None if they have to be launched from Python."""
        source, constants = self._source, self._constants
        plane_words = self._plane_bytes // source.shape.word_bytes
        driver = find_driver(torch.version.hip is not None)
        if driver is None or len(self._places) > MAX_PLACES or plane_words == 1:
            return None
        planes = range(0, source.planes, self._planes_in_piece)
        try:
            with torch.cuda.stream(self._kernels):
                nothing = torch.tensor([0] * 4, device=source.device)
                # Compiled for the alignment that all pieces share: that of the ring's places and of planes in them.
                kernel = copy_kernel[(1, 1, 1)](
                    source.bases, nothing, nothing, self._places[1][1], 0, plane_words, **constants, num_warps=WARPS
                )
                for event in self._filled + self._emptied:
                    event.record(self._kernels)  # the driver has a handle only after the first record
                launcher = Launcher(
                    driver.functions,
                    [event.cuda_event for event in self._filled],
                    [event.cuda_event for event in self._emptied],
                    kernel=kernel.function,
                    threads=WARPS * triton.runtime.driver.active.get_current_target().warp_size,
                    shared_bytes=kernel.metadata.shared,
                    kernels=self._kernels.cuda_stream,
                    copies=self._copies.cuda_stream,
                    to_host=self._to_host,
                    bases=source.bases.data_ptr(),
                    ring=self._places[0][0].data_ptr(),
                    places=len(self._places),
                    place_bytes=self._places[0][0].numel(),
                    plane_bytes=self._plane_bytes,
                    word_bytes=source.shape.word_bytes,
                    chunk_tokens=source.chunk_tokens,
                    tile_tokens=constants["TOKENS"],
                    row_tiles=-(-constants["ROW_WORDS"] // constants["WORDS"]),
                    yield_bytes=_YIELD_BYTES,
                    registration_bytes=REGISTRATION_BYTES,
                )
                if launcher.copies_right(
                    source.shape, source.chunk_tokens, self._chunks_in_piece, planes, self._last_step
                ):
                    return launcher
            why: object = "the kernel did not copy random bytes correctly"
        except (AttributeError, RuntimeError) as error:
            why = error
        logger.warning("GPU copies are launched from Python, at several times the CPU time: %s", why)
        return None

    def _piece(self, base: int, tables: _DeviceTables, runs: Runs, first: int, plane: int, planes: int) -> None:
        """Launch planes [plane, plane + planes) of these runs through the next place of the ring, once it is empty.

        first: the position of `runs` among the copy's runs.
        """
        place = self._pieces_begun % len(self._places)
        self._pieces_begun += 1
        staged, words = self._places[place]
        filled, emptied = self._filled[place], self._emptied[place]
        self._unyielded_bytes += planes * self._plane_bytes * len(runs)
        if self._unyielded_bytes > _YIELD_BYTES:
            self._unyielded_bytes = 0
            (self._kernels if self._to_host else self._copies).wait_event(self._emptied[place - 1])
        if self._to_host:
            self._kernels.wait_event(emptied)
            self._launch(words, tables, runs, first, plane, planes)
            filled.record(self._kernels)
            self._copies.wait_event(filled)
            self._transfer(staged, base, runs, plane, planes)
            emptied.record(self._copies)
        else:
            self._copies.wait_event(emptied)
            self._transfer(staged, base, runs, plane, planes)
            filled.record(self._copies)
            self._kernels.wait_event(filled)
            self._launch(words, tables, runs, first, plane, planes)
            emptied.record(self._kernels)

    def _launch(
        self, words: torch.Tensor, tables: _DeviceTables, runs: Runs, first: int, plane: int, planes: int
    ) -> None:
        """Launch the kernel in the kernels' stream, which is the thread's current stream."""
        source, constants = self._source, self._constants
        table, meta = tables.uploaded()
        row_tiles = -(-constants["ROW_WORDS"] // constants["WORDS"])
        rows = source.chunk_tokens if self._to_host else int(runs[:, 2].max())
        tiles = -(-rows // constants["TOKENS"]) * row_tiles
        piece_words = planes * self._plane_bytes // source.shape.word_bytes
        copy_kernel[(tiles, planes, len(runs))](
            source.bases,
            table,
            meta[first : first + len(runs)],
            words,
            plane,
            piece_words,
            **constants,
            num_warps=WARPS,
        )

    def _transfer(self, staged: torch.Tensor, base: int, runs: Runs, plane: int, planes: int) -> None:
        """Move the piece's chunks between its place and the arena, by one DMA transfer for each run of adjacent chunks."""
        length = planes * self._plane_bytes
        starts = (runs[:, 0] + plane * self._plane_bytes).tolist()
        torch.cuda.set_stream(self._copies)
        at = 0
        while at < len(starts):
            end = at + 1
            while end < len(starts) and starts[end] == starts[end - 1] + length:
                end += 1
            for host in self._arena.pieces(base, starts[at], (end - at) * length):
                device, staged = staged[: len(host)], staged[len(host) :]
                if self._to_host:
                    host.copy_(device, non_blocking=True)
                else:
                    device.copy_(host, non_blocking=True)
            at = end
        torch.cuda.set_stream(self._kernels)
