"""How all HTTP routes answer: with JSON objects on one line."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


def answer(content: Mapping[str, Any], status: int = 200) -> Response:
    """Return the response with this JSON object. What JSON cannot express is written as text, and a float that is no number as
    null."""
    dump = functools.partial(json.dumps, default=str, ensure_ascii=False, separators=(", ", ": "), allow_nan=False)
    try:
        body = dump(content)
    except ValueError:  # a counter that is no number, which JSON cannot express
        body = dump(_without_nan(content))
    return Response(body + "\n", status, media_type="application/json")


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
