"""Huge pages of 2 MiB for the arena: whether its file system gives them, and how many a mapping has got.

A process needs 512 times fewer entries of page tables for them. The driver of a GPU that the memory is registered with needs as
many as for small pages (seen on an H200).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

HUGE_BYTES = 2 << 20
_THP = Path("/sys/kernel/mm/transparent_hugepage")
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_HUGE_FIELDS = ("ShmemPmdMapped", "FilePmdMapped", "Shared_Hugetlb", "Private_Hugetlb")


class Mount(NamedTuple):
    """A mounted file system. point: the folder where it is mounted. kind: its type ("tmpfs", "ext4")."""

    point: Path
    kind: str
    options: tuple[str, ...]

    @property
    def is_hugetlbfs(self) -> bool:
        """Whether its memory comes from the pool of pages that the administrator has set aside, and its files cannot be written
        to except through a mapping."""
        return self.kind == "hugetlbfs"


def mount_of(directory: Path) -> Mount:
    """Return the file system of `directory`, from the longest matching mount point; of the kind "unknown" if none is listed."""
    resolved, best = directory.resolve(), Mount(Path("/"), "unknown", ())
    for line in _read(Path("/proc/self/mounts")).splitlines():
        _, mount, kind, options = line.split(" ")[:4]
        point = Path(mount.replace("\\040", " "))
        if resolved.is_relative_to(point) and len(point.parts) >= len(best.point.parts):
            best = Mount(point, kind, tuple(options.split(",")))
    return best


def why_none(directory: Path) -> str:
    """Return why files in `directory` cannot have huge pages, with the remedy; "" if they can."""
    mount = mount_of(directory)
    if mount.is_hugetlbfs:
        return ""
    if mount.kind != "tmpfs":
        return f"{directory} is on {mount.kind}: pass an --arena-dir on tmpfs or hugetlbfs"
    size = _read(_THP / "hpage_pmd_size").strip()
    if size != str(HUGE_BYTES):
        has = f"only such of {int(size) >> 20} MiB" if size else "none for tmpfs"
        return f"this kernel has {has}: pass an --arena-dir on a hugetlbfs with pages of 2 MiB"
    setting = _read(_THP / "shmem_enabled")
    if "[deny]" in setting:
        return f"this kernel denies them to tmpfs: `echo never > {_THP / 'shmem_enabled'}` lets each mount decide"
    if "[force]" in setting or {"huge=always", "huge=within_size", "huge=advise"}.intersection(mount.options):
        return ""
    remedy = f"`mount -o remount,huge=advise {mount.point}` as root lets it have huge ones"
    return f"{mount.point} is mounted without huge=advise: {remedy}"


def pool_pages() -> int:
    """Return how many huge pages are set aside (`vm.nr_hugepages`), used or not."""
    return int(_read(_POOL / "nr_hugepages") or 0)


def free_pool_bytes() -> int:
    """Return the bytes of huge pages that are set aside (`vm.nr_hugepages`) and neither used nor promised to any mapping."""
    free, promised = (int(_read(_POOL / name) or 0) for name in ("free_hugepages", "resv_hugepages"))
    return (free - promised) * HUGE_BYTES


def mapped_bytes(address: int, size_bytes: int) -> int:
    """Return how many of the mapped bytes [address, address + size_bytes) this process reaches through huge pages."""
    total, inside = 0, False
    for line in _read(Path("/proc/self/smaps")).splitlines():
        name, _, value = line.partition(":")
        if begin := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
            inside = address <= int(begin[1], 16) < address + size_bytes
        elif inside and name in _HUGE_FIELDS:
            total += int(value.split()[0]) << 10
    return total


def describe(directory: Path, policy: str, huge_bytes: int, touched_bytes: int) -> str:
    """Return one sentence about the pages of an arena in `directory`, of which `touched_bytes` are touched.

    policy: the value of --huge-pages. huge_bytes: bytes in huge pages.
    """
    small = f"{os.sysconf('SC_PAGESIZE') >> 10} KiB"
    if huge_bytes and touched_bytes - huge_bytes < HUGE_BYTES:  # an end of less than a huge page has small ones
        return "The arena uses huge pages of 2 MiB"
    if policy == "never":
        return f"The arena uses pages of {small}, as --huge-pages never asks"
    if why := why_none(directory):
        return f"The arena uses pages of {small}, since {why}"
    got = f"{huge_bytes / 2**30:.2f} of its {touched_bytes / 2**30:.2f} GiB"
    remedy = "`echo 1 > /proc/sys/vm/compact_memory` as root before the start makes more"
    return f"The arena has huge pages for {got}, since the kernel found no more contiguous memory: {remedy}"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
