"""A real InfiniStore server in its TCP mode: `infinistore_server.py PORT GIB`. Its own program also needs a web framework and
the right to protect itself from being killed. It prints "ready", and ends with its standard input."""

from __future__ import annotations

import asyncio
import os
import sys
import threading


def main(port: int, gibibytes: int) -> None:
    import infinistore
    import uvloop

    config = infinistore.ServerConfig(service_port=port, manage_port=1, prealloc_size=gibibytes, log_level="error")
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    infinistore.register_server(loop, config)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    print("ready", flush=True)
    loop.run_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
