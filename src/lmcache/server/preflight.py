"""Preflight checks compare the configuration with the machine before the server creates anything.

They bind and release ports, and read sizes and the state of folders. They change one thing: the arenas that dead servers of this
user have left in `--arena-dir` are removed, since their memory may be needed.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
import stat
from pathlib import Path

from lmcache.config.options import GIB
from lmcache.config.server import ServerConfig
from lmcache.errors import ConfigError
from lmcache.memory.arena import reclaim_stale
from lmcache.memory.huge_pages import HUGE_BYTES, free_pool_bytes, mount_of, pool_pages, why_none
from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime

logger = init_logger(__name__)

OWN_BYTES = 256 << 20
"""Memory that L1 must leave for the server's process, which takes about half of it."""
LEAST_AUTO_GB = 0.1
"""`--l1-size-gb auto` refuses less, because a container's usual /dev/shm of 64 MiB would hold next to nothing, without a word."""
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "hugetlbfs", "devtmpfs")
_FREED_WITHIN_SECONDS = 3.0
"""How long to wait for the memory of a dead server's arena. It becomes free when all engines have unmapped the arena."""


def check_machine(
    config: ServerConfig, *, port: bool = True, http: bool = True, runtime: Runtime = RUNTIME
) -> ServerConfig:
    """Check the configuration against the machine. Return it, with a quarter of the available memory for `--l1-size-gb auto`.

    port, http: whether the server will open the port for engines and the HTTP port.

    Raises:
        ConfigError: a port is taken, a folder cannot be used, or there is too little memory. The text says what to pass.
    """
    if port:
        check_port("--host", config.host, "--port", config.port)
    if http:
        check_port("--http-host", config.http_host, "--http-port", config.http_port)
        if config.prometheus_port:
            check_port("--http-host", config.http_host, "--prometheus-port", config.prometheus_port)
    _check_arena_dir(config.arena_dir)
    _check_huge_pages(config.arena_dir, config.huge_pages)
    _check_socket_dir(config.socket_dir)
    if config.allow_uid or config.allow_gid:
        _check_way(config.socket_dir)
    return _check_l1(config, runtime)


def check_port(host_flag: str, host: str, port_flag: str, port: int) -> None:
    """Raise ConfigError if nobody can listen there. The flags name host and port in its text."""
    error = _bind_error(host, port)
    if error is None:
        return
    if error.errno == errno.EADDRINUSE:
        free = next((n for n in range(port + 1, min(port + 100, 65536)) if _bind_error(host, n) is None), None)
        advice = f"pass another, such as {port_flag} {free}" if free else f"pass another {port_flag}"
        raise ConfigError(f"{port_flag} {port}: taken by another process on {host}: stop that process, or {advice}")
    if error.errno == errno.EADDRNOTAVAIL:
        raise ConfigError(f"{host_flag} {host}: not an address of this machine: pass 127.0.0.1, or 0.0.0.0 for all")
    if error.errno == errno.EACCES:
        raise ConfigError(f"{port_flag} {port}: ports below 1024 need root: pass one from 1024 to 65535")
    raise ConfigError(f"{port_flag} {port}: cannot listen on {host}: {error.strerror}: pass another")


def _bind_error(host: str, port: int) -> OSError | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as for the server: ignore TIME_WAIT
            probe.bind((host, port))
    except OSError as error:
        return error
    return None


def _check_arena_dir(directory: Path) -> None:
    if not directory.is_dir():
        raise ConfigError(f"--arena-dir {directory}: is not a directory: pass one, such as /dev/shm")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"--arena-dir {directory}: is not writable for uid {os.getuid()}: pass one that is")
    kind = mount_of(directory).kind
    if kind not in _MEMORY_FILE_SYSTEMS:
        logger.warning("--arena-dir %s is on %s, not in memory: the kernel writes L1 to disk", directory, kind)


def _check_huge_pages(directory: Path, policy: str) -> None:
    if mount_of(directory).is_hugetlbfs:
        if policy == "never":
            raise ConfigError(f"--huge-pages never: {directory} is a hugetlbfs: pass an --arena-dir on tmpfs")
        size = os.statvfs(directory).f_bsize
        if size != HUGE_BYTES:
            raise ConfigError(
                f"--arena-dir {directory}: is a hugetlbfs with pages of {size >> 20} MiB: mount one with pagesize=2M"
            )
    why = why_none(directory) if policy == "always" else ""
    if why:
        raise ConfigError(f"--huge-pages always: {why}; or pass --huge-pages auto")


def _check_socket_dir(directory: Path) -> None:
    try:
        status = directory.lstat()
    except FileNotFoundError:
        existing = next(parent for parent in directory.parents if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError(f"--socket-dir {directory}: cannot be created in {existing}: pass another") from None
        return
    except OSError as error:
        raise ConfigError(f"--socket-dir {directory}: {error.strerror}: pass another") from error
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"--socket-dir {directory}: is not a directory: remove it, or pass another")
    if status.st_uid != os.getuid():
        raise ConfigError(f"--socket-dir {directory}: belongs to uid {status.st_uid}, not to you: pass another")
    if status.st_mode & 0o022:
        raise ConfigError(f"--socket-dir {directory}: others may write to it: chmod 700 {directory}")


