"""Child processes for libraries that this process cannot be trusted to: those that crash, hang, or start threads of their own.

Both sides talk over sequenced-packet sockets, one message a packet. A child ends with its parent, whatever either of them does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from lmcache.runtime import RUNTIME

PACKET_BYTES = 192 << 10
"""No packet is larger; the kernel's default buffers take it."""
_PR_SET_PDEATHSIG = 1
_LISTENS = "0A"
"""State of a listening socket in /proc/net/tcp."""


# The parent


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets, for the parent and for the child."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def start(
    module: str, task: bytes, descriptors: Sequence[int], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start `python -m module task`, which inherits these descriptors. The child ends with the *thread* that calls this.

    Raises:
        OSError: it cannot be started.
    """
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-m", module, task.decode()],
        env={**environment, "PYTHONPATH": paths},
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd="/",  # python -m looks for modules in its working directory first
    )


def end(child: subprocess.Popen[bytes], seconds: float, sockets: Sequence[socket.socket]) -> bool:
    """Kill the child, and end calls of other threads on these sockets. Return whether the kernel has removed it within so many
    seconds: from then on it touches no memory."""
    child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(seconds)
    for one in sockets:
        hang_up(one)
    return child.returncode is not None


def hang_up(one: socket.socket) -> None:
    """End all calls on this socket, in whatever thread; the descriptor closes with the object."""
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)


# The child


def begin(
    parent: int, last: socket.socket | None = None, leave: Sequence[Callable[[], object]] = (), bye: bytes = b""
) -> None:
    """Make this process end with its parent. last: a socket on which the parent says nothing but `bye`; when it does, or has
    gone, `leave` (a list of functions that may still grow) is called before the end, or not."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ctrl-C reaches all processes of a terminal; the server says when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if last is not None:
        RUNTIME.start(partial(_end_with_the_parent, last, leave, bye), "lmcache-server-watch")
    if os.getppid() != parent:
        os._exit(0)


def _end_with_the_parent(last: socket.socket, leave: Sequence[Callable[[], object]], bye: bytes) -> None:
    if last.recv(PACKET_BYTES) == bye:
        for call in leave:
            call()
    os._exit(0)


def listening() -> list[str]:
    """Return `host:port` of each TCP socket on which this process listens."""
    inodes, found = set[str](), []
    for link in Path("/proc/self/fd").iterdir():
        try:
            inodes.add(os.readlink(link))
        except OSError:
            continue  # the descriptor of the folder itself
    for file, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        table = Path("/proc/self/net", file)
        for line in table.read_text().splitlines()[1:] if table.exists() else []:  # a kernel may have no IPv6
            fields = line.split()
            if fields[3] == _LISTENS and f"socket:[{fields[9]}]" in inodes:
                host, _, port = fields[1].partition(":")
                raw = b"".join(bytes.fromhex(host[at : at + 8])[::-1] for at in range(0, len(host), 8))
                name = socket.inet_ntop(family, raw)
                found.append(f"[{name}]:{int(port, 16)}" if ":" in name else f"{name}:{int(port, 16)}")
    return sorted(found)
