"""The measurements of `lmcache bench`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import random
import time
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmcache.bench.engine import BenchEngine, Model
from lmcache.bench.samples import Figure, align, figure
from lmcache.config.hosts import in_url
from lmcache.errors import ConfigError, ServerRefused
from lmcache.wire.http_client import DEFAULT_URL, ask

MODELS = {
    "small": Model("small", 4, 2, 64, blocks=1024),
    "mid": Model("mid", 16, 4, 128, blocks=1024),
    "big": Model("big", 32, 8, 128, blocks=512),
}
_VOCABULARY = 150_000
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the printed table."""

    what: str
    unit: str
    figure: Figure


def report(options: argparse.Namespace, token: str) -> str:
    """Measure and return a table, or JSON. token: of the server's HTTP endpoint.

    Raises:
        ConfigError: a number is too small, or the URL is not valid.
        ServerUnavailable: no server answers.
    """
    if options.threads < 1 or options.rounds < 1:
        raise ConfigError(f"--threads {options.threads} --rounds {options.rounds}: both must be at least 1")
    status = _status(options.url, token)
    engine = BenchEngine(MODELS[options.model], _engine_address(options.url, status), threads=options.threads)
    try:
        rows = measure(engine, options.rounds)
    finally:
        engine.close()
    memory = _memory(status)
    if options.json:
        return json.dumps(_as_json(options, status, rows, memory), indent=1)
    return _as_text(options, engine, rows, memory)


def measure(engine: BenchEngine, rounds: int) -> list[Row]:
    """Measure every row: round trips first, then copies. `rounds` samples for slow rows, more for quick ones."""
    rng = random.Random()
    rows = [_row("empty call", "ms", _times(engine.empty_call, 20 * rounds), 1e3)]
    most = max(1, min(engine.model.blocks * engine.model.block_tokens, 1 << 17) // engine.chunk_tokens)
    for chunks in sorted({1, min(32, most)}):
        prompt = engine.prompt(_tokens(engine, chunks, rng))
        engine.lookup(prompt)
        engine.store(prompt, 0, chunks, _blocks(engine, chunks, rng))
        again = functools.partial(engine.lookup, prompt)
        known = _times(again, 10 * rounds, after=functools.partial(engine.release, prompt))
        rows.append(_row(f"lookup of {chunks} chunks, hashes known", "ms", known, 1e3))
        fresh = _times(functools.partial(_look_anew, engine, prompt.token_ids), 10 * rounds)
        rows.append(_row(f"lookup of {chunks} chunks, from a list of ids", "ms", fresh, 1e3))
    for chunks in sorted({1, min(8, most)}):
        rows += _copies(engine, chunks, rounds, rng)
    return rows


def _copies(engine: BenchEngine, chunks: int, rounds: int, rng: random.Random) -> list[Row]:
    gigabytes = chunks * engine.chunk_bytes / 1e9
    stores, retrieves = [], []
    for _ in range(rounds):
        prompt, blocks = engine.prompt(_tokens(engine, chunks, rng)), _blocks(engine, chunks, rng)
        engine.lookup(prompt)
        start = time.perf_counter()
        kept = engine.store(prompt, 0, chunks, blocks)
        stores.append(time.perf_counter() - start)
        found = engine.lookup(prompt)
        if not kept or found < chunks:
            raise ServerRefused(
                f"{chunks} chunks were stored, but {found} found: L1 is too small or too busy; see /status"
            )
        blocks = _blocks(engine, chunks, rng)
        start = time.perf_counter()
        engine.retrieve(prompt, chunks, blocks)
        retrieves.append(time.perf_counter() - start)
        engine.release(prompt)
    rows = []
    for name, seconds in (("store", stores), ("retrieve", retrieves)):
        rows.append(_row(f"{name} of {chunks} chunks", "ms", seconds, 1e3))
        rate = figure([gigabytes / one for one in seconds], more_is_better=True)
        rows.append(Row(f"{name} of {chunks} chunks", "GB/s", rate))
    return rows


def _look_anew(engine: BenchEngine, token_ids: Sequence[int]) -> None:
    prompt = engine.prompt(token_ids)
    engine.lookup(prompt)
    engine.release(prompt)


def _times(call: Callable[[], object], count: int, after: Callable[[], object] = lambda: None) -> list[float]:
    samples = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
        after()
    return samples


def _row(what: str, unit: str, seconds: list[float], scale: float) -> Row:
    return Row(what, unit, figure([one * scale for one in seconds]))


def _tokens(engine: BenchEngine, chunks: int, rng: random.Random) -> list[int]:
    return rng.choices(range(_VOCABULARY), k=chunks * engine.chunk_tokens)


def _blocks(engine: BenchEngine, chunks: int, rng: random.Random) -> list[int]:
    needed = -(-chunks * engine.chunk_tokens // engine.model.block_tokens)
    return rng.sample(range(engine.model.blocks), needed)


def _status(url: str, token: str) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url}: must be like {DEFAULT_URL}")
    code, status = ask(url, "/status", token=token)
    if code == 403:
        raise ServerRefused(f"{url}/status answered 403: pass --api-token-file")
    if code != 200 or "config" not in status:
        raise ServerRefused(f"{url}/status answered {code}, but not as LMCache does: pass the --url of lmcache server")
    return status


def _engine_address(url: str, status: dict[str, Any]) -> str:
    """Return the address of the server's ZMQ port as its status says. A wildcard address means the host of the URL."""
    config = status["config"]
    host = str(config.get("host", "127.0.0.1"))
    if host in ("0.0.0.0", "::"):
        host = urllib.parse.urlsplit(url).hostname or "127.0.0.1"
    return f"tcp://{in_url(host)}:{config['port']}"


def _memory(status: dict[str, Any]) -> dict[str, int]:
    """Return bytes of the arena, of the index, and (on this host) of the server's own resident memory."""
    memory = {"arena": int(status["arena"]["backed_bytes"]), "index": int(status["index"]["index_bytes"])}
    try:
        lines = Path(f"/proc/{status['pid']}/status").read_text().splitlines()
    except OSError:
        return memory  # the server is on another host or belongs to another user
    resident = dict(line.split(":", 1) for line in lines)
    memory["process"] = sum(int(resident[name].split()[0]) for name in ("RssAnon", "RssFile")) * 1024
    return memory


def _as_json(
    options: argparse.Namespace, status: dict[str, Any], rows: list[Row], memory: dict[str, int]
) -> dict[str, object]:
    return {
        "version": status.get("version"),
        "url": options.url,
        "model": options.model,
        "threads": options.threads,
        "rows": [{"what": row.what, "unit": row.unit, **dataclasses.asdict(row.figure)} for row in rows],
        "memory_bytes": memory,
    }


def _as_text(options: argparse.Namespace, engine: BenchEngine, rows: list[Row], memory: dict[str, int]) -> str:
    head = (
        f"{options.url}: {engine.chunk_tokens}-token chunks of {engine.chunk_bytes / _MIB:.2f} MiB "
        f"(--model {options.model}), {options.threads} copy thread{'s' if options.threads > 1 else ''}\n"
    )
    table = [["what", "unit", "median", "p99", "80 % within"]]
    for row in rows:
        shown = row.figure
        table.append(
            [row.what, row.unit, f"{shown.median:.3f}", f"{shown.p99:.3f}", f"{shown.low:.3f} - {shown.high:.3f}"]
        )
    sizes = ", ".join(f"{name} {size / _MIB:.0f} MiB" for name, size in memory.items())
    return f"{head}\n{align(table)}\n\nserver memory: {sizes}"
