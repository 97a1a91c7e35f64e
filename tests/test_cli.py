"""The command line, as processes: exit codes, the one line of each mistake, and that a mistake leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

import lmcache
from lmcache.cli.describe import table
from lmcache.cli.main import main
from lmcache.config import ServerConfig
from lmcache.server import http_routes, http_sockets
from lmcache.server.http import HttpEndpoint
from lmcache.server.metrics import HELP
from ports import free_port
from servers import PATIENCE, READY, beside, eventually, key_file, server_parts, signed_by_itself, unresolved

SOURCE = Path(lmcache.__file__).parents[1]
TOKEN = "a-token-that-nobody-may-see"
get = partial(httpx.get, trust_env=False, timeout=PATIENCE)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of verbs that run in this process."""
    monkeypatch.setattr("lmcache.wire.http_client.DEADLINE_SECONDS", PATIENCE)
    monkeypatch.setattr(http_routes, "_CONTROL_SECONDS", PATIENCE)
    monkeypatch.setattr(http_sockets, "_REQUEST_SECONDS", PATIENCE)


def environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_")}
    return {**inherited, "PYTHONPATH": str(SOURCE), **more}


def lmcache_command(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lmcache.cli.main", *words]
    return subprocess.run(command, env=environment(**environ), capture_output=True, text=True, timeout=PATIENCE)


def answered(*words: str) -> str:
    """What a verb prints, once the server has answered it: on a busy machine its heart may miss a second."""
    result = eventually(lambda: (one := lmcache_command(*words)).returncode == 0 and one)
    return str(result.stdout)


class Server:
    """Just enough of a server behind a real HTTP endpoint."""

    healthy = True
    cleared = 0

    def health(self) -> tuple[bool, str]:
        return self.healthy, "" if self.healthy else "the heart has stopped"

    def status(self) -> dict[str, object]:
        return {
            "version": "0.1",
            "config": ServerConfig(api_token=TOKEN, port=6555).redacted(),
            "arena": {"bytes": 3 << 30, "used_bytes": 5 << 20, "spaces": {"one": 1234567}},
            "engines": [{"instance": "a", "pid": 12345, "endpoint": None}, {"instance": "bb", "rank": 1}],
            "sessions": [],
        }

    def refused(self) -> list[str]:
        return []

    def history(self) -> tuple[list[str], list[tuple[float, ...]]]:
        return ["time", "chunks"], [(1.5, 2.0), (11.5, 3.0)]

    def degraded(self) -> list[str]:
        return []

    def clear(self, tiers: str = "") -> dict[str, object]:
        self.cleared += 1
        return {"cleared_chunks": 3}

    def counters(self) -> dict[str, float]:
        return {}


@pytest.fixture
def server() -> Iterator[Server]:
    yield from _served("")


@pytest.fixture
def guarded() -> Iterator[Server]:
    yield from _served(TOKEN)


def _served(token: str) -> Iterator[Server]:
    one = Server()
    endpoint = HttpEndpoint(ServerConfig(http_port=0, api_token=token), one)
    endpoint.start()
    one.url = f"http://127.0.0.1:{endpoint.port}"  # type: ignore[attr-defined]
    yield one
    endpoint.stop()


def url_of(server: Server) -> str:
    url: str = server.url  # type: ignore[attr-defined]
    return url


# --- lmcache server: mistakes -----------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, folders: Callable[[str], Path]) -> list[str]:
    """Flags of a server that would start, on free ports and in folders that start out empty."""
    arena = tmp_path / "arena"
    arena.mkdir()
    words = ["--l1-size-gb", "0.01", "--port", "0", "--http-port", "0", "--http-host", "127.0.0.1"]
    return [*words, "--arena-dir", str(arena), "--socket-dir", str(folders("/tmp") / "sockets")]


def mistake(small: list[str], tmp_path: Path, *words: str, **environ: str) -> str:
    """Start a server that must not start; return its one line."""
    before = sorted(tmp_path.rglob("*"))
    result = lmcache_command("server", *small, *words, **environ)
    assert result.returncode == 2 and result.stdout == ""
    lines = [
        line for line in result.stderr.splitlines() if " WARNING " not in line and " INFO " not in line
    ]  # the log's
    assert len(lines) == 1 and ": error: " in lines[0], result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    return lines[0]


@pytest.mark.parametrize("flag", ["--port", "--http-port"])
def test_a_taken_port(small: list[str], tmp_path: Path, flag: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = str(listener.getsockname()[1])
        line = mistake(small, tmp_path, flag, taken)
    assert f"{flag} {taken}: taken" in line and f"such as {flag} " in line


def test_more_memory_than_there_is(small: list[str], tmp_path: Path, folders: Callable[[str], Path]) -> None:
    """Passing what the message says to pass is accepted: the next mistake is reported instead."""
    where = folders("/dev/shm")  # of its own: a start also says which memory of killed servers it has freed beside it
    shm = [*small, "--arena-dir", str(where)]
    line = mistake(shm, tmp_path, "--l1-size-gb", "100000")
    assert f"--l1-size-gb 100000: {where} has " in line and " of memory are available: pass --l1-size-gb " in line
    size = line.split("pass --l1-size-gb ")[1].split()[0]
    assert float(size) > 0


def test_other_mistakes(small: list[str], tmp_path: Path) -> None:
    assert "--eviction-policy FIFO: unknown; known: LRU" in mistake(small, tmp_path, "--eviction-policy", "FIFO")
    assert "did you mean --l1-size-gb?" in mistake(small, tmp_path, "--l1-sise-gb", "2")
    assert "--chunk-size: expected one argument" in mistake(small, tmp_path, "--chunk-size")
    assert "surplus: not expected after `lmcache server`" in mistake(small, tmp_path, "surplus")
    assert "LMCACHE_SERVER_MAX_WORKERS=0: must" in mistake(small, tmp_path, LMCACHE_SERVER_MAX_WORKERS="0")
    assert "--insecure-no-auth" in mistake(small, tmp_path, "--host", "0.0.0.0")
    assert "is not a directory" in mistake(small, tmp_path, "--arena-dir", str(tmp_path / "none"))
    path = tmp_path / "lmcache.yaml"
    path.write_text("l1-size-gb: 1\nchunk-sise: 16\n")
    assert f"{path}:2: unknown key 'chunk-sise': did you mean chunk-size?" in mistake(
        small, tmp_path, "--config", str(path)
    )


# --- lmcache server: serving ------------------------------------------------------------------------------------------


def test_a_server_from_start_to_end(small: list[str], tmp_path: Path) -> None:
    """It says that it runs when it serves, answers every verb, and a SIGTERM leaves nothing behind."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = [*small, "--http-port", str(port), "--api-token", TOKEN, "--chunk-size", "16"]
    log_path = tmp_path / "log"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lmcache.cli.main", "server", *words], env=environment(), stderr=log, stdout=log
        )
    try:
        eventually(lambda: process.poll() is not None or READY in log_path.read_text())
        assert process.poll() is None, log_path.read_text()
        eventually(lambda: get(url + "/healthcheck").json() == {"status": "healthy"})
        answered("ping", "--url", url)
        answered("clear", "--url", url)
        described = json.loads(answered("describe", "status", "--json", "--url", url))
        assert described["config"]["chunk-size"] == 16 and described["config"]["l1-size-gb"] == 0.01
        metrics = eventually(lambda: (answer := get(url + "/metrics")).status_code == 200 and answer.text)
        assert {name.split("{")[0] for name in described["counters"]} <= set(HELP)
        assert "lmcache_stored_chunks_total 0.0" in metrics
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    log_text = log_path.read_text()
    assert "reachable from this host only" in log_text
    assert "--api-token-file" in log_text and TOKEN not in log_text and TOKEN not in metrics + json.dumps(described)
    assert list((tmp_path / "arena").iterdir()) == []
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


# --- the other verbs --------------------------------------------------------------------------------------------------


def test_ping(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ping", "--url", url_of(server)]) == 0
    assert "is healthy" in capsys.readouterr().out
    server.healthy = False
    assert main(["ping", "--url", url_of(server)]) == 1
    assert "the heart has stopped" in capsys.readouterr().err


def test_nobody_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for words in (["ping"], ["clear"], ["describe", "status"]):
        assert main([*words, "--url", url]) == 1
        output = capsys.readouterr()
        assert output.err.count("\n") == 1 and f"no server at {url}" in output.err and "lmcache server" in output.err
    assert main(["ping", "--url", "ftp://x"]) == 2
    assert "--url ftp://x" in capsys.readouterr().err


def test_urls_of_other_ports_are_said_to_be_that(
    server: Server, folders: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server_parts(folders, 1 << 20) as (_, port), server_parts(folders, 1 << 20, key_file(tmp_path)) as (_, keyed):
        for url in (f"http://127.0.0.1:{port}", f"http://127.0.0.1:{keyed}", f"https://127.0.0.1:{port}"):
            for words in (["ping"], ["clear"], ["describe", "status"], ["bench"]):
                assert main([*words, "--url", url]) == 1
                output = capsys.readouterr()
                assert output.err.count("\n") == 1 and f"{url} is an engines' port (ZMQ)" in output.err
                assert "pass --url with the --http-port" in output.err
    url = url_of(server).replace("http:", "https:")
    assert main(["ping", "--url", url]) == 1
    assert f"{url} speaks HTTP without TLS: pass --url {url_of(server)}" in capsys.readouterr().err


def test_verbs_need_no_resolver_for_loopback_and_name_a_host_that_has_no_address(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    assert main(["ping", "--url", url_of(server).replace("127.0.0.1", "localhost")]) == 0
    for verb in (["ping"], ["bench"]):
        assert main([*verb, "--url", "http://no.such.host:8080"]) == 1
        assert "host 'no.such.host' does not resolve: Name or service not known" in capsys.readouterr().err


def test_a_silent_peer_costs_the_deadline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("lmcache.wire.http_client.DEADLINE_SECONDS", 0.2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert main(["ping", "--url", url]) == 1
    said = capsys.readouterr().err
    assert f"{url} accepts connections, but there was no answer within 0.2 s: " in said and "no server" not in said


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 503 no\r\n\r\n" + json.dumps({"reason": "\x1b[2J" + "x" * 50_000}).encode(),
        b"\x1b[2J" + b"x" * 50_000 + b"\r\n",
    ],
    ids=["a reason", "no HTTP"],
)
def test_what_a_stranger_answers_is_shown_cut_and_without_control_characters(
    answer: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve() -> None:
        for _ in range(1 + answer.startswith(b"\x1b")):  # what is no HTTP is looked at once more
            client, _ = listener.accept()
            with client:
                client.recv(4096)
                client.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        served = beside(serve)
        assert main(["ping", "--url", f"http://127.0.0.1:{listener.getsockname()[1]}"]) == 1
        served.result(PATIENCE)
    said = capsys.readouterr().err
    assert "?[2J" in said and said.rstrip("\n").isprintable() and len(said) < 5000


@pytest.mark.parametrize(
    "begin",
    [
        b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 503 no\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\n\r\n",
    ],
    ids=["a header", "an answer", "an error", "a redirect"],
)
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_an_answer_in_drops_does_not_stretch_the_deadline(
    begin: bytes, tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if tls:
        context, certificate = signed_by_itself(tmp_path)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr("lmcache.wire.http_client.DEADLINE_SECONDS", 1.0)
    stop = threading.Event()

    def drip() -> None:
        client, _ = listener.accept()
        if tls:
            client = context.wrap_socket(client, server_side=True)
        with client, contextlib.suppress(OSError):
            client.recv(4096)
            client.sendall(begin)
            while not stop.wait(0.02):
                client.sendall(b"a")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"{'https' if tls else 'http'}://localhost:{listener.getsockname()[1]}"
        dripping = beside(drip)
        try:
            assert beside(lambda: main(["ping", "--url", url])).result(PATIENCE) == 1
        finally:
            stop.set()
        dripping.result(PATIENCE)
    assert f"{url} accepts connections, but there was no answer within 1 s: " in capsys.readouterr().err


def test_clear(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clear", "--url", url_of(server)]) == 0
    assert f"L1 of {url_of(server)} is empty now" in capsys.readouterr().out and server.cleared == 1


def test_clear_says_what_is_not_empty(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared = {"cleared_chunks": 3, "cleared_tiers": ["disk"], "failed_tiers": {"redis": "Connection refused"}}
    monkeypatch.setattr(server, "clear", lambda tiers: cleared)
    assert main(["clear", "--tiers", "all", "--url", url_of(server)]) == 1
    output = capsys.readouterr()
    assert "tier redis was not emptied: Connection refused" in output.err and "is empty now" not in output.out
    cleared.pop("failed_tiers")
    assert main(["clear", "--tiers", "disk", "--url", url_of(server)]) == 0
    assert capsys.readouterr().out.startswith(f"{url_of(server)} is empty now")


def test_emptying_tiers_may_take_longer_than_an_answer(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline of an answer is over before there can be one."""
    monkeypatch.setattr("lmcache.wire.http_client.DEADLINE_SECONDS", 1e-6)
    assert main(["clear", "--url", url_of(server)]) == 1
    assert "no answer within 1e-06 s" in capsys.readouterr().err
    assert main(["clear", "--tiers", "all", "--url", url_of(server)]) == 0


def test_clear_with_a_token_file(guarded: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "token"
    path.write_text("wrong-wrong-wrong-wrong")
    path.chmod(0o600)
    words = ["clear", "--url", url_of(guarded), "--api-token-file", str(path)]
    assert main(words) == 1 and "the token is not the server's" in capsys.readouterr().err
    path.write_text(TOKEN + "\n")
    assert main(words) == 0 and guarded.cleared == 1
    path.chmod(0o644)
    assert main(words) == 2 and f"chmod 600 {path}" in capsys.readouterr().err


def test_describe(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "server", "--url", url_of(server)]) == 0
    text = capsys.readouterr().out
    assert "6555" in text and "***" in text and TOKEN not in text and "ARENA" not in text
    assert main(["describe", "status", "--url", url_of(server), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arena"]["bytes"] == 3 << 30


def test_the_table_shows_no_control_characters(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2J\x1b]0;title\x07\r\n\u202e"
    answer = {evil: evil, "part": {evil: {evil: [evil]}}, "rows": [{evil: evil}, evil], "tiers": [evil]}
    monkeypatch.setattr(server, "status", lambda: answer)
    monkeypatch.setattr(server, "clear", lambda tiers: {evil: evil})
    for words in (["describe", "status"], ["describe", "tiers"], ["clear", "--tiers", "all"]):
        assert main([*words, "--url", url_of(server)]) == 0
        shown = capsys.readouterr().out
        assert "?[2J" in shown and all(line.isprintable() for line in shown.split("\n"))
    assert main(["describe", "status", "--json", "--url", url_of(server)]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown) == answer and all(line.isprintable() for line in shown.split("\n"))


def test_the_table() -> None:
    lines = [line.rstrip() for line in table(Server().status())]
    assert "  version  0.1" in lines
    assert any(line.split() == ["bytes", "3.00", "GiB"] for line in lines)
    assert any(line.split() == ["used_bytes", "5.0", "MiB"] for line in lines)
    assert any(line.split() == ["spaces.one", "1,234,567"] for line in lines)
    at = lines.index("ENGINES (2)")
    assert lines[at + 1].split() == ["instance", "pid", "endpoint", "rank"]
    assert lines[at + 2].split() == ["a", "12345", "-", "-"]
    assert "SESSIONS (0)" in lines


def test_config_check(tmp_path: Path) -> None:
    path = tmp_path / "lmcache.yaml"
    path.write_text("l1-size-gb: 20\nport: 6555\napi-token: ${MY_TOKEN}\n")
    environ = {"MY_TOKEN": TOKEN, "LMCACHE_SERVER_PORT": "7555"}
    result = lmcache_command("config", "check", str(path), **environ)
    rows = [line.split() for line in result.stdout.splitlines()]
    assert result.returncode == 0 and TOKEN not in result.stdout
    assert ["l1-size-gb", "20", f"{path}:1"] in rows
    assert ["port", "7555", "LMCACHE_SERVER_PORT"] in rows
    assert ["api-token", "***", f"{path}:3"] in rows
    assert ["chunk-size", "256", "default"] in rows
    assert ["l2-queue-gb", "half", "of", "L1", "default"] in rows
    path.write_text("chunk-size: 0\n")
    result = lmcache_command("config", "check", str(path))
    assert result.returncode == 2 and f"{path}:1: chunk-size: 0" in result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("l2: ['disk:///d?max_gb=abc']", "max_gb"),
        ("l2:\n  - 'redis://:${NOT_SET_ANYWHERE}@h'", "${NOT_SET_ANYWHERE} is not set"),
        ("max_local_cpu_size: 1\nremote_url: 'redis://h?max_gbb=3'", "unknown option 'max_gbb'"),
    ],
)
def test_config_check_reads_tiers_as_their_server_would(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "lmcache.yaml"
    path.write_text(text + "\n")
    result = lmcache_command("config", "check", str(path))
    assert result.returncode == 2 and words in result.stderr and str(path) in result.stderr
    assert result.stderr.count("\n") == 1


def test_version_and_help() -> None:
    assert lmcache_command("--version").stdout == f"lmcache {lmcache.__version__}\n"
    for verb in ("server", "ping", "describe", "clear", "config", "bench"):
        text = lmcache_command(verb, "--help").stdout
        assert "examples:" in text and f"lmcache {verb}" in text
    assert "GiB (2^30 bytes)" in lmcache_command("server", "--help").stdout
    assert lmcache_command("sever").returncode == 2


def test_starting_is_light() -> None:
    """What a mistake or --help must not wait for is not imported before the settings are read."""
    code = "import sys, lmcache.cli.main as m; m.build_parser(); print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"yaml", "zmq", "starlette", "uvicorn", "numpy", "prometheus_client"} & set(modules)