def _check_way(directory: Path) -> None:
    """Check that other users can reach the folder: the server opens the folder itself, and nothing above it."""
    for parent in directory.absolute().parents:
        if parent.exists() and not parent.stat().st_mode & stat.S_IXOTH:
            raise ConfigError(
                f"--socket-dir {directory}: other users, whom --allow-uid and --allow-gid let in, have no way through {parent}: "
                "pass a folder such as /run/lmcache, which belongs to the server's user"
            )


def _check_l1(config: ServerConfig, runtime: Runtime) -> ServerConfig:
    deadline = runtime.now() + (_FREED_WITHIN_SECONDS if reclaim_stale(config.arena_dir, runtime) else 0)
    kind = mount_of(config.arena_dir).kind
    while True:
        free, memory = free_bytes(config.arena_dir), memory_available_bytes()
        takes_memory = kind in _MEMORY_FILE_SYSTEMS and kind != "hugetlbfs"  # whose memory is set aside already
        available = min(free, memory - OWN_BYTES) if takes_memory else free
        if not config.l1_size_gb:
            return _decide_l1(config, available)
        if config.l1_bytes <= available:
            return config
        if runtime.now() >= deadline:
            break
        runtime.sleep(0.1)
    has = f"{config.arena_dir} has {_in_gib(free)} GiB free, and {_in_gib(memory)} GiB of memory are available"
    smaller = _as_l1_size(available)
    remedies = [f"pass --l1-size-gb {smaller} or less"] if smaller != "0" else []
    if kind == "hugetlbfs":
        pages = pool_pages() - (available - config.l1_bytes) // HUGE_BYTES
        remedies.append(f"set more huge pages aside: `sysctl vm.nr_hugepages={pages}` as root")
    elif free < memory - OWN_BYTES:
        remedies.append(f"enlarge {config.arena_dir} (containers: --shm-size)")
    raise ConfigError(f"--l1-size-gb {config.l1_size_gb!s}: {has}: {', or '.join(remedies) or 'free some memory'}")


def _decide_l1(config: ServerConfig, available: int) -> ServerConfig:
    size_gb = available // 4 * 1000 // GIB / 1000
    if size_gb < LEAST_AUTO_GB:
        raise ConfigError(
            f"--l1-size-gb auto: only {available >> 20} MiB are available in {config.arena_dir}, and a quarter of that is too "
            f"little to be of use: enlarge {config.arena_dir} (docker, podman: --shm-size 16g; Kubernetes: an emptyDir of medium "
            "Memory at /dev/shm), pass --arena-dir with a larger memory file system, or a small --l1-size-gb on purpose"
        )
    return dataclasses.replace(config, l1_size_gb=size_gb)


def _in_gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f}" if size_bytes >= 2 * GIB else _as_l1_size(size_bytes)


def _as_l1_size(size_bytes: int) -> str:
    """Return a number of bytes as a value for --l1-size-gb, rounded down: to GiB, or below 2 GiB to thousandths of a GiB."""
    return str(size_bytes // GIB) if size_bytes >= 2 * GIB else f"{max(size_bytes, 0) * 1000 // GIB / 1000:g}"


def free_bytes(directory: Path) -> int:
    """Return the bytes that this user can still write to the file system of `directory`. Raises OSError."""
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    if mount_of(directory).is_hugetlbfs:  # it tells no numbers where it is mounted without a limit
        return min(free, free_pool_bytes()) if found.f_blocks else free_pool_bytes()
    return free


def memory_available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of memory available without swapping: the machine's, or less if a control group (cgroup) leaves less."""
    lines = (proc / "meminfo").read_text().splitlines()
    machine = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return min([machine, *_left_in_groups(proc, cgroups)])


def _left_in_groups(proc: Path, cgroups: Path) -> list[int]:
    """Return the bytes that each control group of this process leaves, from its own up to the root (cgroup v2 and v1)."""
    left: list[int] = []
    for line in _read(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used = cgroups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, used = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        here = base / path.lstrip("/")
        for group in [here, *here.parents]:
            if group.is_relative_to(base):
                left += _left_in_group(group, limit, used)
    return left


def _left_in_group(group: Path, limit: str, used: str) -> list[int]:
    most, now = _read(group / limit).strip(), _read(group / used).strip()
    if not most.isdigit() or not now.isdigit():
        return []  # no limit ("max"), or no such file
    stats = dict(line.split(" ", 1) for line in _read(group / "memory.stat").splitlines() if " " in line)
    return [int(most) - int(now) + int(stats.get("inactive_file", "0"))]  # the kernel can reclaim the page cache


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
