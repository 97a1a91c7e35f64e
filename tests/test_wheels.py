"""`./run wheel`: what the wheels in dist/ are called, what is in them, and what their native part asks of a system."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import lmcache

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

FOLDER = os.environ.get("LMCACHE_TEST_WHEELS", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="`./run wheel` runs this")
NATIVE = "lmcache/_native.abi3.so"
NEWEST_GLIBC = (2, 28)
LIBRARIES = {"libc.so.6", "libpthread.so.0", "libm.so.6", "ld-linux-aarch64.so.1", "ld-linux-x86-64.so.2"}


@pytest.fixture(params=["x86_64", "aarch64"])
def machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def wheel(machine: str) -> Path:
    (path,) = Path(FOLDER).glob(f"lmcache-*_{machine}.whl")
    return path


@pytest.fixture
def native(wheel: Path) -> ELFFile:
    from elftools.elf.elffile import ELFFile

    with zipfile.ZipFile(wheel) as archive:
        return ELFFile(io.BytesIO(archive.read(NATIVE)))


def test_pip_installs_it_on_systems_with_an_older_c_library(wheel: Path, machine: str) -> None:
    from packaging.utils import parse_wheel_filename

    _, version, _, tags = parse_wheel_filename(wheel.name)
    assert str(version) == lmcache.__version__
    assert {(tag.interpreter, tag.abi) for tag in tags} == {("cp310", "abi3")}
    platforms = {tag.platform for tag in tags}
    assert platforms & {f"manylinux_{NEWEST_GLIBC[0]}_{minor}_{machine}" for minor in range(NEWEST_GLIBC[1] + 1)}
    assert all(platform.startswith("manylinux") and platform.endswith(f"_{machine}") for platform in platforms)


def test_the_native_part_is_inside_and_its_source_is_not(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert [name for name in names if name.endswith(".so")] == [NATIVE]
    assert not [name for name in names if name.endswith((".c", ".h"))]
    package = Path(__file__).resolve().parents[1] / "src"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules, (
        "something is missing, or left from an earlier build"
    )


def test_the_native_part_asks_for_no_more_than_every_system_has(native: ELFFile, machine: str) -> None:
    assert native["e_machine"] == {"x86_64": "EM_X86_64", "aarch64": "EM_AARCH64"}[machine]
    assert native["e_type"] == "ET_DYN"
    (start,) = native.get_section_by_name(".dynsym").get_symbol_by_name("PyInit__native")
    assert start["st_shndx"] != "SHN_UNDEF" and start["st_info"]["bind"] == "STB_GLOBAL"
    linked = [(one.entry.d_tag, one) for one in native.get_section_by_name(".dynamic").iter_tags()]
    assert {one.needed for tag, one in linked if tag == "DT_NEEDED"} <= LIBRARIES
    assert not {"DT_RPATH", "DT_RUNPATH"} & {tag for tag, _ in linked}, (
        "a library would be looked for in a folder of the builder"
    )
    versions = list(glibc_versions(native))
    assert versions and max(versions) <= NEWEST_GLIBC


def glibc_versions(native: ELFFile) -> Any:
    """(2, 17) and so on: of each version of a library's symbols that has to be there."""
    for _, auxiliaries in native.get_section_by_name(".gnu.version_r").iter_versions():
        for one in auxiliaries:
            library, _, version = one.name.partition("_")
            assert library == "GLIBC", one.name
            yield tuple(map(int, version.split(".")))
