"""The forms in which extents hold the head of a token: as the engine has it, or rounded to fewer bits (docs/codecs.md)."""

from __future__ import annotations

import enum

SCALE_BYTES = 4
"""The size of one scale, which is a float32."""
KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}
"""The dtypes that can be rounded, and their numbers in native/int8.c."""
_LEAST_ROW, _MOST_ROW = 8, 4096
_GROUP = 32
"""Values that share one scale in INT4."""


class Form(enum.IntEnum):
    """The numbers are those of native/native.h. INT8: one scale and a byte for each value. INT4: for each 32 values one scale and
    16 bytes."""

    EXACT = 0
    INT8 = 1
    INT4 = 2

    def takes(self, head_size: int, dtype: str) -> bool:
        """Return whether heads of so many values of this dtype, a key of `DTYPE_BYTES`, can have this form."""
        if self is Form.EXACT:
            return True
        fits = self is Form.INT8 or head_size % _GROUP == 0
        return fits and dtype in KINDS and _LEAST_ROW <= head_size <= _MOST_ROW

    def head_bytes(self, head_size: int, item_bytes: int) -> int:
        """Return the bytes of one head of a token of `head_size` values, which have `item_bytes` where they are exact."""
        if self is Form.EXACT:
            return head_size * item_bytes
        if self is Form.INT8:
            return SCALE_BYTES + head_size
        return head_size // _GROUP * (SCALE_BYTES + _GROUP // 2)
