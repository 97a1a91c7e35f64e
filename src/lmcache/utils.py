"""A name that vLLM imports from here."""

from __future__ import annotations

from lmcache.observability.log import init_logger

__all__ = ["init_logger"]
