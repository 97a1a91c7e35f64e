"""Wheels by setup.py: what is in them, what they are called, and what happens where the native part cannot be compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lmcache

pytest.importorskip("setuptools.command.bdist_wheel")
ROOT = Path(__file__).resolve().parents[1]
NATIVE = "lmcache/_native.abi3.so"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The least of the source tree that a wheel can be built of, with a native part from an earlier build in place."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "src/lmcache/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "src/lmcache/native", tmp_path / "src/lmcache/native")
    (tmp_path / "src" / NATIVE).write_bytes(b"of an earlier build")
    return tmp_path


def build(tree: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: text for name, text in os.environ.items() if name not in ("CC", "LMCACHE_NO_NATIVE_BUILD")}
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", "wheels"]
    return subprocess.run(command, cwd=tree, env={**kept, **variables}, capture_output=True, text=True, check=False)


def wheel(tree: Path) -> tuple[str, list[str]]:
    """The tag of the one wheel, and the names in it."""
    (path,) = (tree / "wheels").iterdir()
    name, version, tag = path.stem.split("-", 2)
    assert (name, version) == ("lmcache", lmcache.__version__)
    with zipfile.ZipFile(path) as archive:
        return tag, archive.namelist()


@pytest.mark.parametrize("compiler", ["/bin/false", "/no/such/compiler"])
def test_a_compiler_that_fails_fails_the_build(tree: Path, compiler: str) -> None:
    run = build(tree, CC=compiler)
    assert run.returncode != 0
    assert compiler in run.stderr
    assert not (tree / "wheels").exists()


@pytest.mark.parametrize(
    ("variables", "why"),
    [({"LMCACHE_NO_NATIVE_BUILD": "1"}, "LMCACHE_NO_NATIVE_BUILD is 1"), ({"PATH": ""}, "there is no C compiler")],
)
def test_without_a_compiler_the_wheel_says_so(tree: Path, variables: dict[str, str], why: str) -> None:
    run = build(tree, **variables)
    assert run.returncode == 0, run.stderr
    assert f"the native part is left out, and KV is copied with NumPy, which is slower: {why}" in run.stderr
    tag, names = wheel(tree)
    assert tag == "py3-none-any"
    assert not [name for name in names if name.endswith((".so", ".c", ".h"))]


def test_with_a_compiler_the_native_part_is_inside_and_its_source_is_not(tree: Path) -> None:
    run = build(tree)
    if "the native part is left out" in run.stderr:
        pytest.skip(run.stderr)
    assert run.returncode == 0, run.stderr
    tag, names = wheel(tree)
    assert tag.startswith("cp310-abi3-linux_")
    assert NATIVE in names
    assert not [name for name in names if name.endswith((".c", ".h"))]


def test_the_version_is_above_the_public_releases_of_this_name() -> None:
    assert tuple(map(int, lmcache.__version__.split(".")[:3])) > (0, 5, 6)
