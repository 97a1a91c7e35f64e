"""`lmcache server` starts the daemon, logs when it serves, and removes everything that it created when it ends."""

from __future__ import annotations

import dataclasses
import logging
import os
import resource
import secrets
import signal
import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lmcache.cache import L1
from lmcache.config.server import ServerConfig
from lmcache.errors import ConfigError
from lmcache.memory.arena import Arena, reclaim_stale
from lmcache.observability.log import init_logger, set_format, set_level
from lmcache.runtime import RUNTIME, Runtime
from lmcache.server.attaching import Attaching
from lmcache.server.eviction import Eviction
from lmcache.server.loop import Loop
from lmcache.server.reloading import Reloading
from lmcache.server.report import Report
from lmcache.server.service import Service
from lmcache.server.tiering import Tiering
from lmcache.server.unix_endpoint import UnixEndpoint
from lmcache.tiers import Region
from lmcache.wire.sockets import listen_unix

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.server.http import HttpEndpoint
    from lmcache.tiers.adapters import Translated
    from lmcache.tiers.registry import TierSpec

logger = init_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Owner:
    """The engine that has started the server for its own use. The server listens at the engine's socket only, unlinks its memory
    file, and ends with the engine.

    listener: the socket to listen at. lifeline: a descriptor that becomes readable when the engine ends. http: whether to open
    the HTTP port.
    """

    listener: socket.socket
    lifeline: int
    http: bool


def serve(
    config: ServerConfig,
    owner: Owner | None = None,
    runtime: Runtime = RUNTIME,
    reload: Callable[[], ServerConfig] | None = None,
) -> int:
    """Run until SIGINT or SIGTERM, or until the owner ends; return the exit code.

    reload: reads the settings again, for SIGHUP. Without it, SIGHUP does what it does by default.

    Raises:
        ConfigError: a port, memory or a folder is not available. Everything created before is removed.
    """
    set_level(config.log_level)
    set_format(config.log_format)
    _allow_many_descriptors()
    reclaim_stale(config.arena_dir, runtime)
    fault: BaseException | None = None
    try:
        with ExitStack() as started:
            loop = start(config, owner, runtime, started, reload)
            logger.info("LMCache cache server is running...")
            loop.run()
        logger.info("LMCache cache server has stopped")
    except BaseException as error:
        fault = error
        raise
    finally:
        if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
            _end_at_once(fault)
    return 0


def _end_at_once(fault: BaseException | None) -> NoReturn:
    """End the process although threads hang in a tier; the interpreter would wait for these forever."""
    if fault is not None:
        logger.error("%s", fault, exc_info=None if isinstance(fault, ConfigError) else fault)
    logging.shutdown()
    os._exit(0 if fault is None else 2 if isinstance(fault, ConfigError) else 1)


def _translated(config: ServerConfig) -> list[Translated]:
    """Return the tiers that serve the stores of `--l2-adapter`. Raises ConfigError for JSON that is no tier."""
    if not config.l2_adapter:
        return []
    from lmcache.tiers.adapters import url_of_adapter  # imported late, since most servers have no tiers

    return [url_of_adapter(text) for text in config.l2_adapter]


def _urls_of(config: ServerConfig) -> list[str]:
    """Return the URLs of all configured tiers, nearest first. Raises ConfigError for JSON that is no tier."""
    return [*config.tier_urls, *(one.url for one in _translated(config))]


def _tiers_of(config: ServerConfig, runtime: Runtime, server_id: bytes, urls: list[str]) -> list[TierSpec]:
    """Return the tiers of these URLs, not opened yet."""
    if not urls:
        return []
    from lmcache.tiers.registry import make_tiers  # imported late, since most servers have no tiers

    specs = make_tiers(urls, runtime)
    for spec in specs:
        if spec.tier.scheme == "peer":
            from lmcache.peers.dial import Myself
            from lmcache.peers.tier import PeersTier

            assert isinstance(spec.tier, PeersTier)
            who = server_id, config.auth_key_file, config.insecure_no_auth, config.chunk_size
            spec.tier.introduce(Myself(*who, config.host, config.port, config.peer_address, config.nixl_devices))
    return specs


