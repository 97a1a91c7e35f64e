"""Wheels by setup.py: their content and their names, and what happens where the native part cannot be compiled or loaded."""

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
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "src/lmcache/__init__.py",
        "src/lmcache/_native.pyi",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "src/lmcache/native", tmp_path / "src/lmcache/native")
    (tmp_path / "src" / NATIVE).write_bytes(b"of an earlier build")
    return tmp_path


def build(tree: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: text for name, text in os.environ.items() if name != "CC"}
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


def test_without_a_compiler_the_build_says_what_to_install(tree: Path) -> None:
    run = build(tree, PATH="")
    assert run.returncode != 0
    assert "native part cannot be compiled: there is no C compiler" in run.stderr
    assert not (tree / "wheels").exists()


def test_the_native_part_is_inside_and_its_source_is_not(tree: Path) -> None:
    run = build(tree)
    if "cannot be compiled" in run.stderr:
        pytest.skip(run.stderr)
    assert run.returncode == 0, run.stderr
    tag, names = wheel(tree)
    assert tag.startswith("cp310-abi3-linux_")
    assert NATIVE in names and "lmcache/_native.pyi" in names
    assert not [name for name in names if name.endswith((".c", ".h"))]


def test_a_native_part_that_cannot_be_loaded_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    package = tmp_path / "lmcache"
    package.mkdir()
    for name in ("__init__.py", "compiled.py"):
        shutil.copy(ROOT / "src/lmcache" / name, package)
    command = [sys.executable, "-c", "import lmcache.compiled"]
    run = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "ImportError: LMCache's compiled module lmcache._native cannot be loaded" in run.stderr
    assert "a C compiler" in run.stderr


def test_the_version_is_above_the_public_releases_of_this_name() -> None:
    assert tuple(map(int, lmcache.__version__.split(".")[:3])) > (0, 5, 6)
