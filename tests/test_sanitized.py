"""`./run sanitize`: whether the tests beside this one really run on C code that was built with sanitizers."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmcache.compiled import native

SITE = os.environ.get("LMCACHE_TEST_SANITIZED", "")
pytestmark = pytest.mark.skipif(not SITE, reason="`./run sanitize` runs this")


def test_the_native_part_in_use_is_the_sanitized_one() -> None:
    assert Path(native.__file__).is_relative_to(SITE)
    assert ctypes.CDLL(native.__file__).__asan_version_mismatch_check_v8, "the library does not call AddressSanitizer"


def test_a_read_beyond_memory_ends_the_process() -> None:
    """Through the sanitizer's own `memcpy`, which the C code calls: one byte more than was allocated."""
    beyond = "import ctypes; libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p\n"
    beyond += "libc.memcpy(ctypes.c_void_p(libc.malloc(64)), ctypes.c_void_p(libc.malloc(64)), ctypes.c_size_t(65))"
    ended = subprocess.run([sys.executable, "-c", beyond], capture_output=True, text=True, timeout=60)
    assert ended.returncode and "heap-buffer-overflow" in ended.stderr, ended