def _start_tiers(config: ServerConfig, loop: Loop, l1: L1, specs: list[TierSpec], started: ExitStack) -> Tiering:
    """Open the tiers. From then on the first SIGINT or SIGTERM writes queued chunks before the end; the second
    ends at once."""
    tiering = Tiering(
        loop,
        l1,
        specs,
        chunk_tokens=config.chunk_size,
        always=config.worth == "always",
        patience_seconds=config.l2_patience_seconds,
        queue_bytes=config.l2_queue_bytes,
    )
    started.callback(tiering.close)
    arena = l1.arena
    tiering.attach(
        Region(arena.mapping.address, arena.size_bytes, arena.descriptor, arena.mapping.view(0, arena.size_bytes))
    )

    def end(number: int, frame: object) -> None:
        if tiering.interrupt() > 1:
            loop.stop()
        else:
            loop.call_soon(lambda: tiering.writes.drain(config.drain_seconds, loop.stop))

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    tiering.open(config.l2_required)
    return tiering


def _allow_many_descriptors() -> None:
    """Raise the soft limit of descriptors. Each engine process takes two, so the usual 1024 are too few for `unix_endpoint`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def start(
    config: ServerConfig,
    owner: Owner | None,
    runtime: Runtime,
    started: ExitStack,
    reload: Callable[[], ServerConfig] | None = None,
) -> Loop:
    """Start every part. `started` collects the callbacks that stop them, in order. reload: as for `serve`."""
    server_id = secrets.token_bytes(16)
    urls = _urls_of(config)
    for line in (line for one in _translated(config) for line in one.said):
        logger.warning("%s", line)
    specs = _tiers_of(config, runtime, server_id, urls)  # first, since a wrong URL must fail before anything is created
    loop = Loop(runtime)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.stop())
    started.callback(loop.close)
    if owner is not None:
        _end_with(owner, loop)
    arena = Arena(Path(config.arena_dir), config.l1_bytes, config.numa, config.huge_pages, runtime)
    started.callback(arena.close)
    if owner is not None:
        arena.unlink()
    workers = loop.executor("io", config.max_workers)
    started.callback(workers.shutdown, wait=True, cancel_futures=True)
    eviction = Eviction(config.eviction_policy, _habits_file(config, owner))
    started.callback(eviction.save)
    l1 = L1(arena, float(config.lease_seconds), eviction.new_table, eviction.group_table)
    l1.pinnable_bytes = int(config.pinned_share * l1.total_bytes)
    tiering = _start_tiers(config, loop, l1, specs, started)
    records_bytes = int(config.records_mb * 2**20)
    service = Service(loop, l1, config.chunk_size, workers, tiering, server_id, records_bytes)
    service.eviction, service.l1_codec = eviction, config.l1_codec
    if config.nixl_devices and owner is None:
        from lmcache.server.lending import Lending  # imported late, since most servers have no mover

        lending = Lending(loop, arena.descriptor, arena.size_bytes, config.nixl_devices)
        started.callback(lending.close)
        service.lend_through(lending)
    _observe(config, service, bool(specs), started)
    attaching = Attaching(
        loop, tiering, urls, lambda url: _tiers_of(config, runtime, server_id, [url])[0], workers, config.drain_seconds
    )
    started.callback(attaching.close)
    config, http = _open_doors(config, owner, loop, service, attaching, started)
    if reload is not None:
        reloading = Reloading(config, reload, http, attaching, _urls_of)
        signal.signal(signal.SIGHUP, lambda *_: loop.call_soon(reloading.run))
    arena.start_prefault()
    logger.info(
        "L1: %.2f GiB in %s, %s eviction, %d-token chunks",
        arena.size_bytes / 2**30,
        arena.path if arena.named else arena.path.parent,
        config.eviction_policy,
        config.chunk_size,
    )
    logger.info(
        "%s", config.reach if owner is None else "No port: only the engine that started this server can connect"
    )
    if owner is None or owner.http:
        logger.info("Health, status and metrics: %s", config.http_url)
    return loop


def _habits_file(config: ServerConfig, owner: Owner | None) -> Path | None:
    """Return where the server keeps what its eviction has learned: beside its socket, by its port, so that the next server there
    finds it. None for a server whose port is not fixed."""
    return config.socket_dir / f"habits-{config.port}" if owner is None and config.port else None


def _observe(config: ServerConfig, service: Service, tiers: bool, started: ExitStack) -> None:
    """Begin what listens to lookups for `lmcache predict`, `lmcache replay` the dashboards of the public project, and spans."""
    if config.predict == "on":
        from lmcache.server.predicting import Predicting

        service.predicting = Predicting(service.loop, service.l1, config.chunk_size, tiers)
        started.callback(service.predicting.close)
    if config.metrics_names == "lmcache-0.5":
        from lmcache.server.earlier_names import EarlierNames

        service.more_counters.append(EarlierNames(service).counters)
    if config.otlp_endpoint:
        from lmcache.server.tracing import Tracing

        sessions = service.sessions
        tracing = Tracing(service.loop.runtime, config.otlp_endpoint, sessions.server_id.hex(), sessions.describe)
        service.tracing = tracing
        service.accounts.on_account.append(tracing.accounted)
        service.on_copied.append(tracing.copied)
        started.callback(tracing.exporter.close)
    if config.record_trace is None:
        return
    from lmcache.server.recording import Recording  # imported late, since most servers record nothing

    server, most_bytes = service.sessions.server_id.hex(), config.record_trace_mb << 20
    service.recording = Recording(
        service.loop, service.l1, config.record_trace, most_bytes, config.chunk_size, server, service.model_of
    )
    started.callback(service.recording.close)


def _end_with(owner: Owner, loop: Loop) -> None:
    """End the server when the engine ends, as SIGTERM does, so that queued chunks are written to tiers first."""

    def end() -> None:
        loop.unwatch(owner.lifeline)
        signal.raise_signal(signal.SIGTERM)

    loop.watch(owner.lifeline, end)


def _open_doors(
    config: ServerConfig,
    owner: Owner | None,
    loop: Loop,
    service: Service,
    attaching: Attaching,
    started: ExitStack,
) -> tuple[ServerConfig, HttpEndpoint | None]:
    """Open the endpoints. Returns the configuration, with the ports that were chosen for the port 0, and the HTTP endpoint."""
    if owner is not None:
        started.callback(UnixEndpoint(loop, service, owner.listener, None).close)
    else:
        path = config.socket_dir / f"{service.sessions.server_id.hex()[:16]}.sock"
        users, groups = config.allow_uid, config.allow_gid
        only_group = groups[0] if len(groups) == 1 and not users else -1
        listener = listen_unix(path, bool(users or groups), only_group)
        started.callback(UnixEndpoint(loop, service, listener, path, users, groups).close)
        if users or groups:
            who = [*(f"user {one}" for one in users), *(f"group {one}" for one in groups)]
            logger.info("Engines of %s may map L1, too, and read and overwrite all of it", ", ".join(who))
        config = dataclasses.replace(config, port=_open_port(config, loop, service, started))
    if owner is not None and not owner.http:
        return config, None
    http = _open_http(config, Report(config, loop, service, attaching), started)
    return dataclasses.replace(config, http_port=http.port), http


def _open_port(config: ServerConfig, loop: Loop, service: Service, started: ExitStack) -> int:
    """Open the port for engines, and return its number; a configured 0 stands for any free port."""
    from lmcache.server.zmq_endpoint import ZmqEndpoint

    endpoint = ZmqEndpoint(
        loop, service, config.host, config.port, config.socket_dir, config.auth_key_file, config.insecure_no_auth
    )
    started.callback(endpoint.close)
    return endpoint.port


def _open_http(config: ServerConfig, report: Report, started: ExitStack) -> HttpEndpoint:
    """Open the port for health, status and metrics; a configured 0 stands for any free port."""
    # Imported late: it takes 0.3 s, and an embedded server rarely needs it.
    from lmcache.server.http import HttpEndpoint

    endpoint = HttpEndpoint(config, report)
    report.api_token = lambda: endpoint.token
    endpoint.start()
    started.callback(endpoint.stop)
    return endpoint
