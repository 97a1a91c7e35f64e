"""What ranks report to a scheduler in another process: which arena they have mapped.

Some engines (TensorRT-LLM) take a hit as a promise: they have no way to hear that a load failed, but to fail the step. So a hit
is only offered when every rank has the arena mapped, from where a load succeeds even when the server dies. Such an engine's own
messages go one way, from the scheduler to the ranks; these go the other way, as datagrams to a socket in Linux's abstract
namespace, which leaves no file behind.
"""

from __future__ import annotations

import os
import socket
import struct

import msgspec

from lmcache.engine.runtime import RUNTIME, Runtime
from lmcache.observability.log import init_logger

logger = init_logger(__name__)
_CREDENTIALS = struct.Struct("3i")
_MAX_BYTES = 4096


class Report(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A rank's: the epoch whose arena it has mapped, b"" for none."""

    rank: int
    epoch: bytes


class RankWatch:
    """The scheduler's end.

    Raises:
        OSError: there is such a socket already.
    """

    def __init__(self, instance: str, ranks: int, runtime: Runtime = RUNTIME) -> None:
        self._name, self._ranks = _name(instance), ranks
        self._epochs: dict[int, bytes] = {}
        self._closed = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(self._name)
        self._thread = runtime.start(self._listen, "lmcache-ranks")

    def begin(self, epochs: list[bytes]) -> None:
        """What the ranks had mapped, in their order, when the engine started."""
        self._epochs = dict(enumerate(epochs)) | self._epochs

    def all_have(self, epoch: bytes) -> bool:
        """Whether every rank has this epoch's arena mapped, as far as they have told."""
        epochs = dict(self._epochs)
        return bool(epoch) and len(epochs) == self._ranks and all(other == epoch for other in epochs.values())

    def close(self) -> None:
        self._closed = True
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", self._name)
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        while not self._closed:
            raw, ancillary, _, _ = self._socket.recvmsg(_MAX_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size))
            if not any(_is_own(data) for _, _, data in ancillary) or not raw:
                continue
            try:
                report = msgspec.msgpack.decode(raw, type=Report)
            except msgspec.DecodeError as error:
                logger.warning("A rank's report cannot be read: %s", error)
                continue
            if 0 <= report.rank < self._ranks:
                self._epochs[report.rank] = report.epoch


class RankReporter:
    """A rank's end. Never waits and never raises: what cannot be told now is told with the next step. told: known already."""

    def __init__(self, instance: str, rank: int, told: bytes) -> None:
        self._name, self._rank = _name(instance), rank
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._told = told

    def tell(self, epoch: bytes) -> None:
        """Send it if it is another than before."""
        if epoch == self._told:
            return
        try:
            self._socket.sendto(msgspec.msgpack.encode(Report(self._rank, epoch)), self._name)
            self._told = epoch
        except OSError as error:
            logger.debug("not told yet: %s", error)

    def close(self) -> None:
        self._socket.close()


def _name(instance: str) -> str:
    return f"\0lmcache-ranks-{os.getuid()}-{instance}"


def _is_own(data: bytes) -> bool:
    """Whether these are the credentials of a process of this user."""
    return len(data) >= _CREDENTIALS.size and _CREDENTIALS.unpack_from(data)[1] == os.getuid()
