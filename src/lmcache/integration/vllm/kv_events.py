"""KV events: vLLM's own structs, for routers, of the blocks that the LMCache server has for this engine.

vLLM publishes what `take_events` returns together with the events of its own cache, after each step. Their hashes and tokens are
of the same kind, so a router sees one cache with several media.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Any, Protocol

from lmcache.chunks import split_hashes
from lmcache.engine.known import L1, TIERS, Known, Prompt, Told
from lmcache.engine.requests import Requests
from lmcache.observability.log import init_logger

logger = init_logger(__name__)
CHUNKS_OF_STEP = 64
"""How many chunks are taken in at one step, in about a millisecond for chunks of 16 blocks. More wait for the next step."""


class Asked(Protocol):
    """A request that has been looked up, as `SchedulerSide` tracks it."""

    id: Hashable
    chain: Any
    hit: Any
    request: Any


class Events(Protocol):
    """Makes events of a vLLM release."""

    def blocks(self, request: Any) -> Any:
        """Return the hashes of the request's blocks, in a list that grows with the request."""
        ...

    def about(self, request: Any) -> Any:
        """Return what `event` needs of a request, without keeping its images, sounds ... alive."""
        ...

    def event(self, told: Told) -> Any: ...


class KVEvents:
    """What a scheduler publishes of what the server has. No method raises."""

    def __init__(self, requests: Requests[Any], block_tokens: int, events: Events) -> None:
        self._requests, self._events = requests, events
        self._known = Known(block_tokens)
        self._found: deque[tuple[str, bytes]] = deque()
        """Chunks of hits, as news that was not taken in yet."""
        self._restarts = self._resets = 0
        self._failed = self._silent = False
        """failed: nothing more is noted. silent: nothing more is published."""

    def looked_up(self, asked: Asked) -> None:
        """Note that a request was looked up: what was found is there."""
        session = self._requests.session
        if session is None or asked.chain is None or self._failed or not session.is_told:
            return
        try:
            self._keep_up(session)
            prompt = self._note(asked)
            hit = asked.hit
            if hit is not None and prompt.found is not hit and hit.epoch == session.epoch:  # not of a server before it
                prompt.found = hit
                self._found.append(("stored", asked.chain.hashes[: 16 * hit.chunks]))
        except Exception:
            self._fail()

    def stores(self, asked: Asked) -> None:
        """Note that a request stores chunks: the server tells when they are complete."""
        session = self._requests.session
        if session is None or asked.chain is None or self._failed or not session.is_told:
            return  # what would be noted now would be forgotten again at this step's end
        try:
            self._note(asked)
        except Exception:
            self._fail()

    def ended(self, asked: Asked) -> None:
        """Note that a request has ended."""
        if asked.chain is None or self._failed:
            return
        try:
            prompt = self._known.prompt(asked.id, asked.chain)
            if prompt is not None:
                self._known.ended(prompt)
        except Exception:
            self._fail()

    def own_cache_emptied(self) -> None:
        """Note that vLLM has published that its own cache is empty: routers then forget all media of the engine."""
        if self._failed:
            return
        try:
            self._known.tell_again()
        except Exception:
            self._fail()

    def take(self) -> list[Any]:
        """Return the events since the last call."""
        if self._failed:
            return self._farewell()
        try:
            session = self._requests.session
            if session is None or not session.is_told:
                self._forget()
            else:
                self._keep_up(session)
                self._take_in(session)
            if not self._known.told:
                return []
            events = [self._events.event(one) for one in self._known.told]
            self._known.told = []
            return events
        except Exception:
            self._fail()
            return self._farewell()

    def _keep_up(self, session: Any) -> None:
        """Forget what was told by another server, or before a reset."""
        while self._restarts != session.restarts and (one := _oldest(session.news)) is not None:
            self._take_one(one)
        if self._resets != self._requests.resets:
            self._resets = self._requests.resets
            self._forget()

    def _forget(self) -> None:
        self._found.clear()
        self._known.forget()

    def _take_in(self, session: Any) -> None:
        room = CHUNKS_OF_STEP
        while room > 0:
            waiting = self._found or session.news
            one = _oldest(waiting)
            if one is None:
                break
            if not isinstance(one, int) and len(one[1]) > 16 * room:
                waiting.appendleft((one[0], one[1][16 * room :]))
                one = one[0], one[1][: 16 * room]
            room -= max(1, self._take_one(one))
        if not session.news:
            session.ask_news()

    def _take_one(self, one: Any) -> int:
        """Take in a piece of news. Return of how many chunks it tells."""
        known = self._known
        if isinstance(one, int):
            self._restarts = one
            self._forget()
            return 0
        change, hashes = one
        medium = L1 if change in ("stored", "removed") else TIERS
        keys = split_hashes(hashes)
        if not keys:
            known.emptied(medium)
        took = known.has if change in ("stored", "written") else known.gone
        for key in keys:
            took(key, medium)
        return len(keys)

    def _note(self, asked: Asked) -> Prompt:
        prompt = self._known.prompt(asked.id, asked.chain)
        if prompt is None:
            request, events = asked.request, self._events
            prompt = Prompt(asked.chain, request.all_token_ids, events.blocks(request), events.about(request))
        self._known.note(asked.id, prompt)
        return prompt

    def _fail(self) -> None:
        """Publish nothing any more, but that nothing is there: nobody would hear when it is gone."""
        self._failed = True
        logger.exception("LMCache publishes no KV events any more for this engine, which runs on: they failed")

    def _farewell(self) -> list[Any]:
        """Return, once, the removal of all blocks that are published as stored."""
        if self._silent:
            return []
        self._silent = True
        try:
            events, known = [self._events.event(one) for one in self._known.last_words()], self._known
            self._known = Known(known.block_tokens)  # its memory is not needed any more
            return events
        except Exception:  # then routers may send this engine prompts that it computes
            logger.exception("What LMCache has published for this engine could not be taken back")
            return []


def _oldest(news: deque[Any]) -> Any:
    """Take the oldest piece of news; None if there is none, since the connection's thread may have emptied it just now."""
    try:
        return news.popleft()
    except IndexError:
        return None
