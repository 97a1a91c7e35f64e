"""The client process of a Mooncake Store: `python -m lmcache.tiers.mooncake.client TASK`. It ends with its server.

The store's own client has some 32 threads, takes its time-outs from the environment only and may block for minutes. Here it can
be ended at any time. It never sees the arena: values pass through memory that is only for them, so it writes into no extent.
"""

from __future__ import annotations

import ctypes
import mmap
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lmcache.runtime import RUNTIME
from lmcache.tiers.child import PACKET_BYTES, begin, listening
from lmcache.tiers.mooncake.words import BYE, Answer, Ask, State, decode_ask, decode_task, encode

_ABSENT = -704


class Verbs:
    """What a server can ask for. Each method returns one number for each key."""

    def __init__(self, store: Any, replicate: Callable[[], Any], address: int) -> None:
        self._store, self._replicate, self._address = store, replicate, address

    def exist(self, ask: Ask) -> Sequence[int]:
        """1, 0, or a negative number."""
        return list(self._store.batch_is_exist(ask.keys))

    def stored(self, ask: Ask) -> Sequence[int]:
        """The bytes of each value, or a negative number."""
        return [
            int(self._store.get_size(key)) if there == 1 else _ABSENT if there == 0 else there
            for key, there in zip(ask.keys, self._store.batch_is_exist(ask.keys), strict=True)
        ]

    def get(self, ask: Ask) -> Sequence[int]:
        """Bytes that were read, or a negative number."""
        return list(self._store.batch_get_into(ask.keys, self._pointers(ask), ask.sizes))

    def put(self, ask: Ask) -> Sequence[int]:
        """0 or a negative number. A value that is there stays."""
        return list(self._store.batch_put_from(ask.keys, self._pointers(ask), ask.sizes, self._config(ask)))

    def replace(self, ask: Ask) -> Sequence[int]:
        return list(self._store.batch_upsert_from(ask.keys, self._pointers(ask), ask.sizes, self._config(ask)))

    def remove(self, ask: Ask) -> Sequence[int]:
        """0 or a negative number, also of values that are leased."""
        return list(self._store.batch_remove(ask.keys, True))

    def remove_matching(self, ask: Ask) -> Sequence[int]:
        """The keys are regular expressions: how many values matched each."""
        return [int(self._store.remove_by_regex(key, True)) for key in ask.keys]

    def replicas(self, ask: Ask) -> Sequence[int]:
        """How many replicas each value has."""
        return [len(self._store.get_replica_desc(key)) for key in ask.keys]

    def _pointers(self, ask: Ask) -> list[int]:
        return [self._address + offset for offset in ask.at]

    def _config(self, ask: Ask) -> Any:
        config = self._replicate()
        config.replica_num = ask.replicas
        return config


def main(text: str) -> None:
    """Join the store, say so, and answer until the server ends."""
    task = decode_task(text)
    control = socket.socket(fileno=task.control)
    leave: list[Callable[[], object]] = []
    begin(task.parent, control, leave, BYE)
    try:
        from mooncake.store import MooncakeDistributedStore, ReplicateConfig
    except (ImportError, OSError) as error:
        control.send(encode(State(0, str(error) or type(error).__name__, [])))
        return
    store = MooncakeDistributedStore()
    code = store.setup(
        *(task.hostname, task.metadata, task.segment_bytes, 0, task.protocol, task.devices, task.master),
    )
    if code:
        control.send(encode(State(int(code), "", [])))
        return
    leave.append(store.close)
    memory = mmap.mmap(task.memory, task.memory_bytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if task.protocol != "tcp":  # TCP needs no registration, which other clients could use to write into this memory
        store.register_buffer(address, task.memory_bytes)
    verbs = Verbs(store, ReplicateConfig, address)
    threads = [
        RUNTIME.start(partial(_serve, socket.socket(fileno=lane), verbs), f"lmcache-lane{number}")
        for number, lane in enumerate(task.lanes)
    ]
    control.send(encode(State(0, "", listening())))
    for thread in threads:
        thread.join()


def _serve(lane: socket.socket, verbs: Verbs) -> None:
    """Answer the calls of one lane, one after another, until the server closes it."""
    while packet := lane.recv(PACKET_BYTES):
        ask = decode_ask(packet)
        try:
            answer = Answer(getattr(verbs, ask.verb)(ask), "")
        except Exception as error:  # belongs to whoever has asked
            answer = Answer([], f"{type(error).__name__}: {error}")
        lane.send(encode(answer))


if __name__ == "__main__":
    main(sys.argv[1])
