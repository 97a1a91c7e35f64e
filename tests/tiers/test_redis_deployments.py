"""The Redis tier before Sentinels, with Redis's own TLS and client certificates, and in a cluster that fails over."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import valkey

from lmcache.errors import ConfigError
from lmcache.tiers import OK, Shard, Tier, TierError
from lmcache.tiers.adapters import url_of_adapter
from lmcache.tiers.registry import make_tier
from lmcache.tiers.url import parse_url
from ports import free_port
from servers import eventually
from stores import RedisServer, Sentinel, binary_of, freeze, load, shards_of, tier_of

pytestmark = pytest.mark.xdist_group("redis")
MIB = 1 << 20


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., Sentinel]]:
    running: list[Sentinel] = []

    def make(primary: RedisServer, password: str = "") -> Sentinel:
        folder = tmp_path / f"sentinel{len(running)}"
        folder.mkdir()
        running.append(Sentinel(primary.binary, folder, primary, password))
        return running[-1]

    yield make
    for one in running:
        one.end()


def serves(tier: Tier) -> bool:
    with contextlib.suppress(TierError):
        (shard,) = shards_of(1, 1000)
        return tier.store([shard]) == [OK] and load(tier, [shard]) == [OK]
    return False


def test_the_primary_that_sentinels_name_is_used_and_followed(
    start: Callable[..., RedisServer], watch: Callable[..., Sentinel], tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("wachter")
    secret.chmod(0o600)
    primary = start("--masterauth", "geheim", password="geheim")
    replica = start("--masterauth", "geheim", "--replicaof", "127.0.0.1", str(primary.port), password="geheim")
    sentinel = watch(primary, "wachter")
    eventually(lambda: sentinel.replicas() == 1)
    silent = free_port()  # the first Sentinel is gone
    hosts = f"127.0.0.1:{silent},127.0.0.1:{sentinel.port}"
    tier = tier_of(f"redis-sentinel://:geheim@{hosts}/kv/0?max_gb=1&sentinel_password_file={secret}")
    shards = shards_of(5, MIB)
    assert tier.store(shards) == [OK] * 5 and load(tier, shards) == [OK] * 5
    assert primary.raw.dbsize() == 12, "header and part of each, and the two keys of the accounting"
    eventually(lambda: _is_copied(primary, replica))
    sentinel.raw.execute_command("SENTINEL", "FAILOVER", "kv")
    eventually(lambda: sentinel.primary() == replica.port)
    eventually(lambda: serves(tier))
    primary.child.kill()
    primary.child.wait()
    eventually(lambda: serves(tier))
    assert load(tier, shards) == [OK] * 5
    tier.clear()
    assert replica.raw.dbsize() == 0
    tier.close()


def _is_copied(primary: RedisServer, replica: RedisServer) -> bool:
    with contextlib.suppress(valkey.exceptions.BusyLoadingError):
        return bool(replica.raw.dbsize() == primary.raw.dbsize())
    return False


def test_what_is_wrong_with_sentinels_is_named(
    start: Callable[..., RedisServer], watch: Callable[..., Sentinel]
) -> None:
    primary = start()
    sentinel, locked = watch(primary), watch(primary, "wachter")
    for url, reason, said in (
        (f"redis://127.0.0.1:{sentinel.port}/0?sentinel=vk", "refused", "knows no primary 'vk'; it knows: kv"),
        (f"redis://127.0.0.1:{primary.port}/0?sentinel=kv", "refused", "is no Sentinel: name a Sentinel, or leave out"),
        (f"redis://127.0.0.1:{sentinel.port}/0", "refused", r"write \?sentinel=NAME"),
        (f"redis://127.0.0.1:{locked.port}/0?sentinel=kv", "denied", "NOAUTH .*sentinel_password_file=FILE"),
    ):
        with pytest.raises(TierError, match=said) as caught:
            tier_of(url)
        assert caught.value.reason == reason


def test_sentinels_behind_a_silent_one_are_asked_in_time(
    start: Callable[..., RedisServer], watch: Callable[..., Sentinel]
) -> None:
    primary = start()
    silent, sentinel = watch(primary), watch(primary)
    freeze(silent.child.pid)
    tier = tier_of(f"redis-sentinel://127.0.0.1:{silent.port},127.0.0.1:{sentinel.port}/kv/0?timeout=20")
    assert serves(tier)
    tier.close()


@contextlib.contextmanager
def impostor(answer: bytes) -> Iterator[int]:
    """The port of a server that answers PING, and all that comes next with `answer`."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client, contextlib.suppress(ConnectionError):
                    for said in (b"+PONG\r\n", answer):
                        client.recv(1 << 16)
                        client.sendall(said)
                    while client.recv(1 << 16):
                        pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize(
    ("options", "answer", "said"),
    [
        ("sentinel=kv", b"*2\r\n$2\r\n\xff\xfe\r\n$4\r\n9999\r\n", "names a server that cannot be"),
        ("sentinel=kv", b"*2\r\n$1\r\nh\r\n$5\r\n99999\r\n", "names a server that cannot be"),
        ("cluster=yes", b"*1\r\n*3\r\n:0\r\n:1\r\n*2\r\n$1\r\nh\r\n:99999\r\n", "names a server that cannot be"),
        (
            "cluster=yes",
            b"*2000\r\n" + b"".join(b"*3\r\n:0\r\n:1\r\n*2\r\n$1\r\nh\r\n:%d\r\n" % port for port in range(1, 2001)),
            "names more nodes than a cluster can have",
        ),
        ("cluster=yes", b"*100\r\n" + (b"$1000000\r\n" + bytes(1_000_000) + b"\r\n") * 100, "does not speak Redis"),
        ("cluster=yes", b"*100\r\n" + (b"*100000\r\n" + b":1\r\n" * 100_000) * 20, "does not speak Redis"),
    ],
    ids=["no name", "no port", "no port of a node", "too many nodes", "too many bytes", "too many items"],
)
def test_whoever_is_asked_cannot_name_or_send_just_anything(options: str, answer: bytes, said: str) -> None:
    with impostor(answer) as port, pytest.raises(TierError, match=said) as caught:
        tier_of(f"redis://127.0.0.1:{port}/0?{options}&timeout=60")
    assert caught.value.reason == "protocol"


