"""`lmcache doctor`: check this machine and a running server for what usually goes wrong, and say what to type."""

from __future__ import annotations

import argparse
import json
import os
import resource
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lmcache import __version__
from lmcache.cli.told import Told, lacking
from lmcache.cli.verbs import Verbs, add, add_token, add_url, size_text, token_of
from lmcache.config.load import load
from lmcache.config.server import ServerConfig
from lmcache.errors import ConfigError, ServerRefused, ServerUnavailable
from lmcache.memory.huge_pages import mount_of, why_none
from lmcache.memory.numa import online_nodes
from lmcache.observability.log import printable
from lmcache.runtime import RUNTIME
from lmcache.server.preflight import check_port, free_bytes, memory_available_bytes
from lmcache.wire.http_client import ask

_TEXT = """
Check this machine, and the server at --url if one answers: shared memory, memory limits, locked memory, huge pages, NUMA,
versions, users, clocks, ports and tiers. Each finding says what to type. The exit code is 0 if nothing is wrong, and 1
otherwise; a `note` is no fault. Run it where the server runs, and in the container of an engine, since each container has
limits of its own.

examples:
  lmcache doctor
  lmcache doctor --url http://10.0.0.7:8080 --api-token-file token
  lmcache doctor --json | jq '.findings[] | select(.state == "wrong")'
"""
_ENGINES = "vllm", "sglang", "tensorrt-llm", "transformers", "torch"
_LEAST_SHM_BYTES = 1 << 30
_CLOCK_SECONDS = 5.0
State = Literal["ok", "note", "wrong"]


class Finding(NamedTuple):
    """What was checked, and how it is. remedy: what to type, if something can be done."""

    name: str
    state: State
    text: str
    remedy: str = ""


