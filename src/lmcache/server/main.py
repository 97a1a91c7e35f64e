"""`lmcache server`: starts the daemon, says that it serves when it does, and ends it without leaving anything behind."""

from __future__ import annotations

import dataclasses
import resource
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from lmcache.cache import Heart
from lmcache.config.server import ServerConfig
from lmcache.memory.arena import Arena, reclaim_stale
from lmcache.observability.log import init_logger, set_level
from lmcache.server.loop import Loop
from lmcache.server.report import Report
from lmcache.server.service import Service
from lmcache.server.unix_face import UnixFace
from lmcache.wire.sockets import listen_unix

logger = init_logger(__name__)


class _Closes(Protocol):
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Owner:
    """The engine that a server is started by and for: it serves at the engine's socket only, its memory file has no name, and
    it ends with the engine.

    listener: listens at `path`. lifeline: a descriptor that becomes readable when the engine ends. http: whether the HTTP port
    was asked for.
    """

    listener: socket.socket
    path: Path
    lifeline: int
    http: bool


def serve(config: ServerConfig, owner: Owner | None = None) -> int:
    """Run until SIGINT or SIGTERM, or until the owner ends; return the exit code.

    Raises:
        ConfigError: something cannot be had (a port, memory, a folder); nothing is left behind.
    """
    set_level(config.log_level)
    _allow_many_descriptors()
    reclaim_stale(config.arena_dir)
    started: list[Callable[[], None]] = []
    try:
        loop = _start(config, owner, started)
        logger.info("LMCache cache server is running...")
        loop.run()
    finally:
        for stop in reversed(started):
            stop()
    logger.info("LMCache cache server has stopped")
    return 0


def _allow_many_descriptors() -> None:
    """Two for each engine process: the usual soft limit of 1024 is fewer than `unix_face` serves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _start(config: ServerConfig, owner: Owner | None, started: list[Callable[[], None]]) -> Loop:
    """Bring up every part; `started` collects what ends them, in order."""
    loop = Loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.stop())
    started.append(loop.close)
    if owner is not None:
        loop.watch(owner.lifeline, loop.stop)
    arena = Arena(Path(config.arena_dir), config.l1_bytes)
    started.append(arena.close)
    if owner is not None:
        arena.unlink()
    workers = ThreadPoolExecutor(config.max_workers, thread_name_prefix="lmcache-io")
    started.append(lambda: workers.shutdown(wait=True, cancel_futures=True))
    heart = Heart(arena.size_bytes, config.lease_seconds)
    service = Service(loop, heart, arena, config.chunk_size, workers)
    path = owner.path if owner is not None else config.socket_dir / f"{service.server_id.hex()[:16]}.sock"
    started.append(UnixFace(loop, service, owner.listener if owner is not None else listen_unix(path), path).close)
    if owner is None:
        config = dataclasses.replace(config, port=_open_port(config, loop, service, started))
    if owner is None or owner.http:
        config = dataclasses.replace(config, http_port=_open_http(config, Report(config, loop, service), started))
    arena.start_prefault()
    logger.info(
        "L1: %.2f GiB in %s, %s eviction, %d-token chunks",
        arena.size_bytes / 2**30,
        arena.path if arena.named else arena.path.parent,
        config.eviction_policy,
        config.chunk_size,
    )
    logger.info("%s", config.reach if owner is None else f"Engines' socket {path}: no port")
    if owner is None or owner.http:
        logger.info("Health, status and metrics: %s", config.http_url)
    return loop


def _open_port(config: ServerConfig, loop: Loop, service: Service, started: list[Callable[[], None]]) -> int:
    """The engines' port, in use from now on; a configured 0 was any free one."""
    from lmcache.server.zmq_face import ZmqFace

    face = ZmqFace(
        loop, service, config.host, config.port, config.socket_dir, config.auth_key_file, config.insecure_no_auth
    )
    started.append(face.close)
    return face.port


def _open_http(config: ServerConfig, report: Report, started: list[Callable[[], None]]) -> int:
    """The port of health, status and metrics, serving from now on; a configured 0 was any free one."""
    from lmcache.server.http import HttpFace  # a third of a second, which an engine's own server is spared

    face = HttpFace(config, report)
    face.start()
    started.append(face.stop)
    return face.port
