"""A client of a Mooncake Store that knows nothing of ours, in a process of its own: it lends memory, and looks behind the tier.

It reads pickled (method, arguments) from stdin, and answers each on stdout. Arguments that are bytes are put into its buffer.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import sys
import time
from typing import Any

BUFFER_BYTES = 80 << 20


def main(master: str, segment_mib: int) -> None:
    from mooncake.store import MooncakeDistributedStore

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    store = MooncakeDistributedStore()
    code = store.setup("127.0.0.1", "P2PHANDSHAKE", segment_mib << 20, 0, "tcp", "", master)
    buffer = ctypes.create_string_buffer(BUFFER_BYTES)
    address = ctypes.addressof(buffer)

    def put(key: str, value: bytes) -> int:
        ctypes.memmove(address, value, len(value))
        return int(store.upsert_from(key, address, len(value))) if value else int(store.remove(key, True))

    def get(key: str) -> bytes | None:
        size = store.get_into(key, address, BUFFER_BYTES)
        return ctypes.string_at(address, size) if size >= 0 else None

    def seconds_to_put(keys: list[str], size: int) -> float:
        """Of one call, as fast as this client can."""
        began = time.perf_counter()
        if any(store.batch_put_from(keys, [address + at * size for at in range(len(keys))], [size] * len(keys))):
            raise RuntimeError("the store does not take a value")
        return time.perf_counter() - began

    def seconds_to_get(keys: list[str], size: int) -> float:
        began = time.perf_counter()
        got = store.batch_get_into(keys, [address + at * size for at in range(len(keys))], [size] * len(keys))
        if got != [size] * len(keys):
            raise RuntimeError("the store does not give a value")
        return time.perf_counter() - began

    ours = {"put": put, "get": get, "seconds_to_put": seconds_to_put, "seconds_to_get": seconds_to_get}
    answer: Any = code
    while True:
        pickle.dump(answer, answers)
        answers.flush()
        try:
            method, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            os._exit(0)
        answer = (ours.get(method) or getattr(store, method))(*arguments)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
