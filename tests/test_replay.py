"""Traces: a real server records what it does, and the replay of that trace counts what the server itself has counted."""

from __future__ import annotations

import json
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmcache.cache import Event, Heart
from lmcache.cache.table import Table
from lmcache.cli.main import main
from lmcache.server.loop import Loop
from lmcache.server.recording import Recording
from lmcache.sizing.readers import Trace
from lmcache.sizing.replay import POLICIES
from lmcache.sizing.trace import Lookup, Opened, restored, runs_of, shortened
from policies import TwoQueues
from servers import Raw, Server, eventually

CHUNK_BYTES = 64 << 10


def replayed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """What `lmcache replay --json` prints."""
    assert main(["replay", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error of a replay that is refused, in one line."""
    assert main(["replay", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def prompts(seed: int, count: int) -> list[bytes]:
    """Chunk hashes of prompts, many of which go on from an earlier one."""
    dice, made = random.Random(seed), [b""]
    for _ in range(count):
        begin = dice.choice(made[-12:]) if dice.random() < 0.7 else b""
        made.append(begin[: 16 * dice.randint(0, len(begin) // 16)] + dice.randbytes(16 * dice.randint(1, 6)))
    return made[1:]


def use(engine: Raw, prompt: bytes) -> int:
    """Look a prompt up and store what is missing, as engines do. Returns how many chunks were found."""
    found = engine.hits(prompt)
    if rest := prompt[16 * found :]:
        engine.store(rest, prompt[16 * (found - 1) : 16 * found] if found else b"")
    return found


def test_a_replay_counts_what_the_recorded_server_has_counted(
    server: Callable[..., Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    cache = server(l1=4, chunk=16, flags=("--record-trace", str(path)))
    engine = Raw(cache, shard_bytes=CHUNK_BYTES)
    asked = prompts(1, 300)
    found = [use(engine, one) for one in asked]
    counters = cache.counters()
    assert counters["evicted_chunks_total"] > 100 and sum(found) > 100
    use_of_all = sum(len(one) // 16 for one in asked)
    engine.close()
    assert cache.end() == 0  # which writes the rest

    told = replayed(capsys, str(path), "--l1-size-gb", str(4 / 1024))
    (result,) = told["results"]
    assert result["hit_blocks"] == sum(found) == counters["hit_chunks_total"]
    assert result["blocks"] == use_of_all and result["requests"] == len(asked)
    assert result["evicted_blocks"] == counters["evicted_chunks_total"]
    assert told["trace"]["recorded_block_hit_ratio"] == pytest.approx(sum(found) / use_of_all, abs=1e-5)
    assert told["trace"]["lost_events"] == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    sizes = replayed(capsys, str(path), "--l1-size-gb", "0.002,0.004,0.1")["results"]
    ratios = [one["token_hit_ratio"] for one in sizes]
    assert ratios == sorted(ratios) and ratios[0] < ratios[2]
    seen: set[bytes] = set()
    best = 0
    for one in asked:  # of a memory without an end
        keys = [one[at : at + 16] for at in range(0, len(one), 16)]
        best += next((at for at, key in enumerate(keys) if key not in seen), len(keys))
        seen.update(keys)
    assert sizes[2]["hit_blocks"] == best and not sizes[2]["evicted_blocks"]


def test_traces_of_others_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same five requests in each format: the second finds two blocks of the first, the fourth all of the third."""
    asked = [[1, 2, 3], [1, 2, 1 << 70], [5], [5], [7, -8]]
    files = {
        "mooncake": [
            {"timestamp": 100 * at, "input_length": 512 * len(ids), "output_length": 5, "hash_ids": ids}
            for at, ids in enumerate(asked)
        ],
        "logged": [
            {
                "timestamp": at,
                "chunk_hashes": [f"0x{one:x}" for one in ids],
                "chunk_size": 512,
                "seq_len": 512 * len(ids),
            }
            for at, ids in enumerate(asked)
        ],
        "csv": ["time,hashes", *(f"{at},{' '.join(map(str, ids))}" for at, ids in enumerate(asked))],
    }
    for name, lines in files.items():
        path = tmp_path / name
        path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
        (few, many) = replayed(capsys, str(path), "--capacity-blocks", "3,100", "--eviction-policy", "lru,default")[
            "results"
        ]
        assert (many["requests"], many["blocks"], many["hit_blocks"]) == (5, 10, 3), name
        assert many["token_hit_ratio"] == 0.3 and many["policy"] == "LRU" and many["capacity_blocks"] == 100
        assert few["hit_blocks"] == 3 and few["evicted_blocks"] > 0


def test_the_end_of_a_prompt_counts_as_many_tokens_as_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace"
    line = json.dumps({"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [1, 2]}) + "\n"
    path.write_text(2 * line)
    (result,) = replayed(capsys, str(path), "--capacity-blocks", "9")["results"]
    assert (result["tokens"], result["hit_tokens"], result["token_hit_ratio"]) == (1400, 700, 0.5)


MOONCAKE = '{"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2]}\n'
BAD = {
    "twice": (
        MOONCAKE + MOONCAKE.replace("[1, 2]", "[3, 3]"),
        "line 2: block 2 of the request has the hash of an earlier",
    ),
    "size": (
        MOONCAKE.replace("1024", "32"),
        "line 1: 32 tokens in blocks of 512 are 1 blocks, not 2: pass --block-tokens 16",
    ),
    "cut off": (MOONCAKE + MOONCAKE[:40], "line 2: "),
    "missing": (MOONCAKE + '{"timestamp": 1}\n', "line 2: Object missing required field `hash_ids`"),
    "other": ('{"requests": []}\n', "line 1: this is no trace that replay knows"),
    "text": ("hello\n", "line 1: 'hello' is no time"),
    "zipped": (b"\x1f\x8b\x08", "line 1: this is compressed: unpack it first"),
    "empty": ("", "no request in it: record for longer"),
    "newer": ('{"lmcache_trace": 9, "chunk_tokens": 16}\n', "line 1: this is format 9 of traces"),
    "no space": (
        '{"lmcache_trace": 1, "chunk_tokens": 16}\n{"t": 1, "lookup": 0, "hashes": ""}\n',
        "uses space 0 before",
    ),
    "answer": (
        '{"lmcache_trace": 1, "chunk_tokens": 16}\n{"t": 1, "replied": 0, "last": "", "tokens": 3}\n',
        "line 2: an answer has one hash",
    ),
    "hashes": (
        '{"lmcache_trace": 1, "chunk_tokens": 16}\n{"t": 1, "lookup": 0, "hashes": "12"}\n',
        "line 2: 1 bytes of hashes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_trace_is_an_error_with_file_line_and_remedy(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, (content, said) = tmp_path / "bad.jsonl", BAD[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused(capsys, str(path), "--capacity-blocks", "10")
    assert (str(path) in line and said in line) or (name == "no space" and said in line)


def test_wrong_flags_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace"
    path.write_text(MOONCAKE)
    assert "pass the sizes to try" in refused(capsys, str(path))
    assert "--eviction-policy FIFO: unknown; known: LRU" in refused(
        capsys, str(path), "--eviction-policy", "FIFO", "--capacity-blocks", "1"
    )
    assert "--capacity-blocks x: must be whole" in refused(capsys, str(path), "--capacity-blocks", "x")
    assert "pass one of the two" in refused(capsys, str(path), "--l1-size-gb", "1", "--capacity-blocks", "1")
    assert "pass --bytes-per-token" in refused(capsys, str(path), "--l1-size-gb", "1")
    assert "No such file" in refused(capsys, str(tmp_path / "none"), "--capacity-blocks", "1")
    assert "L1 has 0.1 MiB" in refused(capsys, str(path), "--l1-size-gb", "0.0001", "--bytes-per-token", "1000")


def test_a_trace_is_compared_with_another_or_a_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, prompts in (("one", ("a b c", "a b c")), ("other", ("a b c", "d e f"))):
        (tmp_path / name).write_text("".join(f"{at},{hashes}\n" for at, hashes in enumerate(prompts)))
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    told = replayed(capsys, one, "--against", other, "--capacity-blocks", "2,10")
    assert [row["token_hit_ratio"] for row in told["results"]] == [pytest.approx(1 / 3, abs=1e-6), 0.5]
    assert [row["token_hit_ratio"] for row in told["against"]] == [0, 0] and told["against_trace"]["requests"] == 2
    assert main(["replay", one, "--against", other, "--capacity-blocks", "10"]) == 0
    assert "LRU, 10 blocks: 50.00% of the tokens found, and 0.00%: +50.00 points" in capsys.readouterr().out
    monkeypatch.setitem(POLICIES, "Queues", lambda now: lambda shards: Table(shards, TwoQueues()))
    told = replayed(capsys, one, "--against", "queues", "--capacity-blocks", "2,10")
    assert [[row["policy"] for row in told[part]] for part in ("results", "against")] == [["LRU"] * 2, ["Queues"] * 2]
    assert "neither a file nor a policy" in refused(capsys, one, "--against", "fifo", "--capacity-blocks", "9")
    both = "--eviction-policy", "LRU,Queues", "--against", "Queues"
    assert "pass one --eviction-policy" in refused(capsys, one, *both, "--capacity-blocks", "9")


def test_hashes_are_shortened_and_runs_are_found() -> None:
    one, two, three = (bytes([at]) * 16 for at in (1, 2, 3))
    assert restored(shortened(one + two)) == bytes([1] * 8 + [0] * 8 + [2] * 8 + [0] * 8)
    assert list(runs_of(one + two + three, bytes(16) + one + one)) == [(b"", one + two), (one, three)]


def test_a_trace_keeps_within_its_size(server: Callable[..., Server], tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("what was here before\n")
    cache = server(l1=4, chunk=16, flags=("--record-trace", str(path), "--record-trace-mb", "1"))
    assert (tmp_path / "trace.jsonl.1").read_text() == "what was here before\n"
    engine, dice = Raw(cache), random.Random(2)
    sent = [dice.randbytes(16 * 500) for _ in range(200)]
    for one in sent:
        engine.hits(one)
    engine.close()
    assert cache.end() == 0
    sizes = [one.stat().st_size for one in tmp_path.iterdir()]
    assert len(sizes) == 2 and max(sizes) <= 512 << 10 and sum(sizes) > 512 << 10
    found = [one for one in Trace([tmp_path / "trace.jsonl.1", path]) if isinstance(one, Lookup)]
    last = [restored(shortened(one)) for one in sent[-len(found) :]]
    assert len(found) > 60 and [one.hashes for one in found] == last and all(one.found == 0 for one in found)


def test_a_trace_that_cannot_be_written_is_an_error_before_anything_is_created(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no folder" / "trace"):
        words = ["--l1-size-gb", "0.01", "--arena-dir", str(tmp_path), "--record-trace", str(path), "--port", "0"]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "lmcache.cli.main",
                "server",
                *words,
                "--http-port",
                "0",
                "--socket-dir",
                str(tmp_path),
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and f"--record-trace {path}: " in done.stderr, done.stderr
        assert not list(tmp_path.iterdir())


def test_recording_drops_what_it_cannot_write_and_says_so(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue is full, and then a disk: the server goes on, the losses are counted, and the trace tells them."""
    loop, heart = Loop(), Heart(1 << 20)
    heart.join(1, "engine")
    space = heart.open_space(1, b"f" * 16, 1, 0, 4096)
    gate = threading.Event()
    path = tmp_path / "trace"
    recording = Recording(loop, heart, path, 1 << 20, 16, "id", lambda number: "a model")

    def answered(hashes: bytes) -> None:
        heart.events.tell(Event("answered", space, len(hashes) // 16, hashes=hashes))

    try:
        monkeypatch.setattr("lmcache.server.aside.QUEUE_BYTES", 1000)
        with monkeypatch.context() as broken:
            broken.setattr(recording._aside, "_batch", lambda: gate.wait(60))
            for _ in range(5):
                answered(random.randbytes(16 * 20))
            assert recording.lost == 4
            gate.set()
        eventually(lambda: recording.recorded == 1)
        eventually(lambda: b'"lost":4' in path.read_bytes())
        with monkeypatch.context() as broken:
            broken.setattr(recording, "_append", lambda record: (_ for _ in ()).throw(OSError(28, "No space left")))
            answered(random.randbytes(16 * 20))
            eventually(lambda: recording.lost == 5)
        answered(b"x" * 16)
        eventually(lambda: recording.recorded == 2 and b'"lost":1' in path.read_bytes())
    finally:
        recording.close()
        loop.close()
    (opened,) = {one for one in Trace([path]) if isinstance(one, Opened)}
    assert opened == Opened(0, "a model", 16, 4096)


def test_a_plot_needs_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, drawn = tmp_path / "trace", tmp_path / "curve.svg"
    path.write_text(MOONCAKE)
    words = ["--capacity-blocks", "1,2", "--plot", str(drawn)]
    with monkeypatch.context() as absent:
        absent.setitem(sys.modules, "matplotlib", None)
        assert "pip install 'lmcache[plot]'" in refused(capsys, str(path), *words)
    pytest.importorskip("matplotlib")
    replayed(capsys, str(path), *words)
    assert b"<svg" in drawn.read_bytes()
