"""InfiniStore's own client in its TCP mode: `infinistore_own.py PORT SIZE COUNT`.

For each line on stdin it stores COUNT values of SIZE bytes, reads them back, deletes them, and prints the seconds of both.
"""

from __future__ import annotations

import os
import sys
import time


def main(port: int, size: int, count: int) -> None:
    import numpy as np
    from infinistore import TYPE_TCP, ClientConfig, InfinityConnection

    settings = {"host_addr": "127.0.0.1", "service_port": port, "connection_type": TYPE_TCP, "log_level": "error"}
    client = InfinityConnection(ClientConfig(**settings))
    client.connect()
    source = np.frombuffer(os.urandom(size), dtype=np.uint8)
    keys = [f"own{number}" for number in range(count)]
    for _ in sys.stdin:
        began = time.perf_counter()
        for key in keys:
            client.tcp_write_cache(key, source.ctypes.data, size)
        stored = time.perf_counter()
        for key in keys:
            if client.tcp_read_cache(key).nbytes != size:
                raise RuntimeError("another size came back")
        read = time.perf_counter()
        client.delete_keys(keys)
        print("seconds", stored - began, read - stored, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
