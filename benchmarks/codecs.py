"""How small the codecs make KV in bfloat16, and how fast they are on one core beside memcpy, in turns in the same run.

    python -m benchmarks.codecs [--mib 64] [--rounds 15] [--kv FILE ...]

FILE: raw bfloat16 values as an engine has them, such as `tensor.view(torch.int16).numpy().tofile(FILE)` writes. Without one,
normally distributed values are used. What `int8` does to a model's answers is measured by `lmcache codec check`.
`x memcpy` is the median of the ratios of neighbours in time, so work beside the run hardly changes it. The rows with "a shard"
are what tiers do with one: with its digest, and decoding in place.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from benchmarks.rows import markdown
from benchmarks.run import machine
from lmcache.compiled import native
from lmcache.tiers import coding

Array = npt.NDArray[np.uint8]
_ROW = 128
"""Elements of a head."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mib", type=int, default=64, help="size of the memory that is encoded; beyond the caches by default"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kv", type=Path, nargs="*", default=[], help="files of bfloat16 values")
    given = parser.parse_args(argv)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(f"{machine()}, load {os.getloadavg()[0]:.2f}, one core, {given.mib} MiB, {given.rounds} rounds\n")
    sources = {path.name: np.fromfile(path, np.uint8) for path in given.kv} or {"normal": _normal(given.mib << 20)}
    for name, values in sources.items():
        raw = np.resize(values, given.mib << 20)
        print(f"{name}: {_report(raw, given.rounds)}\n")


def _normal(size: int) -> Array:
    numbers = np.random.default_rng(1).standard_normal(size // 2, dtype=np.float32)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def _report(raw: Array, rounds: int) -> str:
    """Measure all operations in turns, and return ratio and table."""
    size, target, stream, place = raw.nbytes, np.ones_like(raw), np.ones_like(raw), np.ones_like(raw)
    payload, into = memoryview(raw), memoryview(stream)
    stored = coding.encode(payload, into)
    if not stored:
        return "cannot be made smaller"
    told = coding.coding_of(payload)
    spot = memoryview(place)
    rounded = np.ones_like(raw)
    rounded_into = memoryview(rounded)
    rounded_bytes = coding.encode_rounded(payload, "bfloat16", _ROW, rounded_into)
    rounded_told = coding.coding_of_rounded(rounded_into[:rounded_bytes], size)
    other = np.ones_like(raw)

    def unpack(plain: int) -> None:
        assert native.unpack12(_address(stream), stored, _address(target), size, 0, plain)

    def decode() -> None:
        assert coding.decode(told, stored, spot)

    work: dict[str, Callable[[], object]] = {
        "memcpy": lambda: np.copyto(target, raw),
        "pack12": lambda: native.pack12(_address(raw), size, _address(stream), size, 0),
        "unpack12": lambda: unpack(0),
        "pack12, without AVX2": lambda: native.pack12(_address(raw), size, _address(stream), size, 1),
        "unpack12, without AVX2": lambda: unpack(1),
        "encode a shard": lambda: (coding.encode(payload, into), coding.coding_of(payload)),
        "decode a shard": decode,
        "int8": lambda: native.to_int8(_address(raw), size, _ROW, 0, _address(rounded), size, 0),
        "from int8": lambda: native.from_int8(_address(rounded), rounded_bytes, _address(target), size, 0),
        "int8, encode a shard": lambda: (
            coding.encode_rounded(payload, "bfloat16", _ROW, rounded_into),
            coding.coding_of_rounded(rounded_into[:rounded_bytes], size),
        ),
        "int8, decode a shard": lambda: coding.decode(rounded_told, rounded_bytes, memoryview(other)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):  # the first one only touches the memory
        place[:stored], other[:rounded_bytes] = stream[:stored], rounded[:rounded_bytes]
        for name, do in work.items():
            began = time.perf_counter()
            do()
            seconds[name].append(time.perf_counter() - began)
    assert (place == raw).all() and (target == other).all()
    rows: list[tuple[str, ...]] = [("", "GB/s of raw bytes, best", "x memcpy, median")]
    for name, taken in seconds.items():
        beside = [one / mine for one, mine in zip(seconds["memcpy"][1:], taken[1:], strict=True)]
        rows.append((name, f"{size / min(taken[1:]) / 1e9:.2f}", f"{median(beside):.2f}"))
    return f"ratio {size / stored:.3f}, of int8 {size / rounded_bytes:.3f}\n\n" + markdown(rows)


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


if __name__ == "__main__":
    main()
