"""One scheduler process of SGLang, which is also one rank of the model: its requests and its copies.

Every rank runs the same scheduler and must come to the same decisions, so whatever a decision hangs on is agreed among them
(`Agreement`). Each rank looks up for itself and leases for itself; a load is of as many tokens as all of them were granted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcache.engine import Copies, Copy, LoadPlan, Request
from lmcache.engine.agreement import Agreement
from lmcache.engine.copies import retrieved_line, stored_line
from lmcache.engine.embedded import NOT_STARTED, EmbeddedServer, embedded_address, start_own_server
from lmcache.engine.jobs import Event
from lmcache.engine.local import LocalRank
from lmcache.engine.served import NOT_SERVED, ServedKV, refusal_of
from lmcache.engine.settings import ServerSettings
from lmcache.integration.sglang.model import Buffers, Ranks, describe_rank
from lmcache.integration.sglang.weights import forget, on_new_weights
from lmcache.observability.log import init_logger
from lmcache.transfer.bounds import Blocks
from lmcache.transfer.progress import Progress

logger = init_logger(__name__)

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Future:
    """A load or store, as SGLang waits for it; one without a copy has nothing to do and has ended."""

    copies: Copies | None = None
    copy: Copy | None = None

    @property
    def ok(self) -> bool:
        """Whether it has ended and succeeded."""
        return self.copy is None or self.copy.ok

    def ended(self) -> bool:
        """Whether it touches paged KV no more; does not wait."""
        if self.copies is not None:
            self.copies.collect()
        return self.copy is None or self.copy.done is not None

    def result(self, timeout: float | None = None) -> bool:
        """Wait until it has ended. Return whether it succeeded.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds.
        """
        if self.copies is not None and self.copy is not None and not self.copies.wait([self.copy], timeout):
            raise TimeoutError(
                f"{self.copy.plan.job_id} of {self.copy.plan.tokens} tokens has not ended after {timeout} s"
            )
        return self.ok


@dataclass
class Tracker(Request):
    """One request. tokens: all that are known. hit_tokens: those that all ranks can load. copies: its stores, for the log.
    handed: tokens that were handed over. prompt_tokens, computed, since: its prompt, where nothing of it is loaded; of that, what
    is there; the rest is being computed since then."""

    tokens: Tokens = field(default_factory=lambda: np.zeros(0, np.int64))
    hit_tokens: int = 0
    copies: list[Copy] = field(default_factory=list)
    handed: int = 0
    prompt_tokens: int = 0
    computed: int = 0
    since: float = 0.0


class SGLangRank(LocalRank[Tracker]):
    """Requests and copies of one rank. Nothing raises. vocabulary: token ids from this one on stand for what is not text.
    server: the engine's own server, if this process has started it; it is closed with this object."""

    def __init__(
        self,
        settings: ServerSettings,
        kv: ServedKV,
        ranks: Ranks,
        name: str,
        vocabulary: int,
        server: EmbeddedServer | None,
    ) -> None:
        self._vocabulary, self._server = vocabulary, server
        # Each rank leases and copies for itself, in one process, so each is an engine of its own to the server.
        where = settings.address or embedded_address(name)
        endpoint = settings.endpoint(f"{name}-{ranks.number}", "", ranks.number, where)
        super().__init__(endpoint, kv, name=name, ended=self._ended)
        self.wait_for_server(server)
        on_new_weights(self._new_weights)

    def text_of(self, tokens: Any) -> Tokens:
        """Return a copy of the leading tokens that are text: SGLang's arrays may grow meanwhile. SGLang represents images by
        numbers beyond the vocabulary."""
        ids = np.array(tokens, dtype=np.int64)
        other = (ids < 0) | (ids >= self._vocabulary)
        return ids[: int(other.argmax())] if other.any() else ids

    def settle(self, future: Future, progress: Progress | None = None) -> bool:
        """Wait for a load, a deadline at most: then it is called off. It touches paged KV no more. True when it succeeded.

        progress: of the load, where it need not have ended. Then wait until all of it has been handed to the device: from there
        on it cannot fail, short of the device itself.
        """
        copy, now = future.copy, self.requests.runtime.now
        if copy is None:
            return False
        end = now() + self.deadline_seconds
        if progress is not None and progress.wait_recorded(len(self.kv.paged.planes), self.deadline_seconds):
            return not future.ended() or copy.ok
        return self.copies.settle([copy], max(0.0, end - now()))

    def log_stores(self, copies: Sequence[Copy], total: int, chunked: int, whose: str = "") -> None:
        """What stores have come to: of `total` tokens `chunked` are in full chunks. Those that were not copied were there before,
        or got no room."""
        line = stored_line(copies, total, self.kv.paged.token_bytes)
        if line:
            skipped = chunked - sum(copy.done.tokens for copy in copies if copy.done is not None)
            logger.info("%s; skipped: %d tokens%s", line, skipped, whose)

    def _new_weights(self, kv_in_use: bool) -> None:
        """Serve the KV of before to this engine no more, and that of the new weights to nobody else. kv_in_use: the radix tree
        has KV, or a request that runs has some, which will get into the tree."""
        self.requests.reset(None if kv_in_use else -1)
        logger.info("The weights of this engine change: what LMCache holds of it so far is not used any more")

    def close(self) -> None:
        forget(self._new_weights)
        super().close()
        if self._server is not None:
            self._server.close()

    def _ended(self, copy: Copy) -> None:
        if isinstance(copy.plan, LoadPlan) and copy.done is not None and copy.ok:
            logger.info("%s", retrieved_line(copy.plan, copy.done, self.kv.paged.token_bytes))


