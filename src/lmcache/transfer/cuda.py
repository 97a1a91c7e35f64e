"""Paged KV in GPU memory <-> slots in the arena: a Triton kernel gathers into a small device ring, the copy engine does the rest.

A copy is cut in *pieces*: a run of planes of one chunk, or several whole chunks where they are small. Each piece has its
place in the ring; the kernel of one piece runs while the DMA of the piece before is on the wire, so PCIe never waits. The two
directions have streams and rings of their own and so run at once. Host threads wait on blocking events and hold no GIL.

The kernels know blocks, tokens, heads and strides, and nothing of CUDA alone: ROCm's Triton runs the same code (untested).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl

from lmcache.compiled import load_native
from lmcache.errors import LayoutError
from lmcache.observability.log import init_logger
from lmcache.transfer.bounds import Blocks, Bounds, Runs
from lmcache.transfer.launch import MAX_PLACES, Launcher, Shape, Tables, beside_captures, find_driver, staging_bytes
from lmcache.transfer.paged import PagedKV, Plane
from lmcache.transfer.progress import Progress, planes_in_group

logger = init_logger(__name__)

STAGING_BYTES = staging_bytes()
"""Device memory of one copier, both directions together."""
_PIECES_IN_RING = 4
"""Measured on an H200: 8 pieces of half the size cost a quarter of the rate when both directions run, in launches."""
_SPIN_BYTES = 64 << 20
"""Below this a copy ends within a millisecond, and waking up from a blocking wait would be a tenth of it."""
_GROUP_BYTES = 4 << 20
"""Where layers are waited for one by one, a copy of the copy engine is of so many of a chunk's bytes: smaller ones cost rate."""
_YIELD_BYTES = 90 << 20
"""After so much a copy of ours waits for the kernel of the piece before it, 19 microseconds. The copy engine goes on with one
queue for as long as that need not wait, and the engine's own small copies (token ids in, tokens out) are in another: on an H100
a step of 1.5 ms beside a load of 45 ms took 46 ms without this, and takes 2.0 with it, for 1 % of the rate."""
_COPIES_LAUNCHED = 2
"""Of one direction: while a copy runs, the next one is launched behind it."""
_REGISTER_BYTES = 1 << 30
_TILE_WORDS = 2048
_WARPS = 8


