"""`init_logger`, which vLLM imports from this module."""

from __future__ import annotations

from lmcache.observability.log import init_logger

__all__ = ["init_logger"]
