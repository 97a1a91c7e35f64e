"""The floors: a file imports only from floors below its own, or from its own folder (ARCHITECTURE.md draws them)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lmcache

PACKAGE = Path(lmcache.__file__).parent
FLOORS = {
    "integration": 10,
    "v1": 10,
    "cli": 9,
    "bench": 9,
    "server": 8,
    "engine": 7,
    "transfer": 6,
    "wire": 5,
    "cache": 4,
    "tiers": 3,
    "testing": 4,
    "memory": 2,
    "chunks": 1,
    "observability": 0,
    "config": 0,
    "errors": 0,
    "compiled": 0,
    "utils": 10,
    "__init__": 8,
}
"""`__init__` exports what other programs use from floor 7 and below. `v1` and `utils` hold names that engines dictate, so they
stand where integrations do."""
BESIDE = {("cli", "bench"), ("config", "errors"), ("observability", "errors")}
"""On the same floor, and allowed in this direction only."""
NATIVE_USERS = {"transfer", "cache", "tiers", "wire"}
"""Of `compiled`, which alone imports `_native`."""
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


def test_one_place_gives_the_engines_side_its_time_and_its_threads() -> None:
    """Only `engine/runtime.py` reads a clock, sleeps or starts a thread; the NumPy engine is an engine and times itself."""
    for folder in ("engine", "integration"):
        for path in (PACKAGE / folder).rglob("*.py"):
            if path.name == "runtime.py" or "numpy" in path.parts:
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
            names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            made = {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Call)
                for node in [node.func]
                if isinstance(node, ast.Attribute)
            }
            assert not names & {"time", "datetime", "concurrent.futures.thread"}, path
            assert not made & {"Thread", "Timer", "ThreadPoolExecutor"}, path


def test_the_loop_makes_the_servers_threads_and_tells_its_tiers_the_time() -> None:
    """HTTP has a thread of its own, which answers when the loop does not."""
    for path in (PACKAGE / "server").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        made = {name for name in called if name.rpartition(".")[2] in ("Thread", "ThreadPoolExecutor", "Timer")}
        assert not made or path.name in ("loop.py", "http.py"), (
            f"{path.name} calls {made}: ask the loop for an executor"
        )
        imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        assert not (path.name.startswith("tier") and "time" in imported), f"{path.name}: ask the loop for the time"


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
