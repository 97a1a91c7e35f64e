"""Stands in for packages that SGLang imports and that a text model on a CPU never calls: they need CUDA, or are large.

`./run` puts this file into SGLang's environment, with a .pth file that imports it at every start of the interpreter. Whatever
is imported from one of the packages is there; whoever calls it learns by name what was missing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

VERSIONS = {
    "sgl_kernel": "0.4.10",
    "torchvision": "0.28.0",
    "xgrammar": "0.2.7",
    "soundfile": "0.13.1",
    "IPython": "9.0",
    "sglang.kernels.ops.gemm.cutedsl_dual_gemm": "",  # of SGLang itself, over CUTLASS, for Blackwell GPUs only
}
AS_MODELS = ("xgrammar",)
"""SGLang makes fields of pydantic models of what these define."""


class Missing:
    """Anything that was imported from such a package."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{self.__name__} is not installed here: only its name is")


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages above and all their submodules."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if any(name == package or name.startswith(package + ".") for package in VERSIONS):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        module.__dict__["__version__"] = VERSIONS.get(name, "")
        module.__dict__["__getattr__"] = _model_of if name.split(".")[0] in AS_MODELS else Missing(name).__getattr__


def _model_of(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    from pydantic import BaseModel

    return type(name, (BaseModel,), {"__module__": __name__})


sys.meta_path.insert(0, Finder())
