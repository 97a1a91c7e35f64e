"""The native part: plain C against Python's stable ABI, so one build serves every Python from 3.10 on.

It is optional: without a C compiler the package installs all the same and falls back to NumPy (and says so in the log).
"""

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

native = Extension(
    "lmcache._native",
    sources=[f"src/lmcache/native/{name}.c" for name in ("module", "copy", "table", "exchange", "device", "frames")],
    depends=[f"src/lmcache/native/{name}.h" for name in ("native", "kernels", "kernels_x86", "kernels_neon", "xxh3")],
    extra_compile_args=["-O3", "-std=c11", "-fvisibility=hidden"],
    define_macros=[("Py_LIMITED_API", "0x030a0000")],
    py_limited_api=True,
    optional=True,
)


class StableWheel(bdist_wheel):
    """Tag the wheel cp310-abi3."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.py_limited_api = "cp310"


setup(ext_modules=[native], cmdclass={"bdist_wheel": StableWheel})
