"""The GPU's driver, reached past PyTorch: CUDA's or HIP's."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from typing import TYPE_CHECKING

from lmcache.observability.log import init_logger

if TYPE_CHECKING:
    import torch

logger = init_logger(__name__)
_NAMES = {
    False: (
        ("libcuda.so.1",),
        *("cuLaunchKernel", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuEventRecord", "cuStreamWaitEvent"),
        "cuThreadExchangeStreamCaptureMode",
    ),
    True: (
        ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6"),
        *("hipModuleLaunchKernel", "hipMemcpyHtoDAsync", "hipMemcpyDtoHAsync", "hipEventRecord", "hipStreamWaitEvent"),
        "hipThreadExchangeStreamCaptureMode",
    ),
}
"""Whether it is HIP -> the library's names, the functions that launch a copy (in the order of `Driver.functions`), and the one
that sets a thread's capture mode."""
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal


class Driver:
    """The driver's library.

    functions: addresses of launch, upload, download, record and wait, as `Launcher` takes them.

    Raises:
        OSError, AttributeError: no such library, no such function in it.
    """

    def __init__(self, hip: bool) -> None:
        names, *functions, exchange = _NAMES[hip]
        library = _library(names)  # for good: libraries are never unloaded
        self._exchange = getattr(library, exchange)
        self.functions = tuple(ctypes.cast(getattr(library, one), ctypes.c_void_p).value or 0 for one in functions)

    @contextmanager
    def beside_captures(self) -> Iterator[None]:
        """Run the thread's work beside other threads' captures; see the function of that name."""
        mode = ctypes.c_int(_THREAD_LOCAL)
        self._exchange(ctypes.byref(mode))
        try:
            yield
        finally:
            self._exchange(ctypes.byref(mode))


def _library(names: Sequence[str]) -> ctypes.CDLL:
    for name in names[:-1]:
        with suppress(OSError):
            return ctypes.CDLL(name)
    return ctypes.CDLL(names[-1])


@cache
def find_driver(hip: bool) -> Driver | None:
    """The driver; None, and a line in the log, where it cannot be reached past PyTorch."""
    try:
        return Driver(hip)
    except (OSError, AttributeError) as error:
        logger.warning(
            "The GPU's driver is not reached: copies take more CPU time, and must not meet a capture: %s", error
        )
        return None


def beside_captures(device: str) -> AbstractContextManager[None]:
    """A context for a thread that uses a GPU while the engine may be capturing CUDA graphs in another thread; empty for a CPU.

    What the thread does inside the context is no part of such captures. Without it, memory that is allocated or registered, a
    kernel that is loaded, or an event that is waited for, anywhere in the process, makes a capture fail.
    """
    if device == "cpu":
        return nullcontext()
    import torch

    driver = find_driver(torch.version.hip is not None)
    return nullcontext() if driver is None else driver.beside_captures()


@contextmanager
def using_device(device: torch.device) -> Iterator[None]:
    """Make `device` current for this thread, while the engine may be capturing CUDA graphs in another one."""
    import torch

    with beside_captures(device.type), torch.cuda.device(device):
        yield
