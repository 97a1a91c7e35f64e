"""`lmcache top`, `lmcache completion` and `lmcache demo`; and that errors are sentences."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_process import Engine
from lmcache.cli import demo, top
from lmcache.cli.completion import words_of
from lmcache.cli.main import build_parser, main
from lmcache.cli.told import Told
from ports import free_port
from servers import PATIENCE, Server, eventually

TOKENS = list(range(160))


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache.wire.http_client.DEADLINE_SECONDS", PATIENCE)


def test_one_screen(
    server: Callable[..., Server],
    engine: Callable[..., Engine],
    folders: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = server(flags=("--l2", f"dir://{folders('/tmp')}/store"))
    one = engine(cache)
    one.store(TOKENS)
    assert one.hit_tokens(TOKENS) == len(TOKENS) and one.hit_tokens([7] * 160) == 0
    assert main(["top", "--once", "--url", f"http://127.0.0.1:{cache.http_port}"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "2 engine processes" in said
    assert re.search(r"lookups .* of which +50\.0% were found", said) and " in l1" in said
    assert "tokens a second: never_seen" in said and re.search(r"L1 +\[[#.]{30}\] +\d+% of 64 MiB, 10 chunks", said)
    assert re.search(r"^dir +.*; serving$", said, re.M)


def test_the_usage_of_each_model(
    server: Callable[..., Server], engine: Callable[..., Engine], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = server()
    url = f"http://127.0.0.1:{cache.http_port}"
    assert main(["kvcache", "usage", "--url", url]) == 0 and "L1 holds nothing." in capsys.readouterr().out
    one = engine(cache)
    one.store(TOKENS)
    assert main(["kvcache", "usage", "--url", url, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    (space,) = cache.status()["index"]["spaces"]
    assert (
        row["chunks"] == 10 and row["bytes"] == 10 * sum(space["shard_bytes"]) and row["model"] == space["model"] != ""
    )
    assert main(["kvcache", "usage", "--url", url]) == 0
    said = capsys.readouterr().out
    assert "10 chunks" in said and row["model"] in said
    assert main(["kvcache", "usage", "--url", url, "--tiers", "all"]) == 2


def test_the_rates_are_those_since_the_screen_before() -> None:
    def status(seconds: float, asked: float, found: float) -> dict[str, Any]:
        counters = {"requested_tokens_total": asked, 'lookup_tokens_total{source="l1"}': found}
        return {"uptime_seconds": seconds, "counters": counters, "version": "1"}

    lines = list(top.screen("u", status(12.0, 5000.0, 1500.0), status(10.0, 1000.0, 500.0)))
    assert re.search(r"lookups +2,000 tokens a second, of which +25\.0% ", lines[2]) and re.search(
        r" 500 in l1", lines[3]
    )
    lines = list(top.screen("u", status(2.0, 400.0, 0.0), status(10.0, 1000.0, 500.0)))
    assert re.search(r"lookups +200 tokens", lines[2]), "another server has begun"
    assert "does not tell" in lines[-1], "and an older one tells less"


def test_the_screen_of_a_terminal_refreshes_outlives_its_server_and_ends(server: Callable[..., Server]) -> None:
    cache = server()
    main_end, child_end = pty.openpty()
    command = [sys.executable, "-m", "lmcache.cli.main", "top", "--interval", "0.1"]
    child = subprocess.Popen(
        [*command, "--url", f"http://127.0.0.1:{cache.http_port}"], stdin=child_end, stdout=child_end, stderr=child_end
    )
    os.close(child_end)
    seen = ""

    def read_until(words: str, times: int = 1) -> None:
        nonlocal seen
        end = time.monotonic() + PATIENCE
        while seen.count(words) < times:
            assert time.monotonic() < end, seen[-2000:]
            if select.select([main_end], [], [], 1.0)[0]:
                seen += os.read(main_end, 65536).decode("utf-8", "replace")

    try:
        read_until("lookups", 3)
        assert seen.startswith("\x1b[?25l\x1b[H\x1b[2J")
        cache.end()
        read_until("Trying again")
        child.send_signal(signal.SIGINT)
        read_until("\x1b[?25h")
        assert child.wait(PATIENCE) == 0 and "Traceback" not in seen
    finally:
        child.kill()
        child.wait()
        os.close(main_end)


def test_a_screen_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((20, 5)))  # pytest asks, too
    top.paint(["x" * 100, "\x1b[31mred", *"abcdefgh"])
    lines = capsys.readouterr().out.split("\r\n")
    assert len(lines) == 5 and lines[0] == "\x1b[H" + "x" * 19 + "\x1b[K" and "\x1b[31m" not in lines[1]


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "lmcache.bash"
    script.write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        given = " ".join(f"'{word}'" for word in words)
        call = f"source {script}; COMP_WORDS=({given}); COMP_CWORD={len(words) - 1}; _lmcache; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", call], capture_output=True, text=True, check=True).stdout.split()

    assert completed("lmcache", "desc") == ["describe"]
    assert completed("lmcache", "tier", "re") == ["remove", "resume"]
    assert "--l1-size-gb" in completed("lmcache", "server", "--l1") and completed("lmcache", "describe", "f") == [
        "fetches"
    ]
    assert completed("lmcache", "completion", "")[:3] == ["bash", "zsh", "fish"]
    assert completed("lmcache", "ping", "--format", "") == ["json", "terminal"]
    assert completed("lmcache", "ping", "--format", "=") == completed("lmcache", "ping", "--format", "=", "")
    assert completed("lmcache", "ping", "--format", "=", "te") == ["terminal"], "bash makes three words of --format=te"
    assert not any(word.startswith("--hash-algorithm") for word in completed("lmcache", "server", "--")), (
        "it has no effect"
    )


@pytest.fixture
def zsh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[str], str]]:
    """Types into a real zsh and presses the tabulator key. Returns what the line is then."""
    if not shutil.which("zsh"):
        pytest.skip("zsh is not installed")
    assert main(["completion", "zsh"]) == 0
    (tmp_path / "lmcache.zsh").write_text(capsys.readouterr().out)
    line = tmp_path / "line"
    start = (
        "autoload -Uz compinit; compinit -u -D; source lmcache.zsh; "
        f'show() {{ print -r -- "$BUFFER" > {line}.new; mv {line}.new {line}; BUFFER= }}; '
        "zle -N show; bindkey '^Xt' show; PROMPT='wai''ting> '\r"
    )
    main_end, child_end = pty.openpty()
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "TERM": "xterm", "LC_ALL": "C.UTF-8"}
    child = subprocess.Popen(
        ["zsh", "-f", "-i"], stdin=child_end, stdout=child_end, stderr=child_end, cwd=tmp_path, env=environment
    )
    os.close(child_end)

    def typed(text: str) -> str:
        line.unlink(missing_ok=True)
        os.write(main_end, f"{text}\t\x18t".encode())
        eventually(lambda: drained() and line.exists())
        return line.read_text().removesuffix("\n")

    said = b""

    def drained() -> bool:
        nonlocal said
        while select.select([main_end], [], [], 0)[0]:
            said += os.read(main_end, 65536)
        return True

    try:
        os.write(main_end, start.encode())
        eventually(lambda: drained() and b"waiting> " in said)
        yield typed
    finally:
        child.kill()
        child.wait()
        os.close(main_end)


COMPLETIONS = {
    "lmcache desc": "describe",
    "lmcache tier rem": "remove",
    "lmcache server --l1-size-g": "--l1-size-gb",
    "lmcache ping --format term": "terminal",
    "lmcache ping --format=term": "--format=terminal",
    "lmcache kvcache usage --b": "--by",
    "lmcache kvcache usage --by t": "tenant",
    "lmcache completion z": "zsh",
}


def test_zsh_completes(zsh: Callable[[str], str]) -> None:
    for text, word in COMPLETIONS.items():
        assert zsh(text).split(" ")[-2:] == [word, ""], text
    assert zsh("lmcache server --hash-algo").endswith("--hash-algo"), "it has no effect"


def test_fish_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not shutil.which("fish"):
        pytest.skip("fish is not installed")
    assert main(["completion", "fish"]) == 0
    (tmp_path / "lmcache.fish").write_text(capsys.readouterr().out)

    def completed(text: str) -> list[str]:
        call = ["fish", "--no-config", "-c", f"source lmcache.fish; complete -C '{text}'"]
        environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
        assert not done.stderr
        return [line.partition("\t")[0] for line in done.stdout.splitlines()]

    for text, word in COMPLETIONS.items():
        assert completed(text) == [word], text
    assert completed("lmcache completion ") == ["bash", "fish", "zsh"], "and no files"
    assert completed("lmcache server --hash-algo") == [], "it has no effect"
    assert "lmcache.fish" in completed("lmcache config check "), "files, where a word may be one"
    assert completed("lmcache bench server --l1-size") == [], "flags of the verb alone, not of words like it"
    assert "server" in completed("lmcache ") and "lmcache.fish" not in completed("lmcache ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_verb_and_flag_is_in_the_script(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for words in words_of(build_parser()):
        assert words.verb in script and all(flag.lstrip("-") in script for flag in words.flags)
    (tmp_path / "script").write_text(script)
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert "`pip install vllm`" in capsys.readouterr().err


_NOT_VLLM = """#!{python}
# Answers like `vllm serve`, and says of itself what the connector would say.
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *said): pass
    def answer(self, content):
        self.send_response(200); self.end_headers(); self.wfile.write(content.encode())
    def do_GET(self): self.answer(json.dumps({{"data": [{{"id": "m"}}]}}))
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = [sum(asked["prompt"]) % 1000] * asked["max_tokens"]
        self.answer("data: " + json.dumps({{"id": "x", "choices": [{{"token_ids": ids}}]}}) + "\\n\\n")
