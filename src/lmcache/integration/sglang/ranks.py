"""One scheduler process of SGLang, which is also one rank of the model: its requests and its copies.

Every rank runs the same scheduler and must come to the same decisions. So the ranks agree (`Agreement`) on every value that a
decision depends on. Each rank looks up and leases for itself; the number of tokens to load is the least that any rank has found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcache.engine import Copies, Copy, LoadPlan, Request, StorePlan
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
    """A load or store that SGLang waits for. Without a copy there was nothing to do, and it has ended and succeeded."""

    copies: Copies | None = None
    copy: Copy | None = None

    @property
    def ok(self) -> bool:
        """Whether the copy has ended and succeeded. Call `ended` first: only that notices the end."""
        return self.copy is None or self.copy.ok

    def ended(self) -> bool:
        """Return whether the copy has ended and no longer touches paged KV. Does not wait."""
        if self.copies is not None:
            self.copies.collect()
        return self.copy is None or self.copy.done is not None

    def result(self, timeout: float | None = None) -> bool:
        """Wait until the copy has ended. Return whether it succeeded.

        Raises:
            TimeoutError: the copy has not ended after `timeout` seconds.
        """
        if self.copies is not None and self.copy is not None and not self.copies.wait([self.copy], timeout):
            raise TimeoutError(
                f"{self.copy.plan.job_id} of {self.copy.plan.tokens} tokens has not ended after {timeout} s"
            )
        return self.ok


@dataclass
class Tracker(Request):
    """One request of SGLang.

    tokens: int64 [tokens], all tokens of the request that are known so far. hit_tokens: how many leading tokens all ranks can
    load. copies: its stores, for the log. handed: how many leading tokens SGLang has passed for storing.

    The next three measure how fast this engine computes prompts. prompt_tokens: length of the prompt; 0 if a part of it is
    loaded, since then nothing is measured. computed: how many of its leading tokens have KV. since: when that was so, in seconds
    of the runtime's clock.
    """

    tokens: Tokens = field(default_factory=lambda: np.zeros(0, np.int64))
    hit_tokens: int = 0
    copies: list[Copy] = field(default_factory=list)
    handed: int = 0
    prompt_tokens: int = 0
    computed: int = 0
    since: float = 0.0


class SGLangRank(LocalRank[Tracker]):
    """The requests and copies of one rank. Methods do not raise.

    kv: the groups of the model's KV. name: the engine's name, the same on all ranks. vocabulary: how many token ids stand for
    text; images have other numbers. server: the engine's own server, if this process has started it; it is closed with this
    object.
    """

    def __init__(
        self,
        settings: ServerSettings,
        kv: Sequence[ServedKV],
        ranks: Ranks,
        name: str,
        vocabulary: int,
        server: EmbeddedServer | None,
    ) -> None:
        self._vocabulary, self._server = vocabulary, server
        # Each rank leases and copies for itself in one process, so the server treats each rank as an engine of its own.
        where = settings.address or embedded_address(name)
        endpoint = settings.endpoint(f"{name}-{ranks.number}", "", ranks.number, where)
        super().__init__(endpoint, kv[0], name=name, ended=self._ended, others=kv[1:])
        self.groups = tuple(kv)
        self.wait_for_server(server)
        on_new_weights(self._new_weights, self._wait_for_stores)

    def text_of(self, tokens: Any) -> Tokens:
        """Return the leading tokens that are text, as int64 [tokens]. This is a copy, since SGLang's arrays may grow later."""
        ids = np.array(tokens, dtype=np.int64)
        other = (ids < 0) | (ids >= self._vocabulary)
        return ids[: int(other.argmax())] if other.any() else ids

    def tables(self, slots: Sequence[Any], page_size: int, start: int, end: int) -> tuple[list[Blocks], Event | None]:
        """Return the block table of each group for a copy of tokens [start, end), and the event after which all are filled.

        slots: for each group a tensor: the slots of the tokens from `start` on, or the one slot of the state at `end`.
        """
        made = [
            block_table(one, 1, end - 1) if kv.model.kind == "state" else block_table(one, page_size, start)
            for kv, one in zip(self.groups, slots, strict=True)
        ]
        return [table for table, _ in made], made[-1][1]  # in a stream, the last one is filled after all others

    def settle(self, future: Future, progress: Progress | None = None) -> bool:
        """Wait for a load and return whether it succeeded. A load that has not ended within the deadline is cancelled.

        The load then no longer touches paged KV. With its `progress`, however, this returns True as soon as all of the load has
        been handed to the device. From then on only the device can fail, and the forward has to wait for the layers.
        """
        copy, now = future.copy, self.requests.runtime.now
        if copy is None:
            return False
        end = now() + self.deadline_seconds
        if progress is not None and progress.wait_recorded(len(self.kv.paged.planes), self.deadline_seconds):
            return not future.ended() or copy.ok
        return self.copies.settle([copy], max(0.0, end - now()))

    def log_stores(self, copies: Sequence[Copy], total: int, chunked: int, whose: str = "") -> None:
        """Log what the stores of one request have copied, of its `total` tokens, of which `chunked` are in full chunks.

        Tokens in full chunks that were not copied count as skipped: the server had them, or had no memory for them.
        """
        line = stored_line(copies, total, self.kv.paged.token_bytes)
        if line:
            skipped = chunked - sum(copy.done.tokens for copy in copies if copy.done is not None)
            logger.info("%s; skipped: %d tokens%s", line, skipped, whose)

    def _new_weights(self, kv_in_use: bool) -> None:
        """Serve none of the KV that was stored before to this engine, and none that it stores from now on to another engine.

        kv_in_use: whether SGLang still has KV of the old weights, in the radix tree or in a running request. Nothing is stored
        then until SGLang has emptied the tree.
        """
        self.requests.reset(None if kv_in_use else -1)
        logger.info("The weights of this engine change: it no longer uses the KV that it has stored in LMCache so far")

    def _wait_for_stores(self) -> None:
        """Wait until all stores have ended, which takes as long as a call to the server may take."""
        if not self.copies.wait(self.copies.running(StorePlan), self.deadline_seconds):
            logger.warning(
                "Stores have not ended within %g s; SGLang may refuse what it was asked", self.deadline_seconds
            )

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
    buffers: Callable[[], Sequence[Buffers]],
    model_config: Any,
    page_size: int,
    ranks: Ranks,
    agreement: Agreement,
    name: str,
) -> SGLangRank | None:
    """Return this rank, or None if the KV of any rank cannot be cached. All ranks get the same answer; a log line has the reason.
    Rank 0 starts the engine's own server if the settings name none.

    buffers: returns the groups of layers in SGLang's KV pool. page_size: tokens in a page. name: the engine's name, the same on
    all ranks.
    """
    kv, server, vocabulary, refusal = None, None, 0, "another rank's KV cannot be cached"
    try:
        vocabulary = int(model_config.vocab_size)
        own = {"model_id": settings.model_id, "engine_id": name, "lossy_kv": settings.lossy_kv}
        kv = describe_rank(buffers(), model_config, page_size, ranks, **own)
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
    """Return a block table, int32 [pages], for a copy of the tokens from `start` on, and the event after which it is filled.

    indices: a tensor [tokens] on any device: the slots in SGLang's KV pool of the tokens from `start` on. start: the first token
    of a page. The table begins at token 0; its entries before `start` are 0, and the copy does not use them. The event is None if
    the table is filled already. From a GPU the table is copied in the background: waiting here would mean waiting for the forward
    that runs there.
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