def test_a_slot_that_nobody_had_for_a_moment_is_found_again(start: Callable[..., RedisServer]) -> None:
    node = start(
        "--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--cluster-require-full-coverage", "no"
    )
    node.raw.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
    eventually(lambda: "cluster_state:ok" in _info(node))
    tier = tier_of(node.url("?cluster=yes"))
    shards = shards_of(60, 1000)
    assert tier.store(shards) == [OK] * 60
    node.raw.execute_command("CLUSTER", "DELSLOTSRANGE", 0, 8191)
    for said in ("Hash slot not served", "no node has slot"):  # the server's answer, and the map that is asked for then
        with pytest.raises(TierError, match=said):
            load(tier, shards)
    node.raw.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 8191)
    eventually(lambda: _loads(tier, shards) == [OK] * 60)
    tier.close()


@pytest.fixture
def certificates(tmp_path: Path) -> Callable[[str], Path]:
    """Files NAME.pem and NAME.key, signed by ca.pem."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=tmp_path)

    key = ("-newkey", "rsa:2048", "-nodes")
    openssl("req", "-x509", *key, "-days", "2", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem")
    (tmp_path / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")

    def make(name: str) -> Path:
        openssl("req", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signed = ("-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
        openssl("x509", *signed, "-days", "2", "-extfile", "names", "-out", f"{name}.pem")
        return tmp_path / f"{name}.pem"

    return make


@pytest.mark.xdist_group("debian")
def test_tls_of_redis_itself_with_a_certificate_of_the_client(
    tmp_path: Path, certificates: Callable[[str], Path]
) -> None:
    """`tls-auth-clients yes`, Redis's default, and an ACL user."""
    server_file, client_file, port = certificates("server"), certificates("client"), free_port()
    files = ("--tls-cert-file", str(server_file), "--tls-key-file", str(server_file.with_suffix(".key")))
    options = ("--tls-port", str(port), *files, "--tls-ca-cert-file", str(tmp_path / "ca.pem"))
    server = RedisServer(binary_of("redis"), tmp_path, *options)
    try:
        server.raw.execute_command("ACL", "SETUSER", "kv", "on", ">s3cret", "~{lmcache*", "+@all")
        url = f"rediss://kv:s3cret@localhost:{port}/0?ca_file={tmp_path / 'ca.pem'}"
        with pytest.raises(
            TierError, match=r"asks for a certificate of its clients: give one with \?cert_file="
        ) as caught:
            tier_of(url)
        assert caught.value.reason == "denied"
        key = client_file.with_suffix(".key")
        tier = tier_of(f"{url}&cert_file={client_file}&cert_key_file={key}")
        shards = shards_of(3, 5 * MIB)
        assert tier.store(shards) == [OK] * 3 and load(tier, shards) == [OK] * 3
        tier.close()
        for wrong, said in (
            (f"{url}&cert_key_file={key}", "cert_key_file needs cert_file"),
            (f"{url}&cert_file={client_file}&cert_key_file={tmp_path / 'none'}", "cannot use cert_file"),
            (f"redis://localhost:{port}/0?cert_file={client_file}", "is for rediss://"),
        ):
            with pytest.raises(ConfigError, match=said):
                make_tier(wrong)
    finally:
        server.end()