port = int(sys.argv[sys.argv.index("--port") + 1])
print("Connected to the LMCache server\\n" * 2, flush=True)
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_the_demo_starts_asks_restarts_and_ends_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With something in vLLM's place that computes nothing, so nothing is found; tests/vllm has the real one."""
    stand_in = tmp_path / "vllm"
    stand_in.write_text(_NOT_VLLM.format(python=sys.executable))
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(demo, "find_spec", lambda name: "there")
    monkeypatch.setattr(demo, "_STORED_SECONDS", 0.1)
    assert main(["demo", "--model", "m", "--tokens", "300", "--l1-size-gb", "0.1"]) == 1
    said = capsys.readouterr().out
    assert said.count("starting ") == 2 and "after a restart of the engine, from LMCache" in said
    assert "0 tokens came from LMCache. The answers are the same in all rounds." in said
    assert not [one for one in Path("/proc").glob("[0-9]*/cmdline") if bytes(stand_in) in read_or_nothing(one)]


def read_or_nothing(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_errors_are_sentences(
    server: Callable[..., Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        (["status", "--url", f"http://127.0.0.1:{free_port()}"], "Connection refused: start `lmcache server`"),
        (["status", "--url", "http://[::1"], "must be like http://127.0.0.1:8080"),
        (["status", "--url", "::1:8080"], "must be like http://127.0.0.1:8080"),
        (["tier", "lst"], "lst: did you mean list?"),
        (["describe", "tier"], "tier: did you mean tiers?"),
        (["topp"], "topp: no such verb: did you mean top?"),
        (
            ["server", "--socket-dir", "/proc/x", "--port", "0", "--http-port", "0", "--l1-size-gb", "0.1"],
            "No such file or directory",
        ),
    ):
        try:
            assert main(words) in (1, 2)
        except SystemExit as ended:  # argparse's own errors
            assert ended.code == 2
        error = capsys.readouterr().err
        assert said in error and "Errno" not in error and "Traceback" not in error


def test_a_port_of_something_else_is_said_to_be_that(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    port = free_port()
    other = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    try:

        def told() -> str:
            main(["top", "--url", f"http://127.0.0.1:{port}"])
            error = capsys.readouterr().err
            return "" if "Connection refused" in error else error

        assert "answered 404, but not as LMCache does" in eventually(told)
    finally:
        other.terminate()
        other.wait()


def test_what_a_server_tells_is_a_number_only_if_it_can_be_reckoned_with() -> None:
    told = Told(json.loads('{"a": Infinity, "b": NaN, "c": [1, Infinity, 2.5], "d": 1' + "0" * 400 + "}"))
    assert [told.number(name) for name in "abd"] == [0.0, 0.0, 0.0] and told.missing == ["a", "b", "d"]
    assert told.numbers("c") == [1, 2.5]
