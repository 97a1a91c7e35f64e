"""A server's side of its client process of a Mooncake Store: starting, asking and ending it."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from lmcache.config.hosts import connect, in_url
from lmcache.observability.log import printable
from lmcache.tiers import child
from lmcache.tiers.child import PACKET_BYTES
from lmcache.tiers.mooncake.words import (
    BYE,
    MOST_KEYS,
    Answer,
    Ask,
    State,
    Task,
    decode_answer,
    decode_state,
    encode,
    encode_task,
)
from lmcache.tiers.tier import TierError

LANE_BYTES = 128 << 20
"""Memory of a lane. The kernel provides what has been used; a larger frame is not stored."""
_ASKING_LANES = 2
"""Lanes without memory, so that questions never wait for values."""
_START_SECONDS, _PROBE_SECONDS, _LEAVE_SECONDS = 14.0, 2.0, 2.0
"""A start may take a little less than the server waits for tiers to open; libraries are read from disk."""
_SLOWEST = 16 << 20
"""Bytes a second. A client that is slower hangs."""


@dataclass(frozen=True)
class Joining:
    """How to join a store. hostname: the address by which other clients reach this one; "": that which reaches the master.

    timeout_seconds: how long the master, or the owner of a value's memory, may be silent.
    """

    host: str
    port: int
    hostname: str
    metadata: str
    segment_bytes: int
    protocol: str
    devices: str
    timeout_seconds: float
    workers: int

    @property
    def master(self) -> str:
        return f"{in_url(self.host)}:{self.port}"


@dataclass(eq=False)
class Lane:
    """A connection to the client process, and the part of the common memory that belongs to it (none for a lane for questions).

    offset: where that part begins in the memory.
    """

    socket: socket.socket
    memory: memoryview
    offset: int


class StoreProcess:
    """One client process, which has joined the store. It is never started again: who needs another one makes another one.

    Raises:
        TierError: nobody listens at the master's address, or the store cannot be joined.
    """

    def __init__(self, joining: Joining) -> None:
        self._joining = joining
        hostname = joining.hostname or _own_address(joining)
        memory = os.memfd_create("lmcache-mooncake", os.MFD_CLOEXEC)
        self._control, control = child.pair()
        pairs = [child.pair() for _ in range(joining.workers + _ASKING_LANES)]
        try:
            os.ftruncate(memory, joining.workers * LANE_BYTES)
            self._map = memoryview(mmap.mmap(memory, joining.workers * LANE_BYTES))
            task = Task(
                parent=os.getpid(),
                control=control.fileno(),
                lanes=[theirs.fileno() for _, theirs in pairs],
                memory=memory,
                memory_bytes=len(self._map),
                hostname=hostname,
                metadata=joining.metadata,
                segment_bytes=joining.segment_bytes,
                protocol=joining.protocol,
                devices=joining.devices,
                master=joining.master,
            )
            self._child = child.start(
                "lmcache.tiers.mooncake.client",
                encode_task(task),
                [task.control, *task.lanes, memory],
                _environment(joining, hostname),
            )
        except OSError as error:
            for one in (self._control, *(ours for ours, _ in pairs)):
                one.close()
            raise TierError("no client", f"the client process of Mooncake cannot be started: {error}") from error
        finally:
            os.close(memory)
            for one in (control, *(theirs for _, theirs in pairs)):
                one.close()
        self._lanes = [
            Lane(ours, self._map[number * LANE_BYTES : (number + 1) * LANE_BYTES], number * LANE_BYTES)
            for number, (ours, _) in enumerate(pairs)
        ]
        self._moving = _Free(self._lanes[: joining.workers])
        self._asking = _Free(self._lanes[joining.workers :])
        self.listens = self._joined()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    @contextlib.contextmanager
    def lane(self, seconds: float, *, moving: bool) -> Iterator[Lane]:
        """Lend a lane; `moving`: one with memory. Nothing but this process touches its memory between two calls of `ask`.

        Raises:
            TierError: none was free in so many seconds.
        """
        free = self._moving if moving else self._asking
        lane = free.take(seconds)
        if lane is None:
            raise TierError("timeout", f"Mooncake at {self._joining.master}: all workers were busy; raise ?workers=")
        try:
            yield lane
        finally:
            free.give(lane)

    def ask(
        self,
        lane: Lane,
        verb: str,
        keys: Sequence[str],
        at: Sequence[int] = (),
        sizes: Sequence[int] = (),
        replicas: int = 1,
        seconds: float = 0.0,
    ) -> Sequence[int]:
        """Call a method of the store with at most MOST_KEYS keys. at: offsets in the lane's memory. seconds: more time.

        Raises:
            TierError: the process has died, or did not answer in time and was killed.
        """
        assert len(keys) <= MOST_KEYS
        ask = Ask(verb, list(keys), [lane.offset + one for one in at], list(sizes), replicas)
        try:
            lane.socket.settimeout(3 * self._joining.timeout_seconds + sum(sizes) / _SLOWEST + seconds)
            lane.socket.send(encode(ask))
            packet = lane.socket.recv(PACKET_BYTES)
            answer = decode_answer(packet) if packet else Answer([], "")
        except TimeoutError:
            self.kill()
            raise self._trouble(
                "timeout", f"its client process (pid {self.pid}) hung in `{verb}` and was ended"
            ) from None
        except (OSError, msgspec.MsgspecError):
            packet, answer = b"", Answer([], "")
        if not packet:
            self.kill()
            raise self._trouble("no client", f"its client process (pid {self.pid}) has died")
        if answer.text:
            raise self._trouble("refused", f"`{verb}` failed: {printable(answer.text)}")
        if len(answer.numbers) != len(keys):
            raise self._trouble("protocol", f"`{verb}` gave {len(answer.numbers)} answers for {len(keys)} keys")
        return answer.numbers

    def kill(self) -> None:
        """End the process now. It has no part of the arena, so nobody needs to wait until the kernel has removed it."""
        child.end(self._child, _LEAVE_SECONDS, [self._control, *(lane.socket for lane in self._lanes)])

    def leave(self) -> None:
        """End the process; one that lends memory takes it out of the store before, which takes a second or two."""
        if self._joining.segment_bytes:
            with contextlib.suppress(OSError):
                self._control.send(BYE)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_LEAVE_SECONDS)
        self.kill()

    def _joined(self) -> list[str]:
        """Wait until the process has joined the store, and return where it listens."""
        try:
            self._control.settimeout(_START_SECONDS)
            packet = self._control.recv(PACKET_BYTES)
            state = decode_state(packet) if packet else State(0, "its client process died during the start", [])
        except TimeoutError:
            state = State(0, f"the store was not joined in {_START_SECONDS:g} s; check its master", [])
        except (OSError, msgspec.MsgspecError) as error:
            state = State(0, f"its client process could not be started: {error}", [])
        if not state.code and not state.text:
            return state.listens
        self.kill()
        if state.code:
            raise self._trouble(
                "unreachable", f"the store cannot be joined (its error {state.code}): check that this is its master"
            )
        if ".so" in state.text or "mooncake" in state.text:
            raise self._trouble(
                "not installed",
                f"{printable(state.text)}: pip install 'lmcache[mooncake]', and of the system libibverbs1 libnl-3-200"
                " libnl-route-3-200",
            )
        raise self._trouble("no client", state.text)

    def _trouble(self, reason: str, text: str) -> TierError:
        return TierError(reason, f"Mooncake at {self._joining.master}: {text}")


class _Free:
    """Lanes that nobody uses."""

    def __init__(self, lanes: list[Lane]) -> None:
        self._lanes = lanes[:]
        self._count = threading.BoundedSemaphore(len(lanes))

    def take(self, seconds: float) -> Lane | None:
        return self._lanes.pop() if self._count.acquire(timeout=seconds) else None

    def give(self, lane: Lane) -> None:
        self._lanes.append(lane)
        self._count.release()


def _own_address(joining: Joining) -> str:
    """Return this machine's address towards the master, by connecting to it."""
    try:
        with connect(joining.host, joining.port, min(_PROBE_SECONDS, joining.timeout_seconds)) as probe:
            return str(probe.getsockname()[0]).removeprefix("::ffff:")
    except OSError as error:
        raise TierError(
            "unreachable", f"Mooncake at {joining.master}: no master answers there: {error.strerror or error}"
        ) from None


def _environment(joining: Joining, hostname: str) -> dict[str, str]:
    """The environment of the client process, which is the only way to set the store's time-outs."""
    milliseconds = str(int(joining.timeout_seconds * 1000))
    seconds = str(max(1, math.ceil(joining.timeout_seconds / 2)))  # a transfer is tried twice
    limits = {
        "MC_RPC_TIMEOUT_MS": milliseconds,
        "MC_RPC_CONNECT_TIMEOUT_MS": milliseconds,
        "MC_TCP_STATUS_TIMEOUT_SEC": seconds,
        "MC_TCP_PROGRESS_TIMEOUT_SEC": seconds,
        "MC_TCP_ADMISSION_TIMEOUT_MS": milliseconds,
        "MC_STORE_CLIENT_SETUP_RETRIES": "1",
    }
    choices = {"MC_TCP_BIND_ADDRESS": hostname, "MC_LOG_LEVEL": "ERROR", "GLOG_minloglevel": "3"}
    return {**choices, **os.environ, **limits}
