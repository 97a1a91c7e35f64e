"""This rank's KV, described, if every rank's can be: they all serve from LMCache, or none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmcache.errors import LayoutError
from lmcache.integration.sglang.model import NOT_SERVED, Buffers, RankKV, Ranks, describe_rank
from lmcache.integration.sglang.ranks import Agreement
from lmcache.observability.log import init_logger

logger = init_logger(__name__)


def describe_agreed(
    buffers: Callable[[], Buffers],
    model_config: Any,
    page_size: int,
    ranks: Ranks,
    agreement: Agreement,
    *,
    model_id: str,
    engine_id: str,
) -> RankKV | None:
    """`describe_rank` of what `buffers` returns; None where some rank's cannot be cached, and then a line says why."""
    kv, refusal = None, "another rank's KV cannot be cached"
    try:
        kv = describe_rank(buffers(), model_config, page_size, ranks, model_id=model_id, engine_id=engine_id)
    except NOT_SERVED as error:
        known = isinstance(error, LayoutError)
        refusal = str(error) if known else f"this release of SGLang is not understood ({error!r})"
    if agreement.least(int(kv is not None)):
        return kv
    logger.warning("LMCache serves nothing for this engine: %s", refusal)
    return None
