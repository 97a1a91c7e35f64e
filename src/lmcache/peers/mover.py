"""A server's side of its mover: starting it, again if it has ended, telling it what to do, and ending it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from lmcache.observability.log import init_logger, printable
from lmcache.peers.mover_words import Ended, Failed, Ready, Task, decode_said, encode, encode_task
from lmcache.runtime import Runtime
from lmcache.tiers import child
from lmcache.tiers.breaker import Breaker

logger = init_logger(__name__)
_START_SECONDS = 30.0
_SETTLED_SECONDS = 10.0
"""A mover that has lived for so long was no failed start."""
_KEPT = ["PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "LD_PRELOAD", "TZ"]
_KEPT_PREFIXES = "UCX_", "NIXL_", "LC_"
"""Of the environment, what a mover gets: who reaches its sockets may read all of it, and a server's has passwords."""


@dataclass(frozen=True)
class Offer:
    """A mover that works. number: of this one; a later one of the same server has another. agent, address: as in `Ready`."""

    number: int
    agent: bytes
    address: int


class Mover:
    """Keeps one mover alive. It belongs to whoever calls `start`; the methods may be called from any thread.

    memory: descriptor of the arena. devices: network devices that UCX may use, separated by commas. writes: as in `Task`.
    changed: called when `offer` has changed. heard: takes a mover's number and what it has said of a read. lost: takes the number
    of a mover that the kernel has removed, and why; nothing touches the arena for it any more. All are called in one thread.
    """

    def __init__(
        self,
        runtime: Runtime,
        memory: int,
        memory_bytes: int,
        devices: str,
        *,
        writes: bool,
        changed: Callable[[], None] = lambda: None,
        heard: Callable[[int, Ended | Failed], object] = lambda number, said: None,
        lost: Callable[[int, str], object] = lambda number, reason: None,
    ) -> None:
        self._runtime, self._devices, self._writes = runtime, devices, writes
        # A descriptor of its own, which may not write where the mover must not.
        self._memory = os.open(f"/proc/self/fd/{memory}", (os.O_RDWR if writes else os.O_RDONLY) | os.O_CLOEXEC)
        self._memory_bytes = memory_bytes
        self._changed, self._heard, self._lost = changed, heard, lost
        self.offer: Offer | None = None
        self.trouble = "it is being started"
        """Why there is no offer."""
        self._stop = runtime.event()
        self._lock = threading.Lock()
        """Guards `_control`, of the mover that runs."""
        self._control: socket.socket | None = None
        self._number = 0
        self._why = ""
        """Why the mover that runs was ended."""

    @property
    def what(self) -> str:
        return "reads from other servers" if self._writes else "lets other servers read"

    def start(self) -> None:
        self._runtime.start(self._run, "lmcache-mover")

    def tell(self, message: msgspec.Struct) -> int:
        """Send a message to the mover. Returns the number of the mover that will get it, or 0 if none takes it now."""
        with self._lock:
            if self._control is None or self.offer is None:
                return 0
            try:
                self._control.send(encode(message), socket.MSG_DONTWAIT)
            except OSError:  # it has ended, or reads nothing; who waits for what it was told before ends it then
                return 0
            return self._number

    def kill(self, number: int, why: str) -> None:
        """End the mover of this number, for this reason; another one follows. `lost` tells when it has gone."""
        with self._lock:
            if self._control is not None and number == self._number:
                self._why = why
                child.hang_up(self._control)

    def close(self) -> None:
        """End the mover for good. Does not wait for its end."""
        self._stop.set()
        self.kill(self._number, "the server ends")

    # The thread. It lives as long as the process that it starts, as that one requires

    def _run(self) -> None:
        breaker = Breaker()
        while not self._stop.is_set():
            began = self._runtime.now()
            try:
                why, again = self._live()
            except Exception as error:  # top of the thread
                logger.exception("The mover that %s cannot be started", self.what)
                why, again = str(error), True
            self.trouble = why
            if self._stop.is_set():
                break
            if self._runtime.now() - began > _SETTLED_SECONDS:
                breaker.succeeded()
            breaker.probe(breaker.retry_at)
            breaker.failed(self._runtime.now(), why, at_once=True)
            if not again:
                logger.warning("NIXL cannot be used, so pulls go over TCP: %s", why)
                break
            logger.warning(
                "The process that %s by NIXL has ended, and is started again in %g s; pulls go over TCP meanwhile: %s",
                *(self.what, breaker.pause_seconds, why),
            )
            self._stop.wait(breaker.pause_seconds)
        os.close(self._memory)

    def _live(self) -> tuple[str, bool]:
        """Run one mover to its end. Returns why it has ended, and whether another one may do better."""
        ours, theirs = child.pair()
        with ours:
            with theirs:
                task = Task(os.getpid(), theirs.fileno(), self._memory, self._memory_bytes, self._writes)
                descriptors = [task.control, task.memory]
                process = child.start(
                    "lmcache.peers.moving", encode_task(task), descriptors, _environment(self._devices)
                )
            with self._lock:
                self._number += 1
                number, self._control, self._why = self._number, ours, ""
            if self._stop.is_set():
                child.hang_up(ours)
            why, again = "its process has died", True
            try:
                ours.settimeout(_START_SECONDS)
                ready = self._said(ours)
                if isinstance(ready, Ready) and ready.trouble:
                    why, again = printable(ready.trouble, 500), not ready.trouble.startswith("not installed")
                elif isinstance(ready, Ready):
                    self._is_ready(number, process.pid, ready)
                    ours.settimeout(None)
                    while isinstance(said := self._said(ours), Ended | Failed):
                        self._heard(number, said)
                        if isinstance(said, Failed):
                            why = f"a read has failed: {printable(said.trouble, 300)}"
            except TimeoutError:
                why = f"it did not start within {_START_SECONDS:g} s"
            finally:
                with self._lock:
                    self._control, self.offer = None, None
                    why = self._why or why
                self.trouble = why
                process.kill()
                process.wait()  # the kernel ends this; until then the mover may touch the arena
                self._lost(number, why)
                self._changed()
            return why, again

    def _is_ready(self, number: int, pid: int, ready: Ready) -> None:
        with self._lock:
            self.offer = Offer(number, ready.agent, ready.address)
        logger.warning(
            "Process %d %s by NIXL (UCX on %s). It listens on %s, where nobody is asked for a proof and nothing is encrypted. "
            "Who reaches it may %s and take over the process, which has the rights of this server's user: only the servers' own "
            "network may reach it",
            *(pid, self.what, self._devices, ", ".join(ready.listens) or "no TCP port"),
            "read and overwrite L1" if self._writes else "read L1",
        )
        self._changed()

    def _said(self, control: socket.socket) -> Ready | Ended | Failed | None:
        """Return the next message of the mover; None if it has ended, or says what cannot be read."""
        try:
            packet = control.recv(child.PACKET_BYTES)
            return decode_said(packet) if packet else None
        except TimeoutError:
            raise
        except (OSError, msgspec.MsgspecError):
            return None


def _environment(devices: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    choices = {"UCX_TLS": "rc,ud,tcp,cma", "UCX_LOG_LEVEL": "error", "NIXL_LOG_LEVEL": "FATAL"}
    return {**choices, **kept, "UCX_NET_DEVICES": devices}
