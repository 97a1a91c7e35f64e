"""The verbs of operators: look up, pin, unpin, list, delete and prefetch the KV of prompts. The HTTP routes are a skin over them.

Any thread may call them, except the loop's. Each resolves the prompt in the caller's thread, and asks L1 in the loop's.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from typing import Annotated

import msgspec

from lmcache.cache.allocator import Space
from lmcache.cache.managing import REMOVED_AT_ONCE, Listed, Pin
from lmcache.chunks import HASH_BYTES, split_hashes
from lmcache.config.server import ServerConfig
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger, printable
from lmcache.server.loop import Loop
from lmcache.server.named import Named, Prompt, Unknown, named, only
from lmcache.server.prefetching import Prefetches
from lmcache.server.service import Service
from lmcache.server.tier_contents import complete_chunks, most_asked, shard_keys
from lmcache.server.tier_runner import TierRunner
from lmcache.server.usage import usage
from lmcache.tiers import ShardKey

logger = init_logger(__name__)
MOST_PIN_SECONDS = 7 * 86400.0
LISTED = 1000
"""One page of a list has at most so many chunks."""
_LISTED_AT_ONCE, _MOST_LOOKED_AT = 50, 20000
"""Records that are looked at in one turn of the loop, and for one page, which has fewer chunks then."""
_TIER_SECONDS = 1.0
"""How long a lookup waits for tiers; what has not answered by then is left out, and named."""
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=MOST_PIN_SECONDS)]
_Note = Annotated[str, msgspec.Meta(max_length=200)]


class Looked(Prompt, forbid_unknown_fields=True):
    """What to look up. tiers: whether tiers are asked, too, peers among them."""

    tiers: bool = True


class ToPin(Prompt, forbid_unknown_fields=True):
    """What to pin, for how long, and what for."""

    seconds: _Seconds = 3600.0
    note: _Note = ""


class ToDelete(Prompt, forbid_unknown_fields=True):
    """What to delete from L1. tiers: `all`, or names separated by commas: also from these tiers."""

    tiers: Annotated[str, msgspec.Meta(max_length=1000)] = ""


class ToPrefetch(Prompt, forbid_unknown_fields=True):
    """What to load from tiers into L1. pin_seconds: pin it for so long as soon as it is there."""

    pin_seconds: Annotated[float, msgspec.Meta(ge=0, le=MOST_PIN_SECONDS)] = 0.0
    note: _Note = ""


class Operating:
    """The verbs of one server, which is called `instance`. Answers are JSON objects.

    Every verb that takes a prompt raises what `named` does, and Refusal if the prompt has too many chunks.
    """

    def __init__(self, config: ServerConfig, loop: Loop, service: Service, instance: str) -> None:
        self._config, self._loop, self._service, self._instance = config, loop, service, instance
        self._prefetches = Prefetches(loop, service.l1, service.tiering, self._pin_prefetched)

    def _named(self, prompt: Prompt) -> list[Named]:
        models = self._loop.ask(self._service.models.known)
        return named(prompt, models, self._config.chunk_size, self._config.tokenizer_url)

    # Looking

    def lookup(self, prompt: Looked) -> dict[str, object]:
        """Return for each model that the prompt may mean how many of its tokens are in L1, and how many more each tier has."""
        return {
            "instance_id": self._instance,
            "chunk_size": self._config.chunk_size,
            "models": [self._looked(one, prompt.tiers) for one in self._named(prompt)],
        }

    def _looked(self, one: Named, tiers: bool) -> dict[str, object]:
        found = self._loop.ask(partial(self._service.l1.usable, one.model.spaces, one.hashes))
        size, whole = self._config.chunk_size, len(one.hashes) // HASH_BYTES
        told = {**one.model.described(), "tokens": one.tokens or whole * size, "l1_tokens": one.tokens_of(found, size)}
        if not tiers or self._service.tiering is None:
            return told
        has, silent = self._in_tiers(one, found)
        more = {name: one.tokens_of(found + chunks, size) - one.tokens_of(found, size) for name, chunks in has.items()}
        return told | {"tier_tokens": more} | ({"unanswered_tiers": silent} if silent else {})

    def _in_tiers(self, one: Named, found: int) -> tuple[dict[str, int], list[str]]:
        """Return how many chunks each tier has that follow the first `found` ones, and the tiers that did not answer in time."""
        space = self._loop.ask(partial(self._service.l1.space, one.model.spaces[0]))
        if space is None or not all(space.shard_bytes):
            return {}, []
        missing = one.hashes[found * HASH_BYTES : (found + most_asked(space)) * HASH_BYTES]
        keys, answers = shard_keys(space, missing), dict[str, Future[list[bool]]]()

        def ask() -> None:
            for runner in self._service.tiering.runners if self._service.tiering is not None else ():
                answers[runner.name] = answer = Future[list[bool]]()
                if not keys:
                    answer.set_result([])
                elif runner.usable(self._loop.now()):
                    _ask_tier(runner, keys, answer)
                else:
                    answer.set_exception(_Failed())

        self._loop.ask(ask)
        end, has, silent = self._loop.now() + _TIER_SECONDS, dict[str, int](), list[str]()
        for name, answer in answers.items():
            try:
                whole = complete_chunks(answer.result(max(0.0, end - self._loop.now())), space.shards)
                has[name] = next((at for at, one in enumerate(whole) if not one), len(whole))
            except (FutureTimeout, _Failed):
                silent.append(name)
        return has, silent

    @property
    def who(self) -> dict[str, object]:
        """What the server is called, and the id that no other one has."""
        return {"instance_id": self._instance, "server_id": self._service.sessions.server_id.hex()}

    def models(self) -> dict[str, object]:
        """Return the models that callers can name."""
        return self.who | {"models": [one.described() for one in self._loop.ask(self._service.models.known)]}

    def objects(self, model: str = "", space: int = -1, after: int = 0, limit: int = 100) -> dict[str, object]:
        """Return some chunks of L1, of all models or of one, and `next`: the `space` and `after` of the next page, or null.

        Raises:
            Unknown: no such model or space.
        """

        l1, first = self._service.l1, after + 1
        numbers = self._loop.ask(lambda: [one.number for one in l1.spaces if one.number >= space])
        if space >= 0 and space not in numbers:
            raise Unknown(f"space {space}: L1 has no such space")
        rows: list[dict[str, object]] = []
        named, looked = False, 0
        for number in numbers:
            name = self._loop.ask(partial(self._service.model_of, number))
            named |= not model or name == model
            first = first if number == space else 1
            while first and named and (not model or name == model):
                if len(rows) >= limit or looked >= _MOST_LOOKED_AT:
                    return {"objects": rows, "next": {"space": number, "after": first - 1}}
                found, first = self._loop.ask(
                    partial(l1.listed, number, first, min(_LISTED_AT_ONCE, limit - len(rows)))
                )
                rows += (_row(one, number, name) for one in found)
                looked += _LISTED_AT_ONCE
        if not named and space < 0 and model:
            raise Unknown(f"{model[:200]}: L1 has nothing of this model")
        return {"objects": rows, "next": None}

    def usage(self, tenant: bytes | None = None) -> dict[str, object]:
        """Return the use of L1 by tenant; of one tenant alone if it is given, whatever its rank."""
        return usage(self._loop, self._service, tenant)

    # Pins

    def pin(self, prompt: ToPin) -> dict[str, object]:
        """Pin what L1 has of a prompt.

        Raises:
            Unknown: L1 has nothing of it.
            Refusal: there are too many pins, or too many bytes would be pinned.
        """
        return self._pin(only(self._named(prompt)), prompt.seconds, prompt.note)

    def _pin(self, one: Named, seconds: float, note: str) -> dict[str, object]:
        name, now = secrets.token_hex(8), self._loop.now
        asked = one.model.spaces, one.hashes, seconds, one.model.name, printable(note, 200)
        pin = self._loop.ask(lambda: self._service.l1.pin(now(), name, *asked))
        if not pin.chunks:
            raise Unknown("L1 has nothing of this prompt: prefetch it from the tiers, or send it to an engine first")
        size, whole = self._config.chunk_size, len(one.hashes) // HASH_BYTES
        logger.info("Pinned %d chunks of %s for %g s: pin %s", pin.chunks, one.model.name, seconds, name)
        counts = {"tokens": one.tokens or whole * size, "pinned_tokens": one.tokens_of(pin.chunks, size)}
        return self._described(pin) | counts

    def _pin_prefetched(self, one: Named, seconds: float, note: str) -> str:
        """Pin what has just been loaded, in the loop's thread. Returns the pin's name."""
        name = secrets.token_hex(8)
        pin = self._service.l1.pin(
            self._loop.now(), name, one.model.spaces, one.hashes, seconds, one.model.name, printable(note, 200)
        )
        return name if pin.chunks else ""

    def _described(self, pin: Pin) -> dict[str, object]:
        left = round(max(0.0, pin.until - self._loop.now()), 1)
        told = {"id": pin.name, "model": pin.model, "note": pin.note, "chunks": pin.chunks, "bytes": pin.size_bytes}
        return told | {"last_hash": pin.last.hex(), "seconds_left": left}

    def pins(self) -> dict[str, object]:
        """Return all pins, and how much of what may be pinned they hold."""
        l1 = self._service.l1
        pins, used = self._loop.ask(lambda: (l1.pins, l1.pinned_bytes))
        return {"pins": list(map(self._described, pins)), "pinned_bytes": used, "pinnable_bytes": l1.pinnable_bytes}

    def unpin(self, name: str) -> dict[str, object]:
        """End a pin.

        Raises:
            Unknown: there is none of this name.
        """
        pin = self._loop.ask(lambda: self._service.l1.unpin(name))
        if pin is None:
            raise Unknown(
                f"{name[:40]}: there is no such pin: its time is over, it was ended, or the cache was cleared"
            )
        logger.info("Unpinned %d chunks of %s: pin %s", pin.chunks, pin.model, name)
        return {"unpinned": [name]}

    def unpin_prompt(self, prompt: Prompt) -> dict[str, object]:
        """End all pins of this prompt, of whatever part of it they hold. Those of its beginnings stay: others may share these.

        Raises:
            Unknown: there is none.
        """
        ends, l1 = {one.hashes[-HASH_BYTES:] for one in self._named(prompt)}, self._service.l1
        of_it = [pin.name for pin in self._loop.ask(lambda: l1.pins) if pin.named in ends]
        ended = [name for name in of_it if self._loop.ask(partial(l1.unpin, name)) is not None]
        if not ended:
            raise Unknown("nothing of this prompt is pinned")
        return {"unpinned": ended}

    # Deleting

    def delete(self, prompt: ToDelete) -> dict[str, object]:
        """Remove a prompt from L1, and from the named tiers. What other prompts share with it, what is pinned, and what engines
        use at this moment stays.

        Raises:
            ConfigError: no such tier, or one that cannot be written to.
        """
        found, chosen = self._named(prompt), self._tiers(prompt.tiers)
        removed, size, kept = 0, 0, Counter[str]()
        for one in found:
            step = REMOVED_AT_ONCE * HASH_BYTES
            for at in reversed(range(0, len(one.hashes), step)):
                done = self._loop.ask(partial(self._service.l1.remove, one.model.spaces, one.hashes[at : at + step]))
                removed, size = removed + done.chunks, size + done.size_bytes
                kept.update(done.kept)
            if chosen:
                self._remove_from(chosen, one)
        logger.info("Deleted %d chunks of L1 by name", removed)
        told: dict[str, object] = {"deleted_chunks": removed, "deleted_bytes": size, "kept_chunks": dict(kept)}
        return told | ({"tiers": [one.name for one in chosen]} if chosen else {})

    def _tiers(self, text: str) -> list[TierRunner]:
        names = {name.strip() for name in text.split(",") if name.strip()}
        runners = list(self._service.tiering.runners) if self._service.tiering is not None else []
        known = {one.name: one for one in runners if not one.tier.read_only}
        for name in names - {"all", *known}:
            raise ConfigError(
                f'"tiers": {name[:80]}: there is no such tier to delete from; known: {", ".join(["all", *known])}'
            )
        return [one for name, one in known.items() if "all" in names or name in names]

    def _remove_from(self, runners: Sequence[TierRunner], one: Named) -> None:
        """Let these tiers remove those chunks that L1 does not have: what other prompts share stays, as far as L1 knows."""
        l1, keys = self._service.l1, split_hashes(one.hashes)

        def family(number: int) -> tuple[Space, ...]:
            space = l1.space(number)
            return (space, *space.sisters) if space is not None else ()

        for space in (each for number in one.model.spaces for each in self._loop.ask(partial(family, number))):
            gone = self._loop.ask(partial(_lacking, space, keys))
            for at in range(0, len(gone), most_asked(space)):
                named = shard_keys(space, b"".join(gone[at : at + most_asked(space)]))
                for runner in runners:
                    self._loop.ask(partial(runner.remove, named))

    # Prefetching

    def prefetch(self, prompt: ToPrefetch) -> dict[str, object]:
        """Begin to load a prompt from tiers into L1.

        Raises:
            ConfigError: the server has no tier.
            Refusal: too many prefetches run, or the prompt is too large for L1.
        """
        if self._service.tiering is None or not self._service.tiering.runners:
            raise ConfigError("the server has no tier to load from: start it with --l2 or --peers, or POST /tiers")
        one, name = only(self._named(prompt)), secrets.token_hex(8)
        begin = partial(self._prefetches.begin, name, one, self._config.chunk_size, prompt.pin_seconds, prompt.note)
        return self._loop.ask(begin)

    @property
    def running_prefetches(self) -> int:
        return self._prefetches.running

    def prefetches(self) -> dict[str, object]:
        """Return the prefetches that run and those that have ended last."""
        return {"prefetches": self._loop.ask(self._prefetches.described)}

    def prefetched(self, name: str) -> dict[str, object]:
        """Return how far a prefetch is.

        Raises:
            Unknown: there is none of this name.
        """
        return self._loop.ask(partial(self._prefetches.describe, name))

    def cancel(self, name: str) -> dict[str, object]:
        """End a prefetch. What it has loaded stays.

        Raises:
            Unknown: there is none of this name.
        """
        return self._loop.ask(partial(self._prefetches.cancel, name))


def _lacking(space: Space, keys: Sequence[bytes]) -> list[bytes]:
    """Return those of these chunks that the space does not have."""
    return [key for key in keys if space.table.get(key) < 0]


def _row(one: Listed, space: int, model: str) -> dict[str, object]:
    """Return a chunk as JSON."""
    return {
        "hash": one.key.hex(),
        "parent": one.parent.hex() if any(one.parent) else None,
        "model": model,
        "space": space,
        "bytes": one.size_bytes,
        "complete": one.complete,
        "readers": one.readers,
        "pinned": one.pinned,
    }


class _Failed(Exception):
    """A tier did not answer."""


def _ask_tier(runner: TierRunner, keys: list[ShardKey], answer: Future[list[bool]]) -> None:
    """Ask a tier which of these shards it has. An answer that comes too late says nothing about how the tier serves engines."""

    def done(present: list[bool] | None, error: Exception | None, seconds: float) -> None:
        if present is None:
            answer.set_exception(_Failed())
        else:
            answer.set_result(present)

    runner.contains(keys, _TIER_SECONDS, done, judged=False)