def test_a_cluster_whose_primary_dies_goes_on_with_its_replica(start: Callable[..., RedisServer]) -> None:
    nodes = [
        start("--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--cluster-require-full-coverage", "no")
        for _ in range(3)
    ]
    one, two, replica = nodes
    one.raw.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 8191)
    two.raw.execute_command("CLUSTER", "ADDSLOTSRANGE", 8192, 16383)
    for other in (two, replica):
        one.raw.execute_command("CLUSTER", "MEET", "127.0.0.1", other.port, other.bus_port)
    identity = one.raw.execute_command("CLUSTER", "MYID").decode()
    eventually(lambda: all(f"cluster_known_nodes:{len(nodes)}" in _info(node) for node in nodes))
    eventually(lambda: all("cluster_state:ok" in _info(node) for node in nodes))
    eventually(lambda: _accepts(replica, "CLUSTER", "REPLICATE", identity))
    tier = tier_of(two.url("?cluster=yes&max_gb=1"))
    shards = shards_of(60, 1000)
    assert tier.store(shards) == [OK] * 60
    eventually(lambda: _is_copied(one, replica))
    eventually(lambda: _accepts(replica, "CLUSTER", "FAILOVER"))
    eventually(lambda: replica.raw.info("replication")["role"] == "master")
    one.child.kill()
    one.child.wait()
    eventually(lambda: _loads(tier, shards) == [OK] * 60)
    assert serves(tier)
    tier.close()


def _loads(tier: Tier, shards: list[Shard]) -> list[str]:
    with contextlib.suppress(TierError):
        return load(tier, shards)
    return []


def _info(node: RedisServer) -> str:
    return bytes(node.raw.execute_command("CLUSTER", "INFO")).decode()


def _accepts(node: RedisServer, *words: str) -> bool:
    with contextlib.suppress(valkey.exceptions.ResponseError):
        return bool(node.raw.execute_command(*words))
    return False


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis-sentinel://a:1,b:2", "redis-sentinel://host:26379,host2:26379/NAME/0"),
        ("redis://a:1/0?sentinel=kv&cluster=yes", "a cluster has no Sentinels"),
        ("redis://a:1/0?sentinel=kv&also=b:x", "also"),
        ("redis://a:1/0?also=b:2", "need sentinel=NAME"),
    ],
)
def test_a_deployment_that_cannot_be_is_a_configuration_error(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_tier(url)


def test_a_url_of_sentinels_is_a_redis_url_with_options() -> None:
    found = parse_url("rediss-sentinel://u:${PW}@a:1,b,[::1]:3/kv/2?max_gb=1", {"PW": "x"})
    assert (found.scheme, found.username, found.password, found.host, found.port) == ("rediss", "u", "x", "a", 1)
    assert found.path == "/2" and found.options == {"sentinel": "kv", "also": "b,[::1]:3", "max_gb": "1"}
    assert url_of_adapter('{"type": "resp", "host": "h", "port": 1}').url == "redis://h:1/0"