def open_rank(
    settings: ServerSettings,
    buffers: Callable[[], Buffers],
    model_config: Any,
    page_size: int,
    ranks: Ranks,
    agreement: Agreement,
    name: str,
) -> SGLangRank | None:
    """This rank, if every rank can be served: they all serve from LMCache, or none does, and a line says why. Rank 0 starts the
    engine's own server, if it is to have one."""
    kv, server, vocabulary, refusal = None, None, 0, "another rank cannot be served; its log says why"
    try:
        vocabulary = int(model_config.vocab_size)
        kv = describe_rank(buffers(), model_config, page_size, ranks, model_id=settings.model_id, engine_id=name)
        if not settings.address and not ranks.number:
            server = start_own_server(name, settings.config)
            kv, refusal = (kv, refusal) if server is not None else (None, NOT_STARTED)
    except NOT_SERVED as error:
        refusal = refusal_of(error, "SGLang")
    if agreement.least(int(kv is not None)) and kv is not None:
        return SGLangRank(settings, kv, ranks, name, vocabulary, server)
    if server is not None:
        server.close()
    logger.warning("LMCache serves nothing for this engine: %s", refusal)
    return None


def block_table(indices: Any, page_size: int, start: int) -> tuple[Blocks, Event | None]:
    """Pages from token 0 on of which those before token `start`, which begins a page, are never looked at.

    indices: a tensor [tokens] on any device, the slots of the tokens from `start` on. Returns int32 [pages], and the point behind
    which they are filled: to wait for a GPU's here would be to wait for the forward that it computes. None: they are.
    """
    slots, before = indices[::page_size], start // page_size
    if not getattr(slots, "is_cuda", False):
        pages = np.asarray(slots, dtype=np.int64) // page_size
        return np.concatenate((np.zeros(before, np.int32), pages.astype(np.int32))), None
    import torch

    table = torch.zeros(before + len(slots), dtype=torch.int32, pin_memory=True)
    table[before:].copy_((slots // page_size).to(torch.int32), non_blocking=True)
    filled: Any = torch.cuda.Event(blocking=True)
    filled.record()
    return table.numpy(), filled