@triton.jit(do_not_specialize=["blocks", "meta", "first_plane"])  # type: ignore[untyped-decorator]
def _copy_kernel(  # type: ignore[no-untyped-def]
    bases,
    blocks,
    meta,
    staging,
    first_plane,
    piece_words,
    CHUNK_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    HEAD_WORDS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    TO_STAGING: tl.constexpr,
    WORD: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Program (tile, plane, chunk): TOKENS rows of one plane of one chunk. Strides are in words of `WORD` type.

    meta holds (first_token, token_count, token_in_slot) for each chunk; a row is one token's heads x dims of a plane. To staging
    go all rows of the chunk, zeros for tokens that are not the run's: the whole piece goes to the slot, and what was in the ring
    before may be another prompt's. What a model fixes is constant: fewer arguments make a launch cheaper, and launches are what
    this code spends its time on.
    """
    row_tiles: tl.constexpr = (ROW_WORDS + WORDS - 1) // WORDS
    tile = tl.program_id(0) // row_tiles
    word = (tl.program_id(0) % row_tiles) * WORDS + tl.arange(0, WORDS)
    plane = tl.program_id(1)
    chunk = tl.program_id(2)
    first = tl.load(meta + chunk * 3)
    count = tl.load(meta + chunk * 3 + 1)
    in_slot = tl.load(meta + chunk * 3 + 2)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    if TO_STAGING:
        token = token - in_slot
    live = (token >= 0) & (token < count)
    position = first + token
    block = tl.load(blocks + position // BLOCK_TOKENS, mask=live, other=0)
    row = block * BLOCK_STRIDE + (position % BLOCK_TOKENS) * TOKEN_STRIDE
    column = (word // HEAD_WORDS).to(tl.int64) * HEAD_STRIDE + word % HEAD_WORDS
    paged = tl.load(bases + first_plane + plane).to(tl.pointer_type(WORD)) + row[:, None] + column[None, :]
    slot_row = (plane * CHUNK_TOKENS + in_slot + token) * ROW_WORDS
    staged = staging + chunk.to(tl.int64) * piece_words + slot_row[:, None] + word[None, :]
    in_row = (word < ROW_WORDS)[None, :]
    mask = live[:, None] & in_row
    if TO_STAGING:
        tl.store(staged, tl.load(paged, mask=mask, other=0), mask=(in_slot + token < CHUNK_TOKENS)[:, None] & in_row)
    else:
        tl.store(paged, tl.load(staged, mask=mask), mask=mask)


_WORDS: dict[int, tuple[torch.dtype, Any]] = {
    8: (torch.int64, tl.int64),
    4: (torch.int32, tl.int32),
    2: (torch.int16, tl.int16),
    1: (torch.int8, tl.int8),
}


class CudaCopier:
    """As `CpuCopier`, for paged KV on a GPU. Safe to call from one loading and one storing thread at once.

    Raises:
        LayoutError: planes of different strides, tiled interiors, or no room for the staging ring.
    """

    bytes_per_second = 50e9
    zeroes_the_rest = True

    def __init__(self, paged: PagedKV, chunk_tokens: int) -> None:
        self._paged, self._chunk_tokens = paged, chunk_tokens
        self._slot_bytes = paged.slot_bytes(chunk_tokens)
        self._bounds = Bounds(paged, chunk_tokens)
        self._device = torch.device(paged.device)
        self._shape = _shape_of(paged)
        self._registered_bytes = 0
        self._stop = threading.Event()
        self._register_thread: threading.Thread | None = None
        self._address = 0
        self._arena: torch.Tensor | None = None
        with self._using_device():
            self._bases = torch.tensor(
                [plane.address for plane in paged.planes], dtype=torch.int64, device=self._device
            )
            self._lanes = {to_host: _Lane(self, STAGING_BYTES // 2, to_host) for to_host in (True, False)}
        logger.info("GPU staging: %d MiB on %s", STAGING_BYTES >> 20, self._device)

    def gather(self, base: int, blocks: Blocks, runs: Runs, *, arena_bytes: int | None = None) -> None:
        """Paged tokens, which the engine must have computed, -> slots, which hold nothing else afterwards."""
        checked = self._bounds.checked(base, blocks, runs, arena_bytes)
        self._lanes[True].run(base, *checked)

    def scatter(
        self,
        base: int,
        blocks: Blocks,
        runs: Runs,
        *,
        arena_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Slots -> paged tokens, in blocks that nothing in flight touches. progress: gets a point in the stream of kernels for
        each group of planes, and then they come in order."""
        checked = self._bounds.checked(base, blocks, runs, arena_bytes)
        self._lanes[False].run(base, *checked, progress)

    def adopt(self, address: int, size_bytes: int) -> None:
        """Register the mapping with the driver, 1 GiB at a time; what is not registered yet is copied by the driver's own,
        slower staging."""
        self._address = address
        self._arena = _host_bytes(address, size_bytes)
        self._register_thread = threading.Thread(
            target=self._register, args=(address, size_bytes), name="lmcache-register", daemon=True
        )
        self._register_thread.start()

    def wait_adopted(self) -> None:
        """Until registering has ended."""
        if self._register_thread is not None:
            self._register_thread.join()

    def close(self) -> None:
        self._stop.set()
        self.wait_adopted()
        with self._using_device():
            for offset in range(0, self._registered_bytes, _REGISTER_BYTES):
                torch.cuda.cudart().cudaHostUnregister(self._address + offset)
            self._lanes.clear()
        self._registered_bytes = 0
        self._arena = None

    @contextmanager
    def _using_device(self) -> Iterator[None]:
        """For this thread, which may be any: the engine may be capturing CUDA graphs in another one."""
        with beside_captures(self._device.type), torch.cuda.device(self._device):
            yield

    def _register(self, address: int, size_bytes: int) -> None:
        with self._using_device():
            for offset in range(0, size_bytes, _REGISTER_BYTES):
                if self._stop.is_set():
                    return
                length = min(_REGISTER_BYTES, size_bytes - offset)
                error = int(torch.cuda.cudart().cudaHostRegister(address + offset, length, 1))  # 1: portable
                if error:
                    logger.warning(
                        "cudaHostRegister failed at %d MiB (error %d): copies are slower beyond", offset >> 20, error
                    )
                    return
                self._registered_bytes = offset + length
        logger.info("Registered %d MiB of the arena with the GPU driver", size_bytes >> 20)


class _Tables:
    """The block table of a copy, and (first token, count, token in slot) of each run, on their way to the device."""

    def __init__(self, words: int, device: torch.device) -> None:
        self.used = torch.cuda.Event()
        """Behind the last kernel that reads them."""
        self._make(words, device)

    def _make(self, words: int, device: torch.device) -> None:
        self._host = torch.empty(words, dtype=torch.int64, pin_memory=True)
        self._words = self._host.numpy()
        self._device = torch.empty_like(self._host, device=device)
        self._addresses = self._host.data_ptr(), self._device.data_ptr()

    def fill(self, blocks: Blocks, runs: Runs) -> None:
        """With those of the next copy, once the device is done with the last one's."""
        self.used.synchronize()
        self._blocks, words = len(blocks), len(blocks) + 3 * len(runs)
        if words > len(self._words):
            self._make(2 * words, self._device.device)
        self._words[: self._blocks] = blocks
        self._words[self._blocks : words].reshape(-1, 3)[:] = runs[:, 1:]
        self._filled = self._unsent = words

    def addresses(self) -> Tables:
        """For whoever sends them before the first kernel, which this is to be called for."""
        words, self._unsent = self._unsent, 0
        host, device = self._addresses
        return Tables(host, device, device + 8 * self._blocks, 8 * words)

    def sent(self) -> tuple[torch.Tensor, torch.Tensor]:
        """On the device, for kernels of the current stream. They go at the first call: a load's first copy is on its way then."""
        if self._unsent:
            words, self._unsent = self._unsent, 0
            self._device[:words].copy_(self._host[:words], non_blocking=True)
        return self._device[: self._blocks], self._device[self._blocks : self._filled].view(-1, 3)


class _Lane:
    """One direction: its ring, its two streams, one copy launched at a time."""

    def __init__(self, copier: CudaCopier, ring_bytes: int, to_host: bool) -> None:
        self._copier, self._to_host = copier, to_host
        slot, planes = copier._slot_bytes, len(copier._paged.planes)
        self._plane_bytes = slot // planes
        target = ring_bytes // _PIECES_IN_RING
        in_piece = max(1, min(planes, target // self._plane_bytes))
        self._planes_in_piece = -(-planes // -(-planes // in_piece))  # even pieces: the last one is not a crumb
        self._chunks_in_piece = max(1, target // slot) if in_piece == planes else 1
        piece_bytes = self._planes_in_piece * self._plane_bytes * self._chunks_in_piece
        self._planes_in_group = planes_in_group(self._plane_bytes, _GROUP_BYTES, self._planes_in_piece)
        self._chunks_of_group = piece_bytes // (self._planes_in_group * self._plane_bytes)
        count, device = max(2, ring_bytes // piece_bytes), copier._device
        try:
            ring = torch.empty((count, piece_bytes), dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise LayoutError(
                f"no {ring_bytes >> 20} MiB of GPU memory for staging: lower LMCACHE_GPU_STAGING_MB"
            ) from error
        self._ring = [(piece, piece.view(_WORDS[copier._shape.word_bytes][0])) for piece in ring]
        self._kernels, self._copies = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._filled = [torch.cuda.Event() for _ in range(count)]
        self._emptied = [torch.cuda.Event() for _ in range(count)]
        self._tables = [_Tables(1 << 12, device) for _ in range(_COPIES_LAUNCHED)]
        self._copies_begun = self._pieces_begun = self._unyielded_bytes = 0
        self._constants = _constants(copier, to_host)
        self._lock = threading.Lock()
        self._launcher = self._make_launcher()

    def run(self, base: int, blocks: Blocks, runs: Runs, progress: Progress | None = None) -> None:
        """The whole copy, ended. Another thread may launch the next one meanwhile, and the device goes on without a pause."""
        if not len(runs):
            return
        with self._copier._using_device():
            self._launch_all(base, blocks, runs, progress).synchronize()

    def _launch_all(self, base: int, blocks: Blocks, runs: Runs, progress: Progress | None) -> torch.cuda.Event:
        """The event behind the last piece."""
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
                last = torch.cuda.Event(blocking=len(runs) * self._copier._slot_bytes > _SPIN_BYTES)
                last.record(self._copies if self._to_host else self._kernels)
                return last
            except Exception:  # whoever is told of the failure may use the blocks and the slots for something else
                self._copies.synchronize()
                self._kernels.synchronize()
                raise
            finally:
                torch.cuda.set_stream(before)

    def _by_chunks(self, base: int, tables: _Tables, runs: Runs) -> None:
        planes = range(0, len(self._copier._paged.planes), self._planes_in_piece)
        self._pieces(base, tables, runs, planes, self._chunks_in_piece)

    def _by_planes(self, base: int, tables: _Tables, runs: Runs, progress: Progress) -> None:
        step, planes = self._planes_in_group, len(self._copier._paged.planes)
        for plane in range(0, planes, step):
            end = min(plane + step, planes)
            self._pieces(base, tables, runs, range(plane, end, step), self._chunks_of_group)
            point = torch.cuda.Event()
            point.record(self._kernels)
            progress.arrived(end, point)

    def _pieces(self, base: int, tables: _Tables, runs: Runs, planes: range, chunks: int) -> None:
        """All of these planes, `planes.step` of `chunks` chunks a piece."""
        if self._launcher is not None:
            slabs_from = self._copier._address if base == self._copier._address else 0
            self._launcher.launch(base, slabs_from, tables.addresses(), runs, planes, chunks)
            return
        for at in range(0, len(runs), chunks):
            for plane in planes:
                self._piece(base, tables, runs[at : at + chunks], at, plane, min(planes.step, planes.stop - plane))

    def _make_launcher(self) -> Launcher | None:
        """What launches pieces from C; None where they have to be launched from Python."""
        copier, constants, plane_words = (
            self._copier,
            self._constants,
            self._plane_bytes // self._copier._shape.word_bytes,
        )
        driver = find_driver(torch.version.hip is not None)
        if load_native() is None or driver is None or len(self._ring) > MAX_PLACES or plane_words == 1:
            return None
        planes = range(0, len(copier._paged.planes), self._planes_in_piece)
        try:
            with torch.cuda.stream(self._kernels):
                nothing = torch.tensor([0] * 4, device=copier._device)
                # Compiled for what holds of every piece: the alignment of the ring's places, and of planes in them.
                kernel = _copy_kernel[(1, 1, 1)](
                    copier._bases, nothing, nothing, self._ring[1][1], 0, plane_words, **constants, num_warps=_WARPS
                )
                for event in self._filled + self._emptied:
                    event.record(self._kernels)  # the driver has an event from its first use on
                launcher = Launcher(
                    driver.functions,
                    [event.cuda_event for event in self._filled],
                    [event.cuda_event for event in self._emptied],
                    kernel=kernel.function,
                    threads=_WARPS * triton.runtime.driver.active.get_current_target().warp_size,
                    shared_bytes=kernel.metadata.shared,
                    kernels=self._kernels.cuda_stream,
                    copies=self._copies.cuda_stream,
                    to_host=self._to_host,
                    bases=copier._bases.data_ptr(),
                    ring=self._ring[0][0].data_ptr(),
                    places=len(self._ring),
                    place_bytes=self._ring[0][0].numel(),
                    plane_bytes=self._plane_bytes,
                    word_bytes=copier._shape.word_bytes,
                    chunk_tokens=copier._chunk_tokens,
                    tile_tokens=constants["TOKENS"],
                    row_tiles=-(-constants["ROW_WORDS"] // constants["WORDS"]),
                    yield_bytes=_YIELD_BYTES,
                    slab_bytes=_REGISTER_BYTES,
                )
                last = self._copies if self._to_host else self._kernels
                if launcher.copies_right(copier._shape, copier._chunk_tokens, self._chunks_in_piece, planes, last):
                    return launcher
            why: object = "the kernel was not seen to copy right"
        except (AttributeError, RuntimeError) as error:
            why = error
        logger.warning("GPU copies are launched from Python, at several times the CPU time: %s", why)
        return None

    def _piece(self, base: int, tables: _Tables, runs: Runs, first: int, plane: int, planes: int) -> None:
        """Planes [plane, plane + planes) of these runs, which are the copy's from `first` on, through the next place of the
        ring, once that is empty."""
        place = self._pieces_begun % len(self._ring)
        self._pieces_begun += 1
        ring, words = self._ring[place]
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
            self._dma(ring, base, runs, plane, planes)
            emptied.record(self._copies)
        else:
            self._copies.wait_event(emptied)
            self._dma(ring, base, runs, plane, planes)
            filled.record(self._copies)
            self._kernels.wait_event(filled)
            self._launch(words, tables, runs, first, plane, planes)
            emptied.record(self._kernels)

    def _launch(self, words: torch.Tensor, tables: _Tables, runs: Runs, first: int, plane: int, planes: int) -> None:
        """In the stream of kernels, which is the thread's current one."""
        copier, constants = self._copier, self._constants
        table, meta = tables.sent()
        row_tiles = -(-constants["ROW_WORDS"] // constants["WORDS"])
        rows = copier._chunk_tokens if self._to_host else int(runs[:, 2].max())
        tiles = -(-rows // constants["TOKENS"]) * row_tiles
        piece_words = planes * self._plane_bytes // copier._shape.word_bytes
        _copy_kernel[(tiles, planes, len(runs))](
            copier._bases,
            table,
            meta[first : first + len(runs)],
            words,
            plane,
            piece_words,
            **constants,
            num_warps=_WARPS,
        )

    def _dma(self, ring: torch.Tensor, base: int, runs: Runs, plane: int, planes: int) -> None:
        """The piece's chunks, one copy each; neighbours in the arena go together."""
        length = planes * self._plane_bytes
        starts = (runs[:, 0] + plane * self._plane_bytes).tolist()
        torch.cuda.set_stream(self._copies)
        at = 0
        while at < len(starts):
            end = at + 1
            while end < len(starts) and starts[end] == starts[end - 1] + length:
                end += 1
            self._copy(ring[at * length : end * length], base, starts[at])
            at = end
        torch.cuda.set_stream(self._kernels)

    def _copy(self, staged: torch.Tensor, base: int, offset: int) -> None:
        """One DMA; two where registrations meet, since the driver takes no copy across them."""
        copier, length, done = self._copier, staged.numel(), 0
        arena = copier._arena if base == copier._address else None
        while done < length:
            start = offset + done
            size = min(_REGISTER_BYTES - start % _REGISTER_BYTES, length - done) if arena is not None else length
            host = _host_bytes(base + start, size) if arena is None else arena[start : start + size]
            device = staged if size == length else staged[done : done + size]
            if self._to_host:
                host.copy_(device, non_blocking=True)
            else:
                device.copy_(host, non_blocking=True)
            done += size


def _constants(copier: CudaCopier, to_host: bool) -> dict[str, Any]:
    """What the kernel is compiled for."""
    shape = copier._shape
    words = min(triton.next_power_of_2(shape.row_words), 1024)
    return {
        "CHUNK_TOKENS": copier._chunk_tokens,
        "BLOCK_TOKENS": copier._paged.block_tokens,
        "BLOCK_STRIDE": shape.block_stride,
        "TOKEN_STRIDE": shape.token_stride,
        "HEAD_STRIDE": shape.head_stride,
        "HEAD_WORDS": shape.head_words,
        "ROW_WORDS": shape.row_words,
        "TO_STAGING": to_host,
        "WORD": _WORDS[shape.word_bytes][1],
        "TOKENS": max(1, _TILE_WORDS // words),
        "WORDS": words,
    }


def _host_bytes(address: int, length: int) -> torch.Tensor:
    """Host memory as a tensor; whoever maps it keeps it alive."""
    return torch.frombuffer((ctypes.c_uint8 * length).from_address(address), dtype=torch.uint8)


def _shape_of(paged: PagedKV) -> Shape:
    """The strides that all planes share, in the widest words that fit them.

    Raises:
        LayoutError: planes that differ, or interiors tiled for a CPU's matrix units.
    """
    planes = [_plain(plane, paged.item_bytes) for plane in paged.planes]
    if any(plane[1:] != planes[0][1:] for plane in planes):
        raise LayoutError("the layers' KV tensors have different strides; this copier needs them alike")
    _, block, token, heads, head, head_bytes = planes[0]
    if head == head_bytes or heads == 1:  # heads side by side: one long row
        head, head_bytes, heads = heads * head_bytes, heads * head_bytes, 1
    for word in (8, 4, 2, 1):
        if all(value % word == 0 for value in (block, token, head, head_bytes, *(plane[0] for plane in planes))):
            break
    return Shape(word, block // word, token // word, head // word, head_bytes // word, heads * head_bytes // word)


def _plain(plane: Plane, item: int) -> tuple[int, int, int, int, int, int]:
    """(address, block, token and head stride, heads, bytes of a head), or LayoutError."""
    tokens_plain = plane.token_group == 1 or plane.group_stride == plane.token_group * plane.token_stride
    dims_plain = plane.dims == 1 or (
        (plane.dim_stride == item or plane.dim_group == 1)
        and (plane.dim_group in (1, plane.dims) or plane.dim_group_stride == plane.dim_group * item)
        and (plane.dim_group != 1 or plane.dim_group_stride == item)
    )
    if not tokens_plain or not dims_plain:
        raise LayoutError("a GPU KV tensor whose tokens or dims are tiled cannot be described")
    token = plane.group_stride if plane.token_group == 1 else plane.token_stride
    return plane.address, plane.block_stride, token, plane.heads, plane.head_stride, plane.dims * item
