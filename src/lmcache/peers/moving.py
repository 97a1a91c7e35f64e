"""A mover: `python -m lmcache.peers.moving TASK`, a child process that reads from the arenas of other servers by NIXL, or lets
their movers read from the arena of its own server. It ends with its server.

UCX asks nobody for credentials: who reaches its sockets may read what the process has mapped, and write to what it may write to.
So a mover has nothing but the arena, and one that only lends maps it read-only.
"""

from __future__ import annotations

import logging
import mmap
import os
import select
import socket
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from lmcache.peers.mover_words import (
    Ended,
    Failed,
    Forget,
    Meeting,
    Read,
    Ready,
    Serve,
    decode_task,
    decode_told,
    encode,
)
from lmcache.runtime import RUNTIME
from lmcache.tiers.child import PACKET_BYTES, begin, listening

_BUSY_SECONDS, _IDLE_SECONDS = 0.00005, 0.1
"""Between two looks at what UCX has to do."""


class Nixl:
    """One agent of NIXL. library: `nixl_cu12._api`. address: of the arena in this process. say: tells the server something."""

    def __init__(self, library: Any, address: int, size: int, say: Callable[[Ended | Failed], None]) -> None:
        # Without a thread of its own for progress, which takes a fifth of a core while there is nothing to do.
        config = library.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self._agent = library.nixl_agent(os.urandom(16).hex(), config)
        self._address, self._say = address, say
        self._agent.register_memory([(address, size, 0, "")], "DRAM")
        self.description: bytes = self._agent.get_agent_metadata()
        self._others: dict[bytes, str] = {}
        self._forgotten: set[bytes] = set()
        """Of the others, those that are forgotten when no read is under way from them."""
        self._reads: dict[int, tuple[bytes, Any]] = {}
        """The number of each read -> from whom, and NIXL's handle."""
        self._serves = False

    @property
    def is_busy(self) -> bool:
        return self._serves or bool(self._reads)

    def told(self, message: Meeting | Forget | Read | Serve) -> None:
        """Do what the server says."""
        if isinstance(message, Serve):
            self._serves = message.on
        elif isinstance(message, Read):
            self._read(message)
        elif isinstance(message, Forget):
            self._forgotten.add(message.name)
        else:
            try:
                other = self._agent.add_remote_agent(message.agent)
            except Exception as error:  # NIXL raises many kinds; reads from there will fail
                _log(f"a mover cannot be read from: {_words(error)}")
                return
            self._others[message.name] = other.decode() if isinstance(other, bytes) else other

    def look(self) -> None:
        """Let UCX work, and tell the server which reads have ended."""
        self._agent.get_new_notifs()
        for number, (_, handle) in list(self._reads.items()):
            self._note(number, self._agent.check_xfer_state, handle)
        for name in self._forgotten - {name for name, _ in self._reads.values()}:
            self._forgotten.discard(name)
            other = self._others.pop(name, None)
            if other is not None and other not in self._others.values():  # it may have been met once more meanwhile
                self._agent.remove_remote_agent(other)

    def _read(self, read: Read) -> None:
        agent, other = self._agent, self._others.get(read.name)
        if other is None:
            self._say(Ended(read.number, "the other server's mover is not known"))
            return
        here, there, sizes = np.array(read.parts, np.uint64).reshape(-1, 3).T
        device = np.zeros(len(sizes), np.uint64)
        local = agent.get_xfer_descs(np.stack([here + np.uint64(self._address), sizes, device], 1), "DRAM")
        remote = agent.get_xfer_descs(np.stack([there, sizes, device], 1), "DRAM")
        try:
            handle = agent.initialize_xfer("READ", local, remote, other)
        except Exception as error:  # nothing has been read yet
            self._say(Ended(read.number, _words(error)))
            return
        self._reads[read.number] = read.name, handle
        self._note(read.number, agent.transfer, handle)

    def _note(self, number: int, ask: Callable[[Any], str], handle: Any) -> None:
        """Note how a read does. If it has failed this process ends, since other parts of it may still arrive."""
        try:
            state = ask(handle)
        except Exception as error:  # NIXL raises many kinds
            state = _words(error)
        if state == "PROC":
            return
        if state != "DONE":
            self._say(Failed(number, state))
            os._exit(1)
        del self._reads[number]
        self._agent.release_xfer_handle(handle)
        self._say(Ended(number, ""))


def _say(control: socket.socket, said: Ended | Failed) -> None:
    control.send(encode(said))


def _log(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def main(text: str) -> None:
    """Open NIXL, say so, and do what the server says until it ends."""
    task = decode_task(text)
    begin(task.parent)
    control = socket.socket(fileno=task.control)
    logging.disable()  # NIXL's of what it has opened
    try:
        import nixl_cu12._api as library
    except (ImportError, OSError) as error:
        control.send(encode(Ready(f"not installed: {error}"[:500])))
        return
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if task.writes else 0)
    memory = mmap.mmap(task.memory, task.memory_bytes, mmap.MAP_SHARED, protection)
    os.close(task.memory)
    address = int(np.frombuffer(memory, np.uint8).ctypes.data)
    try:
        nixl = Nixl(library, address, task.memory_bytes, lambda said: _say(control, said))
    except Exception as error:
        control.send(encode(Ready(_words(error))))
        return
    control.send(encode(Ready("", nixl.description, address, listening())))
    poll = select.epoll()
    poll.register(control, select.EPOLLIN)
    while True:
        nixl.look()
        if nixl.is_busy and not (arrived := RUNTIME.poll(poll, 0)):
            RUNTIME.sleep(_BUSY_SECONDS)  # shorter than the millisecond of a poll
        elif not nixl.is_busy:
            arrived = RUNTIME.poll(poll, _IDLE_SECONDS)
        while arrived:
            packet = control.recv(PACKET_BYTES)
            if not packet:
                return
            nixl.told(decode_told(packet))
            arrived = RUNTIME.poll(poll, 0)


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)
