"""`lmcache bench engine` with an engine that a test holds in its hand; tests/vllm has the same with a real one."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lmcache.bench.workloads import WORKLOADS, Shape
from lmcache.cli.main import main
from ports import free_port
from servers import signed_by_itself


class StandIn:
    """Answers completions with tokens of its own, and keeps what it was asked. trouble: the request with this number fails."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.key = ""
        """What it wants as an API key; "": nothing."""
        self.keys = set[str | None]()
        self.prompts: list[list[int]] = []
        self.running = self.most_running = 0
        self.trouble = -1
        self.cached: int | None = 0
        self.with_ids = True
        self.event = b""
        """If there is one: all that is answered."""
        self.lock = threading.Lock()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *said: Any) -> None:
                """Nothing."""

            def do_GET(self) -> None:
                if self.path != "/metrics" and not self._refused():
                    self._send(200, {"data": [{"id": "m"}]})

            def _refused(self) -> bool:
                sent = self.headers["Authorization"]
                stand_in.keys.add(sent)
                wrong = bool(stand_in.key) and sent != f"Bearer {stand_in.key}"
                if wrong:
                    self._send(401, {"error": f"Incorrect API key provided: {sent}"})
                return wrong

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self._refused():
                    return
                with stand_in.lock:
                    stand_in.prompts.append(asked["prompt"])
                    stand_in.running += 1
                    stand_in.most_running = max(stand_in.most_running, stand_in.running)
                    number = len(stand_in.prompts)
                try:
                    if number == stand_in.trouble:
                        self._send(500, {"error": "out of memory"})
                    else:
                        self._stream(asked, number)
                finally:
                    with stand_in.lock:
                        stand_in.running -= 1

            def _send(self, status: int, content: Any) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _stream(self, asked: dict[str, Any], number: int) -> None:
                self.send_response(200)
                self.end_headers()
                if stand_in.event:
                    self.wfile.write(b"data: " + stand_in.event + b"\n\n")
                    return
                count = asked["max_tokens"]
                ids = {"token_ids": [7] * count} if stand_in.with_ids else {}
                details = (
                    {} if stand_in.cached is None else {"prompt_tokens_details": {"cached_tokens": stand_in.cached}}
                )
                for event in (
                    {"id": f"cmpl-{number}", "choices": [{"text": "x", **ids}]},
                    {"id": f"cmpl-{number}", "choices": [], "usage": {"completion_tokens": count, **details}},
                ):
                    self.wfile.write(f"data: {json.dumps(event)}\r\n\r\n".encode())
                self.wfile.write(b"data: [DONE]\n\n")

        self.server = ThreadingHTTPServer(("0.0.0.0" if tls else "127.0.0.1", 0), Handler)
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def engine() -> Iterator[StandIn]:
    one = StandIn()
    yield one
    one.close()


