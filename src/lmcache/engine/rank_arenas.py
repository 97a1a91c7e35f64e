"""Reports of ranks to a scheduler in another process: which arena each rank has mapped.

Some engines (TensorRT-LLM) cannot handle a failed load except by failing the step. So a hit is offered to them only when every
rank has the arena mapped: a load from a mapped arena succeeds even if the server dies. The messages of such an engine go from the
scheduler to the ranks only; these reports go the other way, as datagrams to a socket in Linux's abstract namespace, which leaves
no file behind.
"""

from __future__ import annotations

import os
import socket
import struct

import msgspec

from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime

logger = init_logger(__name__)
_CREDENTIALS = struct.Struct("3i")
_MAX_BYTES = 4096


class Report(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A rank's report: the epoch whose arena it has mapped, b"" for none."""

    rank: int
    epoch: bytes


class RankWatch:
    """The scheduler's side, which receives the reports.

    Raises:
        OSError: the socket of this engine exists already.
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
        """Set the epochs that the ranks had mapped when the engine started, in the order of the ranks."""
        self._epochs = dict(enumerate(epochs)) | self._epochs

    def all_have(self, epoch: bytes) -> bool:
        """Return whether every rank has reported that it has this epoch's arena mapped."""
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
    """A rank's side. No method waits or raises; the next step repeats a failed report. reported: the last epoch reported."""

    def __init__(self, instance: str, rank: int, reported: bytes) -> None:
        self._name, self._rank = _name(instance), rank
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._reported = reported

    def tell(self, epoch: bytes) -> None:
        """Report the epoch if it differs from the last one reported."""
        if epoch == self._reported:
            return
        try:
            self._socket.sendto(msgspec.msgpack.encode(Report(self._rank, epoch)), self._name)
            self._reported = epoch
        except OSError as error:
            logger.debug("The mapped arena was not reported to the scheduler yet: %s", error)

    def close(self) -> None:
        self._socket.close()


def _name(instance: str) -> str:
    return f"\0lmcache-ranks-{os.getuid()}-{instance}"


def _is_own(data: bytes) -> bool:
    """Return whether these are the credentials of a process of this user."""
    return len(data) >= _CREDENTIALS.size and _CREDENTIALS.unpack_from(data)[1] == os.getuid()