def add_verb(verbs: Verbs) -> None:
    """Add `doctor` to the command line."""
    parser = add(verbs, "doctor", run, "check this machine and a running server for what goes wrong", _TEXT)
    parser.add_argument(
        "--arena-dir",
        metavar="DIR",
        default=None,
        help="Where the memory of L1 is or will be. Default: as for `lmcache server`.",
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of text.")
    add_url(parser)
    add_token(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print all findings; the exit code says whether something is wrong."""
    config = load({"arena_dir": arguments.arena_dir}).config
    server, why = _server(arguments)
    found = [*machine(config), *(serving(server) if server is not None else absent(config, why))]
    wrong = sum(one.state == "wrong" for one in found)
    if arguments.json:
        print(json.dumps({"wrong": wrong, "findings": [one._asdict() for one in found]}, indent=2))
    else:
        for one in found:
            print(printable(f"{one.state:<5}  {one.name}: {one.text}", 4000))
            if one.remedy:
                print(printable(f"       -> {one.remedy}", 4000))
        print(
            f"{wrong} of {len(found)} checks found something wrong."
            if wrong
            else f"{len(found)} checks found nothing wrong."
        )
    return 1 if wrong else 0


def _server(arguments: argparse.Namespace) -> tuple[dict[str, Any] | None, str]:
    """Return the server's health and status, and if there are none the reason."""
    try:
        _, health = ask(arguments.url, "/healthcheck")
        code, status = ask(arguments.url, "/status", token=token_of(arguments))
    except (ServerUnavailable, ServerRefused) as error:
        return None, str(error)
    return {
        "url": arguments.url,
        "health": health,
        "status": status if code == 200 else {},
        "why": status.get("reason", ""),
    }, ""


def machine(config: ServerConfig) -> Iterator[Finding]:
    """Yield what concerns this machine or container alone."""
    yield from _shared_memory(config.arena_dir)
    yield _memory()
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    yield Finding(
        *("locked memory", "ok" if unlimited else "note"),
        "unlimited"
        if unlimited
        else f"limited to {size_text(soft)}; an engine with a GPU locks the memory of L1 and copies slower beyond",
        ""
        if unlimited
        else "`ulimit -l unlimited`, or `docker run --ulimit memlock=-1`, or in systemd `LimitMEMLOCK=infinity`",
    )
    none = why_none(config.arena_dir) if config.arena_dir.is_dir() else "there is no such folder"
    yield Finding(
        "huge pages",
        "note" if none else "ok",
        f"none for L1, since {none}" if none else f"{config.arena_dir} gives them",
    )
    nodes = online_nodes()
    yield Finding(
        *("NUMA", "note" if len(nodes) > 1 else "ok"),
        f"{len(nodes)} memory nodes; --numa says where L1 is" if len(nodes) > 1 else "one memory node",
        "if all engines' GPUs are at one node: `lmcache server --numa NODE`" if len(nodes) > 1 else "",
    )
    engines = [f"{name} {found}" for name in _ENGINES if (found := _installed(name))]
    yield Finding(
        "versions", "ok", f"lmcache {__version__} here, with {', '.join(engines) or 'no engine in this environment'}"
    )


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _shared_memory(directory: Path) -> Iterator[Finding]:
    if not directory.is_dir():
        yield Finding("shared memory", "wrong", f"{directory} is no folder", "pass --arena-dir /dev/shm")
        return
    found, kind = os.statvfs(directory), mount_of(directory).kind
    total, free = found.f_blocks * found.f_frsize, free_bytes(directory)
    text = f"{directory} ({kind}) has {size_text(total)}, {size_text(free)} of them free"
    remedy = "`docker run --shm-size 20g`; in Kubernetes an emptyDir with `medium: Memory` at /dev/shm; else "
    remedy += f"`mount -o remount,size=20g {directory}` as root"
    if kind not in ("tmpfs", "ramfs", "hugetlbfs", "devtmpfs", "unknown"):
        yield Finding("shared memory", "wrong", f"{text}: it is not in memory", "pass --arena-dir /dev/shm")
    elif kind != "hugetlbfs" and total < _LEAST_SHM_BYTES:
        yield Finding("shared memory", "wrong", f"{text}: that is too little for an L1 of use", remedy)
    elif not os.access(directory, os.W_OK | os.X_OK):
        yield Finding(
            "shared memory",
            "wrong",
            f"{text}: uid {os.getuid()} may not write to it",
            f"`chmod 1777 {directory}` as root",
        )
    else:
        yield Finding("shared memory", "ok", text)


def _memory() -> Finding:
    lines = Path("/proc/meminfo").read_text().splitlines()
    whole = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    left = memory_available_bytes()
    limited = left < whole * 0.95
    text = f"{size_text(left)} are available" + (
        f" in this container or service; the machine has {size_text(whole)}" if limited else ""
    )
    return Finding(
        *("memory", "note" if limited else "ok", text),
        "L1 counts towards the limit: `docker run --memory`, or Kubernetes `resources.limits.memory`, above L1 + 1 GiB"
        if limited
        else "",
    )


def absent(config: ServerConfig, why: str) -> Iterator[Finding]:
    """Yield why no server answers, and whether one could start here."""
    yield Finding("server", "wrong", why)
    ports = (
        ("--host", config.host, "--port", config.port),
        ("--http-host", config.http_host, "--http-port", config.http_port),
    )
    for host_flag, host, flag, port in ports:
        name = f"port {port} ({flag})"
        try:
            check_port(host_flag, host, flag, port)
        except ConfigError as error:
            yield Finding(name, "wrong", f"a server cannot start here: {error}")
        else:
            yield Finding(name, "ok", "free; `lmcache server` can start here")


def serving(server: dict[str, Any]) -> Iterator[Finding]:
    """Yield what concerns the running server."""
    health, status, url = server["health"], server["status"], server["url"]
    healthy = health.get("status") == "healthy"
    yield Finding(
        *("server", "ok" if healthy else "wrong"),
        f"{url} is healthy" if healthy else f"{url} is unhealthy: {health.get('reason', 'no reason was given')}",
        "" if healthy else "look at the log of the server, and restart it",
    )
    for refused in health.get("refused_engines", []):
        yield Finding("engine refused", "wrong", str(refused))
    if not status:
        yield Finding(
            "status",
            "wrong",
            f"the server does not show it: {server['why']}",
            "pass --api-token-file, or run this on its host",
        )
        return
    told = Told(status)
    theirs = told.text("version")
    yield Finding(
        *("server's version", "ok" if theirs == __version__ else "note"),
        f"{theirs}, and {__version__} here",
        "" if theirs == __version__ else "engines of another version are served; upgrade the older side when you can",
    )
    yield _clock(told)
    yield from _users(told)
    engines = [one for one in told.rows("engines") if one.given("layout")]
    frames = [one for one in engines if one.given("payload_frames")]
    yield Finding(
        *("engines", "ok" if engines else "note"),
        f"{len(engines)} engine processes are connected" if engines else "no engine is connected",
        "" if engines else "look in the engine's log for `Connected to the LMCache server`",
    )
    if frames:
        yield Finding(
            *(
                "copies",
                "note",
                f"{len(frames)} engine processes get KV as messages over TCP, which is slower than shared memory",
            ),
            "if they are on this host, mount the server's --socket-dir into their containers at the same path",
        )
    for tier in told.rows("tiers"):
        good = tier.text("state") == "serving"
        yield Finding(
            *(f"tier {tier.text('name')}", "ok" if good else "wrong"),
            f"{tier.text('url')}: {tier.text('state')}" + ("" if good else f": {tier.text('reason')}"),
            "" if good else "check whether the store runs, and the address and password in --l2",
        )
    if wrong := lacking(told, theirs):
        remedy = "install the same release on both sides, or pass the --url of `lmcache server`"
        yield Finding("status", "wrong", f"{wrong}; these checks were left out", remedy)


def _clock(told: Told) -> Finding:
    apart = abs(RUNTIME.wall() - told.number("wall_seconds", RUNTIME.wall()))
    wrong = apart > _CLOCK_SECONDS
    return Finding(
        *("clock", "wrong" if wrong else "ok"),
        f"the server's is {apart:.0f} s apart from the one here"
        if wrong
        else "the server's is the same as the one here",
        "start an NTP client on both hosts (`timedatectl set-ntp true`): S3 and shared folders compare times"
        if wrong
        else "",
    )


def _users(told: Told) -> Iterator[Finding]:
    """Compare the users of the processes that this host shows."""
    try:  # the arena shows whether the server is on this host
        ours, theirs = os.getuid(), Path(told.part("arena").text("path")).stat().st_uid
    except (OSError, ValueError):
        yield Finding("user", "note", f"this is uid {os.getuid()}; the server's user is not visible here")
        return
    same, config = theirs == ours, told.part("config")
    by_key = config.given("auth-key-file") or config.given("insecure-no-auth")
    yield Finding(
        *("user", "ok" if same else "note" if by_key else "wrong"),
        f"the server runs as uid {theirs}, and this is uid {ours}"
        + ("; it serves engines of every user that have its key" if by_key and not same else ""),
        ""
        if same or by_key
        else f"run engines as uid {theirs} (`docker run --user {theirs}`), or start the server with --allow-uid {ours} and "
        f"engines with LMCACHE_ALLOW_SERVER_UID={theirs}, or give both an --auth-key-file",
    )
