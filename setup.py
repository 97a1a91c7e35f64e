"""The native part: plain C against Python's stable ABI, so one build serves every Python from 3.10 on.

Where nothing can compile it the package installs all the same, as a wheel for every machine (py3-none-any) that copies with
NumPy. A compiler that is there must succeed: a wheel that says cp310-abi3 has the native part in it.
"""

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

native = Extension(
    "lmcache._native",
    sources=[f"src/lmcache/native/{name}.c" for name in ("module", "copy", "table", "exchange", "device", "frames")],
    depends=[f"src/lmcache/native/{name}.h" for name in ("native", "kernels", "kernels_x86", "kernels_neon", "xxh3")],
    extra_compile_args=["-O3", "-std=c11", "-fvisibility=hidden"],
    define_macros=[("Py_LIMITED_API", "0x030a0000")],
    py_limited_api=True,
)


def obstacle() -> str:
    """Why the native part is left out, "" where it is to be built. A compiler that CC names counts as there."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if os.environ.get("LMCACHE_NO_NATIVE_BUILD") == "1":
        return "LMCACHE_NO_NATIVE_BUILD is 1"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "free-threaded Python has no stable ABI"
    if not os.environ.get("CC") and not shutil.which(compiler):
        return f"there is no C compiler {compiler!r} (install one, or name yours in CC)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are not installed (package python3-dev or python3-devel)"
    return ""


if why := obstacle():
    print(f"lmcache: the native part is left out, and KV is copied with NumPy, which is slower: {why}", file=sys.stderr)
    setup()
else:
    setup(ext_modules=[native], options={"bdist_wheel": {"py_limited_api": "cp310"}})
