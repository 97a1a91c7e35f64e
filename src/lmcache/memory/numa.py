"""NUMA placement of the arena: sets the kernel's memory policy for the shared mapping, which holds for all that map it."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
from pathlib import Path

from lmcache.errors import ConfigError

_MBIND = {"x86_64": 237, "aarch64": 235}
"""System call numbers of mbind, from asm/unistd_64.h and asm-generic/unistd.h."""
_MPOL_BIND, _MPOL_INTERLEAVE = 2, 3  # uapi/linux/mempolicy.h
_MAX_NODES = 1024
_NODES = Path("/sys/devices/system/node")
_libc = ctypes.CDLL(None, use_errno=True)


def nodes_of(text: str) -> list[int]:
    """Parse a list of node numbers such as `0,2-3`. Raises ValueError for any other text."""
    nodes: set[int] = set()
    for part in text.strip().split(","):
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if not found or int(found[1]) > int(found[2] or found[1]) or int(found[2] or found[1]) >= _MAX_NODES:
            raise ValueError("must be auto, spread, or nodes such as 0 or 0,2-3")
        nodes.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return sorted(nodes)


def online_nodes(folder: Path = _NODES) -> list[int]:
    """Return the numbers of the nodes that have memory; [0] where the kernel does not list them."""
    for name in ("has_memory", "online"):
        try:
            return nodes_of((folder / name).read_text())
        except (OSError, ValueError):
            continue
    return [0]


def place(address: int, size_bytes: int, policy: str, nodes_there: list[int] | None = None) -> list[int]:
    """Tell the kernel on which nodes to place the pages of this shared mapping, before any of them is touched.

    policy: `auto` (interleaved over all nodes where there are several, else the kernel's default), `spread` (interleaved over
    all nodes), or a list of nodes to bind the pages to. Returns the node numbers; empty where the kernel's default stays.

    Raises:
        ConfigError: there is no such node, or the kernel refuses the policy.
    """
    there = online_nodes() if nodes_there is None else nodes_there
    if policy == "auto" and len(there) < 2:
        return []
    nodes = there if policy in ("auto", "spread") else nodes_of(policy)
    missing = sorted(set(nodes) - set(there))
    if missing:
        raise ConfigError(
            f"--numa {policy}: there is no node {missing[0]} with memory; there are {', '.join(map(str, there))}"
        )
    mask = (ctypes.c_ulong * (_MAX_NODES // 64))()
    for node in nodes:
        mask[node // 64] |= 1 << (node % 64)
    mode = _MPOL_INTERLEAVE if policy in ("auto", "spread") else _MPOL_BIND
    number = _MBIND.get(platform.machine())
    if number is None:
        raise ConfigError(f"--numa {policy}: not supported on {platform.machine()}; leave it at auto")
    failed = _libc.syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_ulong(size_bytes),
        ctypes.c_int(mode),
        mask,
        ctypes.c_ulong(_MAX_NODES + 1),  # the kernel reads one bit less
        ctypes.c_uint(0),
    )
    if failed and policy != "auto":
        code = ctypes.get_errno()
        why = "this kernel has no memory policies" if code == errno.ENOSYS else os.strerror(code)
        raise ConfigError(f"--numa {policy}: {why}; leave it at auto")
    return [] if failed else nodes
