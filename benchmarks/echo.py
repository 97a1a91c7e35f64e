"""The smallest Python server there can be on a Unix socket: what a lookup costs when nothing but the dictionary is in it.

`python -m benchmarks.echo PATH [KEYS]` answers frames (u32 length, payload). Without KEYS a frame comes back as it is; with
it, the payload is 16-byte keys, of which KEYS that `limits.make_keys` also makes are known, and the answer is 4 bytes a key.
"""

from __future__ import annotations

import selectors
import socket
import struct
import sys

LENGTH = struct.Struct("<I")


def make_keys(count: int) -> list[bytes]:
    """`count` different 16-byte keys, the same in every process."""
    return [number.to_bytes(8, "little") * 2 for number in range(count)]


def receive(connection: socket.socket) -> bytes | None:
    """One frame's payload, or None at the end of the stream."""
    data = connection.recv(1 << 18)
    if not data:
        return None
    (length,) = LENGTH.unpack_from(data)
    while len(data) < length + 4:
        data += connection.recv(1 << 18)
    return data[4:]


def send(connection: socket.socket, payload: bytes) -> None:
    connection.sendall(LENGTH.pack(len(payload)) + payload)


def serve(path: str, keys: int) -> None:
    """Answer all connections until the parent ends this process."""
    index = {key: number for number, key in enumerate(make_keys(keys))}
    selector = selectors.DefaultSelector()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        selector.register(listener, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for ready, _ in selector.select():
                if ready.fileobj is listener:
                    selector.register(listener.accept()[0], selectors.EVENT_READ)
                    continue
                connection = ready.fileobj
                assert isinstance(connection, socket.socket)
                asked = receive(connection)
                if asked is None:
                    selector.unregister(connection)
                    connection.close()
                elif index:
                    found = [index.get(asked[at : at + 16], 0) for at in range(0, len(asked), 16)]
                    send(connection, struct.pack(f"<{len(found)}I", *found))
                else:
                    send(connection, asked)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
