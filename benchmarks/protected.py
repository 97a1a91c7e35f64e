"""`python -m benchmarks.protected`: what it costs to protect bytes between two processes, by ways that pulls could use.

limit: two plain sockets over loopback TCP to a process of their own, nothing checked. ours: the same with a keyed BLAKE3 of each
shard at both ends, and with TLS 1.2 (AES-128-GCM). CURVE, which pulls use, is measured by `benchmarks.pulls`. Wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from blake3 import blake3

from benchmarks.rows import Goal, Row, report
from benchmarks.run import about

MIB = 1 << 20
SHARD, TOTAL, CONNECTIONS = 4 * MIB, 128 * MIB, 2
KEY, DIGEST_BYTES = bytes(32), 32
PLAIN, MAC, TLS = b"p", b"m", b"t"
WAYS = {MAC: "a keyed BLAKE3, not encrypted", TLS: "TLS 1.2 with AES-128-GCM"}


def send(certificate: str) -> None:
    """The other process: sends its share over each connection, in the way that the first byte names, whenever it is asked."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        one, _ = listener.accept()
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_serve, args=(one, certificate), daemon=True).start()


def _serve(one: socket.socket, certificate: str) -> None:
    way, shard = one.recv(1), memoryview(bytearray(os.urandom(SHARD)))
    if way == TLS:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        one = context.wrap_socket(one, server_side=True)
    while one.recv(1):
        for _ in range(TOTAL // CONNECTIONS // SHARD):
            if way == MAC:
                one.sendall(blake3(shard, key=KEY).digest())
            for at in range(0, SHARD, MIB):
                one.sendall(shard[at : at + MIB])


def connect(port: int, way: bytes) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", port))
    one.sendall(way)
    if way != TLS:
        return one
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # whom it talks to is not what is measured
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")
    return context.wrap_socket(one)


def receive(one: socket.socket, way: bytes) -> None:
    memory = memoryview(bytearray(SHARD))
    one.sendall(b"?")
    for _ in range(TOTAL // CONNECTIONS // SHARD):
        digest, seen, got, checked = b"", blake3(key=KEY), 0, 0
        while way == MAC and len(digest) < DIGEST_BYTES:
            digest += one.recv(DIGEST_BYTES - len(digest))
        while got < SHARD:
            got += one.recv_into(memory[got:], min(SHARD - got, MIB))
            if way == MAC and (got - checked >= MIB // 2 or got == SHARD):  # while it is in the core's cache
                seen.update(memory[checked:got])
                checked = got
        assert way != MAC or seen.digest() == digest


def rate(connections: list[socket.socket], way: bytes) -> float:
    """GB/s of one sample."""
    threads = [threading.Thread(target=receive, args=(one, way)) for one in connections]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return TOTAL / (time.perf_counter() - began) / 1e9


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.protected", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure there")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: does it work, not how fast is it")
    parser.add_argument("--send", metavar="CERTIFICATE", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.send:
        send(options.send)
    rows = {
        way: Row(f"protected_{way.decode()}", f"Bytes between processes, {what}", "GB/s", Goal(0.8, "more", 1.0))
        for way, what in WAYS.items()
    }
    with tempfile.TemporaryDirectory(prefix="lmbench-") as folder:
        certificate = f"{folder}/certificate.pem"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        subprocess.run([*command, "-keyout", certificate, "-out", f"{folder}/c"], check=True, capture_output=True)
        with open(certificate, "a") as file:
            file.write(Path(folder, "c").read_text())
        command = [sys.executable, "-m", "benchmarks.protected", "--send", certificate]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            try:
                assert child.stdout is not None
                port = int(child.stdout.readline())
                made = {way: [connect(port, way) for _ in range(CONNECTIONS)] for way in (PLAIN, *WAYS)}
                for round_ in range(3 if options.quick else 10):
                    limit = rate(made[PLAIN], PLAIN)
                    for way, row in rows.items():
                        found = rate(made[way], way)
                        if round_:
                            row.add("limit", [limit])
                            row.add("ours", [found])
            finally:
                child.kill()
    facts = about((), argv, "benchmarks.protected")
    if options.json:
        options.json.write_text(
            json.dumps({**facts, "rows": [row.as_json() for row in rows.values()]}, indent=1) + "\n"
        )
    print(report(facts, list(rows.values()), as_markdown=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
