"""The floors: a file imports only from floors below its own, or from its own folder (ARCHITECTURE.md draws them)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lmcache

PACKAGE = Path(lmcache.__file__).parent
FLOORS = {
    "integration": 11,
    "v1": 11,
    "cli": 10,
    "bench": 10,
    "server": 9,
    "peers": 8,
    "proxy": 8,
    "engine": 7,
    "transfer": 6,
    "wire": 5,
    "sizing": 5,
    "cache": 4,
    "tiers": 3,
    "testing": 4,
    "memory": 2,
    "chunks": 1,
    "observability": 0,
    "config": 0,
    "errors": 0,
    "runtime": 0,
    "compiled": 0,
    "utils": 11,
    "__init__": 8,
}
"""`__init__` exports what other programs use from floor 7 and below. `v1` and `utils` hold names that engines dictate, so they
stand where integrations do."""
BESIDE = {("cli", "bench"), ("config", "errors"), ("config", "observability"), ("observability", "errors")}
"""On the same floor, and allowed in this direction only."""
NATIVE_USERS = {"transfer", "cache", "tiers", "wire", "sizing"}
"""Of `compiled`, which alone imports `_native`."""
REAL_TIME = {
    "lmcache.runtime": ("time Thread", "it is the clock"),
    "lmcache.config.hosts": (
        "time Thread",
        "connects to real peers; resolvers have no time-out, so a thread waits for them",
    ),
    "lmcache.wire.": ("time", "time-outs of sockets, whose other side is real"),
    "lmcache.tiers.redis.": ("time BoundedSemaphore", "time-outs of sockets, whose other side is real"),
    "lmcache.tiers.infinistore.": ("time BoundedSemaphore", "time-outs of sockets, whose other side is real"),
    "lmcache.tiers.mooncake.": ("BoundedSemaphore", "waits for a process of a store, which is real"),
    "lmcache.server.http": (
        "asyncio Thread Event",
        "its thread answers when the loop does not, and its callers are real",
    ),
    "lmcache.proxy.connections": ("asyncio", "names the type of uvicorn's transports; its clients are real"),
    "lmcache.server.loop": ("result", "the thread of HTTP waits for the loop"),
    "lmcache.server.report": ("result", "the thread of HTTP waits for tiers to be cleared"),
    "lmcache.server.operating": ("result", "the thread of HTTP waits for the answers of tiers"),
    "lmcache.server.controller": (
        "result",
        "the thread of HTTP waits for the answers of other servers, which are real",
    ),
    "lmcache.memory.arena": ("time", "measures how busy the machine is"),
    "lmcache.bench.": ("time", "measures real servers"),
    "lmcache.testing.": ("Thread result", "the tests of a tier, which do what several servers do"),
}
"""Module, or folder with a dot -> what of real time and threads it uses all the same, and why."""
NAMES_WITHOUT_FLOOR = {"__version__"}


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def home(path: Path) -> str:
    """The first folder under the package, or the module's name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, what of lmcache is imported: the folder or module right under the package)."""
    package = ["lmcache", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "lmcache" else [module]
        else:
            continue
        for name in names:
            if name.startswith("lmcache."):
                yield node.lineno, name.split(".")[1]


def breaches(path: Path) -> list[str]:
    own, found = home(path), []
    for line, other in imports(path):
        if other in ("compiled", "_native"):
            allowed = own in NATIVE_USERS if other == "compiled" else own == "compiled"
        else:
            beside = other == own or (own, other) in BESIDE
            allowed = other in NAMES_WITHOUT_FLOOR or beside or FLOORS[other] < FLOORS[own]
        if not allowed:
            found.append(f"{path.relative_to(PACKAGE)}:{line} ({own}, floor {FLOORS[own]}) imports lmcache.{other}")
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    assert home(path) in FLOORS, f"{home(path)} has no floor: give it one here and in ARCHITECTURE.md"
    assert breaches(path) == []


def test_the_heart_is_pure() -> None:
    """cache/ does no I/O, starts no thread and has no clock."""
    banned = {"asyncio", "os", "pathlib", "random", "select", "socket", "subprocess", "threading", "time", "zmq"}
    for path in (PACKAGE / "cache").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not banned & {name.split(".")[0] for name in names}, f"{path.name}:{node.lineno} imports {names}"


def test_one_module_reads_the_clock_and_makes_threads() -> None:
    """All others take a `Runtime` as an argument, so that servers and engines can run by a made-up clock (`test_simulation`)."""
    found: dict[str, set[str]] = {}
    for path in files():
        module = ".".join(("lmcache", *path.relative_to(PACKAGE).with_suffix("").parts))
        for place in [place for place in REAL_TIME if module.startswith(place)] or [module]:
            found.setdefault(place, set()).update(real_time_of(path))
    assert {place: used for place, used in found.items() if used} == {
        place: set(uses.split()) for place, (uses, _) in REAL_TIME.items()
    }


def real_time_of(path: Path) -> Iterator[str]:
    """What a file imports or calls that reads a clock of the operating system, makes threads, or can wait for real time."""
    threads = {"Thread", "Timer", "Event", "Condition", "Semaphore", "BoundedSemaphore"}
    pools, clocks = {"ThreadPoolExecutor", "ProcessPoolExecutor"}, {"datetime.now", "datetime.utcnow"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & {"asyncio", "sched", "selectors", "time"}
        elif isinstance(node, ast.ImportFrom):
            yield from {node.module or ""} & {"time"}
            yield from {alias.name for alias in node.names if node.module == "threading"} & threads
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            yield from {name.removeprefix("threading.")} & threads if name.startswith("threading.") else {name} & pools
            yield from {".".join(name.split(".")[-2:])} & clocks
            if name.endswith(".result") and node.args:
                yield "result"


def test_every_folder_says_what_lives_there() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no first paragraph"


def test_a_breach_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory").mkdir()
    file = tmp_path / "memory" / "upwards.py"
    file.write_text(
        "import lmcache.chunks\nfrom lmcache import server\nfrom lmcache._native import table\n"
        "from lmcache.compiled import native\nfrom ..wire import x\n"
    )
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    assert [line.split(" imports ")[1] for line in breaches(file)] == [
        "lmcache.server",
        "lmcache._native",
        "lmcache.compiled",
        "lmcache.wire",
    ]
