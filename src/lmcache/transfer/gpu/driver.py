"""Direct access to the GPU's driver, CUDA's or HIP's, without PyTorch."""

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
"""Maps "is HIP" to the library's names, the functions that launch a copy (in the order of `Driver.functions`), and the function
that sets a thread's capture mode."""
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal


class Driver:
    """The driver's library.

    functions: addresses of launch, upload, download, record and wait, as `Launcher` takes them.

    Raises:
        OSError, AttributeError: the library, or a function in it, does not exist.
    """

    def __init__(self, hip: bool) -> None:
        names, *functions, exchange = _NAMES[hip]
        library = _library(names)  # is never unloaded, so the addresses stay valid
        self._exchange = getattr(library, exchange)
        self.functions = tuple(ctypes.cast(getattr(library, one), ctypes.c_void_p).value or 0 for one in functions)

    @contextmanager
    def beside_captures(self) -> Iterator[None]:
        """Keep the thread's work out of other threads' captures; see the function of that name."""
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
    """Return the driver; None, after a warning in the log, where its library or a function is missing."""
    try:
        return Driver(hip)
    except (OSError, AttributeError) as error:
        logger.warning(
            "Cannot call the GPU's driver: copies take more CPU time, and can make graph captures fail: %s", error
        )
        return None


def beside_captures(device: str) -> AbstractContextManager[None]:
    """Return a context for a thread that uses a GPU while another thread may be capturing CUDA graphs; empty for a CPU.

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
