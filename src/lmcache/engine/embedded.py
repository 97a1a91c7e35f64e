"""In-process mode: an engine's own server, started as its child and ended with it.

It is the daemon's code with its Unix socket only; its memory is private to the engine and gone with it. The engine's scheduler
starts it, and the ranks, which may be there earlier, find it by the engine's name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from blake3 import blake3

import lmcache
from lmcache.config.engine import EngineConfig
from lmcache.config.options import ENV_PREFIX
from lmcache.config.server import ServerConfig
from lmcache.engine.scheduler import SchedulerSession
from lmcache.engine.worker import WorkerSession
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger
from lmcache.wire.sockets import UNIX, listen_named

logger = init_logger(__name__)
_BOOT = "import runpy, sys; sys.path.append(sys.argv.pop(1)); runpy.run_module('lmcache.server.embedded', run_name='__main__')"
"""With this package's own place as the last one to look in: the engine may have found it by a path of its own."""
START_SECONDS = 30.0
"""How long an engine waits at its start for a server of its own, on a machine that is busy."""
_LOOK_SECONDS = 0.1
_STOP_SECONDS = 15.0
"""How long the server's end may take beyond the writes to tiers; it leaves a tier that hangs behind after three seconds."""
_KILL_SECONDS = 5.0
"""How long the kernel may take to end a killed server: one of its threads may wait for a device that does not answer."""


def embedded_address(instance: str) -> str:
    """Where the server of the engine `instance` is, or will be: an address for `Endpoint`, the same in all its processes."""
    return f"{UNIX}@{_name(instance)}"


def start_own_server(instance: str, config: EngineConfig, size_gb: float = 0.0) -> EmbeddedServer | None:
    """The server of the engine `instance`, as its settings say but for a size that is given; None, with a line in the log, where
    it cannot be started."""
    quiet = () if "LMCACHE_LOG_LEVEL" in os.environ else ("--log-level", "WARNING")
    flags = (*quiet, *config.server_flags)
    try:
        return EmbeddedServer(
            instance, l1_size_gb=size_gb or config.max_local_cpu_size, chunk_size=config.chunk_size, flags=flags
        )
    except ConfigError as error:
        logger.error("LMCache serves nothing for this engine: %s", error)
        return None


def wait_connected(
    sessions: Sequence[SchedulerSession | WorkerSession], seconds: float, running: Callable[[], bool] = lambda: True
) -> bool:
    """Wait until all of these have reached their server; False when one has not after so many seconds, or nobody will answer
    since the server is not `running`."""
    now = sessions[0].runtime.now
    end = now() + seconds
    while missing := [session for session in sessions if not session.connected]:
        left = end - now()
        if left <= 0 or not running():
            return False
        missing[0].wait_connected(min(left, _LOOK_SECONDS))
    return True


class EmbeddedServer:
    """The server of one engine, in a process of its own, from now until `close` or until this process ends in any way.

    Connections to `address` succeed at once and are answered when the server is up, a fraction of a second later.

    Args:
        instance: the engine's name, that of its `Endpoint`s.
        l1_size_gb: memory for KV in GiB; 0 takes a quarter of what is available.
        chunk_size: tokens in a chunk.
        flags: more flags of `lmcache server`, as they would be typed, but for --drain-seconds. With --http-port it serves HTTP
            too.
        drain_seconds: what --drain-seconds is: how long the end waits for what is still to be written to tiers.

    Raises:
        ConfigError: another engine of that name has a server. What else is wrong (too little memory,
            a bad flag) the server says in the log when it ends; the engine then runs without it.
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
                    cwd="/",  # python -c looks for modules where it runs
                    start_new_session=True,  # Ctrl-C is for the engine
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
        """End it and wait until its memory is free, or until it has had time enough even to be killed."""
        self._process.terminate()
        if not self._ended(self._drain_seconds + _STOP_SECONDS):
            logger.warning("This engine's LMCache server, pid %d, does not stop: it is killed", self.pid)
            self._process.kill()
            if not self._ended(_KILL_SECONDS):
                logger.error(
                    "This engine's LMCache server, pid %d, was killed and is still there, with its memory: "
                    "see whether the file systems of its tiers answer",
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
    """Short: a socket's name has 107 bytes at most, an engine's may have any number."""
    return f"lmcache-{os.getuid()}-{blake3(instance.encode()).hexdigest(16)}"


def _lifeline() -> tuple[int, int]:
    """A descriptor that becomes readable when this process ends, however; and one to be kept open until then, or -1.

    A pidfd where the kernel gives one. The end of a pipe otherwise, which a forked child of this process holds up.
    """
    try:
        return os.pidfd_open(os.getpid()), -1
    except OSError:
        return os.pipe2(os.O_CLOEXEC)


def _environment() -> dict[str, str]:
    """This process's, without what configures a daemon: an engine's own server is told everything by flags."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
