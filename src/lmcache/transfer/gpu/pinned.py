"""Registration of the arena's mapping with the GPU driver, so that the copy engine can reach it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from functools import partial

import torch

from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime
from lmcache.transfer.gpu.driver import using_device

logger = init_logger(__name__)
REGISTRATION_BYTES = 1 << 30
"""Size of one registration. The driver refuses a copy that crosses from one registration into the next."""
_PORTABLE_AND_MAPPED = 3  # cudaHostRegisterPortable, and cudaHostRegisterMapped for kernels that read the arena


class PinnedArena:
    """One mapping of the arena in this process. A background thread registers it, one GiB at a time. The driver copies parts that
    are not registered yet through its own, slower staging."""

    def __init__(self, device: torch.device, runtime: Runtime = RUNTIME) -> None:
        self._device, self._start = device, runtime.start
        self.address = 0
        """The address at which the mapping begins; 0 before the call of `register`."""
        self._bytes: torch.Tensor | None = None
        self._registered_bytes = 0
        self._stop = runtime.event()
        self._thread: threading.Thread | None = None

    def register(self, address: int, size_bytes: int) -> None:
        """Start the registration of `size_bytes` bytes from `address` on."""
        self.address = address
        self._bytes = _host_bytes(address, size_bytes)
        self._thread = self._start(partial(self._register, address, size_bytes), "lmcache-register")

    def wait_registered(self) -> None:
        """Wait until registration has ended, successfully or not."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Stop registering and undo all registrations. No copy may be running."""
        self._stop.set()
        self.wait_registered()
        with using_device(self._device):
            for offset in range(0, self._registered_bytes, REGISTRATION_BYTES):
                torch.cuda.cudart().cudaHostUnregister(self.address + offset)
        self._registered_bytes = 0
        self._bytes = None

    def registrations_from(self, base: int) -> int:
        """Return where registrations begin for copies to or from `base`; 0 where `base` is not this mapping."""
        return self.address if base == self.address else 0

    def covers(self, base: int, offset: int, length: int) -> bool:
        """Return whether kernels can read [base + offset, base + offset + length): it is registered."""
        return base == self.address and offset + length <= self._registered_bytes

    def pieces(self, base: int, offset: int, length: int) -> Iterator[torch.Tensor]:
        """Yield host memory [base + offset, base + offset + length) as byte tensors that cross no registration's end."""
        own = self._bytes if base == self.address else None
        if own is None:
            yield _host_bytes(base + offset, length)
            return
        end = offset + length
        while offset < end:
            size = min(REGISTRATION_BYTES - offset % REGISTRATION_BYTES, end - offset)
            yield own[offset : offset + size]
            offset += size

    def _register(self, address: int, size_bytes: int) -> None:
        with using_device(self._device):
            for offset in range(0, size_bytes, REGISTRATION_BYTES):
                if self._stop.is_set():
                    return
                length = min(REGISTRATION_BYTES, size_bytes - offset)
                error = int(torch.cuda.cudart().cudaHostRegister(address + offset, length, _PORTABLE_AND_MAPPED))
                if error:
                    logger.warning(
                        "cudaHostRegister failed at %d MiB (error %d): copies are slower beyond", offset >> 20, error
                    )
                    return
                self._registered_bytes = offset + length
        logger.info("Registered %d MiB of the arena with the GPU driver", size_bytes >> 20)


def _host_bytes(address: int, length: int) -> torch.Tensor:
    """Return host memory as a byte tensor, which does not keep the memory mapped."""
    return torch.frombuffer((ctypes.c_uint8 * length).from_address(address), dtype=torch.uint8)
