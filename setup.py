"""The native part: plain C against Python's stable ABI, so one build serves every Python from 3.10 on."""

import os
import shlex
import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

native = Extension(
    "lmcache._native",
    sources=[
        f"src/lmcache/native/{name}.c"
        for name in (
            "module",
            "copy",
            "table",
            "lru",
            "plugged",
            "learned",
            "notes",
            "groups",
            "heaps",
            "rival",
            "habits",
            "exchange",
            "device",
            "frames",
            "sample",
            "pack12",
            "int8",
        )
    ],
    depends=[
        f"src/lmcache/native/{name}.h"
        for name in (
            "native",
            "hashed",
            "table",
            "arguments",
            "learned",
            "learning",
            "habits",
            "kernels",
            "kernels_x86",
            "kernels_neon",
            "xxh3",
        )
    ],
    extra_compile_args=["-O3", "-std=c11", "-fvisibility=hidden"],
    define_macros=[("Py_LIMITED_API", "0x030a0000")],
    py_limited_api=True,
)


def obstacle() -> str:
    """Why the native part cannot be compiled here, "" where it can. A compiler that CC names counts as there."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "free-threaded Python has no stable ABI; use a Python with the GIL"
    if not os.environ.get("CC") and not shutil.which(compiler):
        return f"there is no C compiler {compiler!r}; install one (package gcc), or name yours in CC"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are not installed; install them (package python3-dev or python3-devel)"
    return ""


class BuildNative(build_ext):
    def run(self) -> None:
        if why := obstacle():
            raise PlatformError(
                f"LMCache's native part cannot be compiled: {why}. Where a wheel fits, none of this is needed."
            )
        super().run()


setup(ext_modules=[native], cmdclass={"build_ext": BuildNative}, options={"bdist_wheel": {"py_limited_api": "cp310"}})
