"""In-process mode: a server that an engine starts as its child process, and that ends with the engine.

The child runs the daemon's code with the Unix socket only. Its memory belongs to the engine and is freed with it. The engine's
scheduler starts the server; the ranks, which may start earlier, find it by the engine's name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

import lmcache
from lmcache.config.engine import EngineConfig
from lmcache.config.options import ENV_PREFIX
from lmcache.config.server import ServerConfig
from lmcache.engine.connection import OWN_START_SECONDS
from lmcache.engine.session import Session
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger
from lmcache.wire.sockets import UNIX, listen_named

logger = init_logger(__name__)
_BOOT = "import runpy, sys; sys.path.append(sys.argv.pop(1)); runpy.run_module('lmcache.server.embedded', run_name='__main__')"
"""Appends this package's folder to the module path: the engine may have found the package by a path of its own."""
NOT_STARTED = "its own server has not started; the server's log lines say why"
_LOOK_SECONDS = 0.1
_STOP_SECONDS = 15.0
"""How long the server may take to end, beyond the writes to tiers. It abandons a tier that hangs after three seconds."""
_KILL_SECONDS = 5.0
"""How long the kernel may take to end a killed server: a thread of the server may wait for a device that does not answer."""


def embedded_address(instance: str) -> str:
    """Return the address of the server of the engine `instance`, for `Endpoint`; the same in all processes of the engine."""
    return f"{UNIX}@{_name(instance)}"


def start_own_server(instance: str, config: EngineConfig, size_gb: float = 0.0) -> EmbeddedServer | None:
    """Start the server of the engine `instance` with the engine's settings; `size_gb` overrides the size. Return None, and log
    the reason, if it cannot be started."""
    quiet = () if "LMCACHE_LOG_LEVEL" in os.environ else ("--log-level", "WARNING")
    flags = (*quiet, *config.server_flags)
    try:
        return EmbeddedServer(
            instance, l1_size_gb=size_gb or config.max_local_cpu_size, chunk_size=config.chunk_size, flags=flags
        )
    except ConfigError as error:
        logger.error("LMCache serves nothing for this engine: %s", error)
        return None


def wait_connected(sessions: Sequence[Session], seconds: float, own: EmbeddedServer | None = None) -> bool:
    """Wait until all of these sessions are connected. Return False if one is not after `seconds`, or if the engine's `own` server
    does not run any more."""
    now = sessions[0].runtime.now
    end = now() + seconds
    while missing := [session for session in sessions if not session.connected]:
        left = end - now()
        if left <= 0 or (own is not None and not own.running):
            return False
        missing[0].wait_connected(min(left, _LOOK_SECONDS))
    return True


def wait_for_server(
    sessions: Sequence[Session], own: EmbeddedServer | None = None, seconds: float | None = None
) -> bool:
    """Wait for the server at the start of an engine. Sessions whose weights are not identified yet are not waited for.

    own: the server that this process has started for the engine; it is waited for `seconds` (None: 30) while it runs. A server
    that another process has started is waited for as `Session.wait_for_server` says. Return False if `own` has not started.
    """
    if own is None:
        for session in sessions:
            session.wait_for_server(seconds)
        return True
    limit = OWN_START_SECONDS if seconds is None else seconds
    waiting = [session for session in sessions if session.identified]
    if not waiting or wait_connected(waiting, limit, own):
        return True
    if own.running and seconds is None:
        logger.warning("This engine's LMCache server was not up within %.0f s; it may come yet", limit)
    return own.running


class EmbeddedServer:
    """The server of one engine, in a child process, from now until `close` or until this process ends in any way.

    Connections to `address` succeed at once and are answered when the server is up, a fraction of a second later.

    Args:
        instance: the engine's name, as in its `Endpoint`s.
        l1_size_gb: memory for KV in GiB; 0 takes a quarter of the available memory.
        chunk_size: tokens in a chunk.
        flags: more flags of `lmcache server`, as on its command line, except --drain-seconds. With --http-port the server also
            serves HTTP.
        drain_seconds: the value of --drain-seconds: how long the server, when it ends, goes on writing to tiers.

    Raises:
        ConfigError: another engine of that name has a server. Other faults (too little memory, a bad
            flag) are logged by the server, which then ends; the engine runs without it.
    """

    def __init__(
        self,
        instance: str,
        *,
        l1_size_gb: float = 0.0,
        chunk_size: int = 256,
        flags: Sequence[str] = (),
        drain_seconds: float = ServerConfig.drain_seconds,
    ) -> None:
        self.address, self._drain_seconds = embedded_address(instance), drain_seconds
        size = ("--l1-size-gb", f"{l1_size_gb:.6f}") if l1_size_gb else ()
        with listen_named(_name(instance)) as listener:
            lifeline, self._kept = _lifeline()
            try:
                descriptors = (listener.fileno(), lifeline)
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-c", _BOOT, str(Path(lmcache.__file__).parent.parent)),
                        *map(str, descriptors),
                        *("--chunk-size", str(chunk_size), *size, *flags, "--drain-seconds", str(drain_seconds)),
                    ],
                    pass_fds=descriptors,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=_environment(),
                    cwd="/",  # python -c looks for modules in its working directory
                    start_new_session=True,  # Ctrl-C must reach the engine only
                )
            except (OSError, ValueError) as error:
                raise ConfigError(f"cannot start the engine's own server with {sys.executable}: {error}") from error
            finally:
                os.close(lifeline)
        logger.info("Starting this engine's own LMCache server: pid %d, %s", self._process.pid, self.address)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End the server and wait until its memory is free. A server that does not end in time is killed."""
        self._process.terminate()
        if not self._ended(self._drain_seconds + _STOP_SECONDS):
            logger.warning("This engine's LMCache server, pid %d, does not stop: it is killed", self.pid)
            self._process.kill()
            if not self._ended(_KILL_SECONDS):
                logger.error(
                    "This engine's LMCache server, pid %d, was killed and is still there, with its memory: "
                    "check whether the file systems of its tiers answer",
                    self.pid,
                )
        if self._kept >= 0:
            os.close(self._kept)
            self._kept = -1

    def _ended(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


def _name(instance: str) -> str:
    """Return a short name for the socket: it has 107 bytes at most, and an engine's name may have any number."""
    return f"lmcache-{os.getuid()}-{blake3(instance.encode()).hexdigest(16)}"


def _lifeline() -> tuple[int, int]:
    """Return a descriptor that becomes readable when this process ends, and one to be kept open until then, or -1.

    The first is a pidfd, or a pipe's end if the kernel gives none. A forked child of this process keeps the pipe open longer.
    """
    try:
        return os.pidfd_open(os.getpid()), -1
    except OSError:
        return os.pipe2(os.O_CLOEXEC)


def _environment() -> dict[str, str]:
    """Return this process's environment without the daemon's settings: an engine's own server gets its settings by flags."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