@pytest.fixture
def bench(engine: StandIn, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def call(*words: str, code: int = 0, text: bool = False) -> Any:
        assert (
            main(["bench", "engine", "--url", engine.url, "--tokens", "400", *words, *(() if text else ("--json",))])
            == code
        )
        said = capsys.readouterr()
        return said.out + said.err if text else json.loads(said.out)

    return call


def test_each_workload_is_sent_as_it_says(engine: StandIn, bench: Callable[..., Any]) -> None:
    found = bench("--requests", "8", "--concurrency", "2", "--seed", "5", "--output-tokens", "4")
    assert [row["workload"] for row in found["workloads"]] == [one.name for one in WORKLOADS]
    assert all(row["requests"] == 8 and not row["failures"] for row in found["workloads"])
    assert engine.most_running == 2 and len(engine.prompts) == 1 + 6 * 8
    sent = engine.prompts[1:]
    unique, repeat, prefix, chat, rag, agents = (sent[at : at + 8] for at in range(0, 48, 8))
    assert sorted(unique) == sorted(repeat) and len({tuple(one[:16]) for one in unique}) == 8
    assert len({tuple(one[:320]) for one in prefix}) == 1 and len({tuple(one) for one in prefix}) == 8
    for turns, shared in ((chat, 40), (agents, 240)):
        assert len({tuple(one[:shared]) for one in turns}) == 1
        longer = [one for one in turns if any(one[: len(other)] == other and len(one) > len(other) for other in turns)]
        assert len(longer) == 6, "each turn goes on from the one before"
        assert all(7 in one for one in longer), "with its answer"
    assert len({tuple(one[:50]) for one in rag}) == 1 and len({tuple(one) for one in rag}) == 8
    assert all(len(one) <= 400 + 4 * 4 for one in sent)


@pytest.mark.parametrize(
    "event",
    [
        b'{"choices": [1]}',
        b'{"choices": {"a": 1}}',
        b'{"usage": [1]}',
        b'{"usage": {"completion_tokens": 1e999}}',
        b"[" * 100_000,
    ],
    ids=lambda one: one[:30].decode(),
)
def test_an_answer_that_is_no_engines_is_an_error(engine: StandIn, bench: Callable[..., Any], event: bytes) -> None:
    engine.event = event
    assert "not the answer of an OpenAI-compatible engine" in bench(code=1, text=True)


def test_the_same_seed_sends_the_same(engine: StandIn, bench: Callable[..., Any]) -> None:
    for _ in range(2):
        bench("--workloads", "rag", "--requests", "4", "--seed", "9", "--concurrency", "1")
    assert engine.prompts[:5] == engine.prompts[5:]


def test_what_is_not_known_is_said(engine: StandIn, bench: Callable[..., Any]) -> None:
    engine.cached, engine.with_ids = None, False
    found = bench("--workloads", "chat", "--requests", "4")
    (row,) = found["workloads"]
    assert row["ttft_ms"]["samples"] == 4 and row["ttft_ms_with_hits"] is None and row["known_tokens"] == 0
    said = " ".join(found["unknown"])
    assert "--lmcache-url" in said and "--enable-prompt-tokens-details" in said and "ids of answers" in said
    engine.cached = 64
    found = bench("--workloads", "chat", "--requests", "4")
    assert found["workloads"][0]["ttft_ms_with_hits"]["samples"] == 4
    assert "--enable-prompt-tokens-details" not in " ".join(found["unknown"])
    text = bench("--workloads", "chat", "--requests", "4", text=True)
    assert "TTFT p50" in text and "not known: where hits came from" in text and "+-" in text


def test_requests_that_fail_are_counted_and_told(engine: StandIn, bench: Callable[..., Any]) -> None:
    engine.trouble = 3
    found = bench("--workloads", "unique", "--requests", "6", code=1)
    (row,) = found["workloads"]
    assert row["failures"] == {'HTTP 500: {"error": "out of memory"}': 1} and row["ttft_ms"]["samples"] == 5
    engine.trouble = len(engine.prompts) + 1
    assert "the first completion failed: HTTP 500" in bench(code=1, text=True)


def test_mistakes_are_one_line(bench: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--requests 0: must be from 1 to 100000" in bench("--requests", "0", code=2, text=True)
    assert "did you mean chat?" in bench("--workloads", "chatt", code=2, text=True)
    assert "must be like http://" in bench("--engine-url", "ftp://x", code=2, text=True)
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["bench", "engine", "--url", url]) == 1
    assert f"no engine answers at {url}/v1/models" in capsys.readouterr().err
    assert main(["bench", "--model", "huge"]) == 2


def test_conversations_are_made_as_they_are_asked_for() -> None:
    """A million conversations cost nothing before they begin."""
    for workload in WORKLOADS:
        conversation = workload.conversation(Shape(2000, 512, 1), 10**6)
        prompts = 0
        while conversation([1, 2]) is not None:
            prompts += 1
        assert prompts == workload.prompts


# --- over TLS, and with a key ------------------------------------------------------------------------------------------

KEY = "sk-a-key-that-nobody-may-see"


@pytest.fixture
def safe(tmp_path: Path) -> Iterator[tuple[StandIn, str]]:
    """An engine behind TLS that wants a key, and the file of its certificate."""
    context, certificate = signed_by_itself(tmp_path)
    one = StandIn(context)
    one.key = KEY
    yield one, str(certificate)
    one.close()


def key_file(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "api-key"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


QUICK = "--workloads", "unique", "--requests", "2", "--tokens", "64", "--json"


def test_an_engine_behind_tls_is_measured(
    safe: tuple[StandIn, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ca = safe
    words = "bench", "engine", "--url", engine.url, "--ca-file", ca, *QUICK
    assert main([*words, "--engine-key-file", key_file(tmp_path, KEY + "\n")]) == 0
    said = capsys.readouterr()
    assert KEY not in said.out + said.err and json.loads(said.out)["engine"] == engine.url
    assert engine.keys == {f"Bearer {KEY}"} and len(engine.prompts) == 3
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert main([*words]) == 0 and len(engine.prompts) == 6


@pytest.mark.parametrize(("host", "why"), [("127.0.0.1", "self-signed"), ("127.0.0.2", "mismatch")])
def test_a_certificate_that_is_not_trusted_is_refused(
    host: str, why: str, safe: tuple[StandIn, str], capsys: pytest.CaptureFixture[str]
) -> None:
    engine, ca = safe
    url = engine.url.replace("127.0.0.1", host)
    for model in ((), ("--model", "m")):  # the first call, and completions
        trusted = ("--ca-file", ca) if why == "mismatch" else ()
        assert main(["bench", "engine", "--url", url, *trusted, *model, *QUICK]) == 1
        said = capsys.readouterr().err
        assert "is not trusted" in said and why in said and "pass --ca-file FILE" in said, said
    assert not engine.keys, "nothing is sent before the certificate has been checked"


def test_the_wrong_scheme_is_named(
    safe: tuple[StandIn, str], engine: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "engine", "--url", engine.url.replace("http", "https"), *QUICK]) == 1
    assert f"pass --url {engine.url}" in capsys.readouterr().err
    assert main(["bench", "engine", "--url", safe[0].url.replace("https", "http"), *QUICK]) == 1
    said = capsys.readouterr().err
    assert "no engine answers at http://127.0.0.1" in said and f"if it speaks TLS, pass --url {safe[0].url}" in said, (
        said
    )


def test_no_error_contains_the_key(
    safe: tuple[StandIn, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ca = safe
    words = "bench", "engine", "--url", engine.url, "--ca-file", ca, *QUICK
    assert main([*words]) == 1
    said = capsys.readouterr().err
    assert "--engine-key-file" in said and "OPENAI_API_KEY" in said
    engine.key = "another"
    assert main([*words, "--model", "m", "--engine-key-file", key_file(tmp_path, KEY)]) == 1
    said = capsys.readouterr().err
    assert "Incorrect API key provided: Bearer ***" in said and KEY not in said
    for text, mode, why in (
        (KEY, 0o644, "chmod 600"),
        (f"{KEY}\n{KEY}", 0o600, "one API key, on one line"),
        ("", 0o600, "one API key, on one line"),
    ):
        assert main([*words, "--engine-key-file", key_file(tmp_path, text, mode)]) == 2
        said = capsys.readouterr().err
        assert why in said and KEY not in said
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\r\nX: y")
    assert main([*words]) == 2 and KEY not in capsys.readouterr().err
    monkeypatch.delenv("OPENAI_API_KEY")
    assert main(["bench", "engine", "--url", f"https://me:{KEY}@localhost"]) == 2
    assert KEY not in capsys.readouterr().err
    assert main(["bench", "engine", "--ca-file", str(tmp_path / "api-key")]) == 2
    assert "--ca-file" in capsys.readouterr().err
