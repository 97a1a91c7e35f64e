"""The controller that scripts of the public project ask: one server's verbs for it and its fellow servers, named by instance.

A controller knows its servers from its configuration only, and asks them over HTTP with the token, all at the same time and each
once. It keeps nothing but the moves that it has begun. The methods block; any thread but the loop's may call them.
"""

from __future__ import annotations

import secrets
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, Protocol
from urllib.parse import quote, urlsplit

import msgspec

from lmcache.cache import Refusal
from lmcache.config.hosts import addresses
from lmcache.config.server import ServerConfig
from lmcache.errors import ConfigError, LMCacheError, ServerRefused, ServerUnavailable
from lmcache.observability.log import init_logger, printable, redacted
from lmcache.runtime import RUNTIME, Runtime
from lmcache.server.named import MOST_TOKENS, Unknown
from lmcache.server.operating import Looked, Operating, ToDelete, ToPin, ToPrefetch
from lmcache.wire.http_client import ask

logger = init_logger(__name__)
L1_LOCATIONS = "", "LocalCPUBackend", "L1"
MOST_MOVES = 4
_KEPT_MOVES = 1000
_ASK_SECONDS, _ROUND_SECONDS, _MOVE_SECONDS = 3.0, 5.0, 600.0
"""Timeouts of one server's answer, of a round trip to all, and of a move."""
_POLL_SECONDS = 0.2
_THREADS = 32
_MOST_SAID = 500
"""Characters of what another server says that are kept and passed on."""
NO_COMPRESSION = (
    "KV is encoded where it is stored, not on request: a tier's URL says `codec=auto` or `codec=pack12` (docs/codecs.md), and L1 "
    "holds KV as engines use it, so there is nothing to compress or decompress"
)
_Token = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
_Text = Annotated[str, msgspec.Meta(max_length=4096)]


class Asked(msgspec.Struct):
    """What the public project's requests have. Positions: instance and location. A field that is not named here is ignored."""

    tokens: Annotated[list[_Token], msgspec.Meta(max_length=MOST_TOKENS)] | None = None
    instance_id: _Text = ""
    location: _Text = ""
    old_position: tuple[_Text, _Text] | None = None
    new_position: tuple[_Text, _Text] | None = None
    copy: bool = False
    event_id: _Text = ""
    ip: _Text = ""
    model: _Text = ""
    cache_salt: _Text = ""

    def prompt(self) -> dict[str, Any]:
        """Return the prompt as the verbs of a server take it. Raises ConfigError if there is none."""
        if self.tokens is None:
            raise ConfigError('"tokens": the token ids of the prompt are missing')
        return {"tokens": self.tokens, "model": self.model, "cache_salt": self.cache_salt}


class Member(Protocol):
    """One server that a controller asks."""

    host: str
    """Its name or address; "" for the server itself."""

    def call(self, verb: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """Run a verb: instance, lookup, pin, delete, clear, prefetch, prefetched or health.

        Raises:
            LMCacheError: it declines or does not answer.
        """
        ...


class Here:
    """The server itself. clear, health: as in `Control`."""

    host = ""

    def __init__(
        self,
        operating: Operating,
        clear: Callable[[str], dict[str, object]],
        health: Callable[[], tuple[bool, str]],
    ) -> None:
        self._operating, self._clear, self._health = operating, clear, health

    def call(self, verb: str, content: Mapping[str, Any]) -> dict[str, Any]:
        own = self._operating
        doing: dict[str, Callable[[], dict[str, Any]]] = {
            "instance": lambda: own.who,
            "lookup": lambda: own.lookup(msgspec.convert(content, Looked)),
            "pin": lambda: own.pin(msgspec.convert(content, ToPin)),
            "delete": lambda: own.delete(msgspec.convert(content, ToDelete)),
            "prefetch": lambda: own.prefetch(msgspec.convert(content, ToPrefetch)),
            "prefetched": lambda: own.prefetched(content["id"]),
            "clear": lambda: self._clear(content.get("tiers", "")),
            "health": lambda: {"healthy": self._health()[0]},
        }
        return doing[verb]()


class There:
    """Another server, at the URL of its HTTP endpoint."""

    _ROUTES: Mapping[str, tuple[str, str]] = {
        "instance": ("GET", "/cache/models"),
        "lookup": ("POST", "/cache/lookup"),
        "pin": ("POST", "/cache/pins"),
        "delete": ("POST", "/cache/delete"),
        "clear": ("POST", "/cache/clear"),
        "prefetch": ("POST", "/cache/prefetches"),
        "prefetched": ("GET", "/cache/prefetches/{id}"),
        "health": ("GET", "/healthcheck"),
    }

    def __init__(self, url: str, token: Callable[[], str]) -> None:
        self.url, self._token = url, token
        self.host = urlsplit(url).hostname or ""

    def call(self, verb: str, content: Mapping[str, Any]) -> dict[str, Any]:
        method, path = self._ROUTES[verb]
        tiers = content.get("tiers") if verb == "clear" else ""
        path = path.format(id=quote(str(content.get("id", ""))[:200], safe="")) + (
            f"?tiers={quote(tiers)}" if tiers else ""
        )
        body = content if method == "POST" and verb != "clear" else None
        status, told = ask(self.url, path, method, self._token(), _ASK_SECONDS, body)
        if verb == "health":
            return {"healthy": status == 200}
        if status in (200, 202):
            return told
        reason = f"{redacted(self.url)}: {printable(str(told.get('reason', f'HTTP {status}')), _MOST_SAID)}"
        raise {404: Unknown, 400: ConfigError, 409: Refusal}.get(status, ServerRefused)(reason)


class Controller:
    """members: the servers it asks. runtime: clock and threads."""

    def __init__(self, members: Sequence[Member], runtime: Runtime = RUNTIME) -> None:
        self._members, self._runtime = members, runtime
        self._pool: Executor | None = None
        self._moves: OrderedDict[str, str] = OrderedDict()
        """Event -> its status: moving, finished, or why it failed."""

    def lookup(self, asked: Asked) -> dict[str, object]:
        """Return where the beginning of a prompt is in L1: instance -> [location, tokens], the most tokens first."""
        found, silent = self._all("lookup", asked.prompt() | {"tiers": False})
        held = dict[str, int]()
        for told in found.values():  # two servers of one name: the most that one has; the other verbs refuse the name
            name = str(told.get("instance_id", ""))
            held[name] = max(held.get(name, 0), _most_tokens(told))
        ranked = sorted(((name, count) for name, count in held.items() if count), key=lambda one: -one[1])
        info: object = {name: [L1_LOCATIONS[1], count] for name, count in ranked}
        return {"event_id": _event("lookup"), "layout_info": info} | ({"unanswered": silent} if silent else {})

    def pin(self, asked: Asked) -> dict[str, object]:
        """Pin what an instance has of a prompt in L1, for an hour."""
        _check_location(asked.location)
        told = self._member(asked.instance_id).call("pin", asked.prompt())
        return {"event_id": f"pin{told.get('id')}", "num_tokens": told.get("pinned_tokens", 0)}

    def clear(self, asked: Asked) -> dict[str, object]:
        """Empty an instance's L1, or remove one prompt from it. Location `all` or a tier's name: from tiers, too."""
        tiers = "" if asked.location in L1_LOCATIONS else asked.location
        member = self._member(asked.instance_id)
        if asked.tokens is None:
            member.call("clear", {"tiers": tiers})
            return {"event_id": _event("clear"), "num_tokens": 0, "success": True}
        held = _most_tokens(member.call("lookup", asked.prompt() | {"tiers": False}))
        member.call("delete", asked.prompt() | {"tiers": tiers})
        left = _most_tokens(member.call("lookup", asked.prompt() | {"tiers": False}))
        return {"event_id": _event("clear"), "num_tokens": held - left, "success": True}

    def move(self, asked: Asked) -> dict[str, object]:
        """Let an instance load a prompt from its peers or tiers, and then remove it from the old one, unless `copy`."""
        if asked.old_position is None or asked.new_position is None:
            raise ConfigError('"old_position" and "new_position": each must be [instance, location]')
        for _, location in (asked.old_position, asked.new_position):
            _check_location(location)
        old, new = self._member(asked.old_position[0]), self._member(asked.new_position[0])
        if old is new:
            raise ConfigError(f"{asked.new_position[0]}: the KV is there; a move needs two instances")
        prompt = asked.prompt()
        held = _most_tokens(old.call("lookup", prompt | {"tiers": False}))
        if not held:
            raise Unknown(f"{asked.old_position[0]} has nothing of this prompt in L1")
        if list(self._moves.values()).count("moving") >= MOST_MOVES:
            raise Refusal(f"{MOST_MOVES} moves run already: wait for one of them (POST /check_finish)")
        begun, event = new.call("prefetch", prompt), _event("move")
        prompt["model"] = str(begun.get("model", ""))[:_MOST_SAID]  # only what moves is removed from the old place
        self._moves[event] = "moving"
        while len(self._moves) > _KEPT_MOVES:
            self._moves.popitem(last=False)
        last = partial(self._finish, event, old, new, str(begun.get("id")), prompt, held, asked.copy)
        self._runtime.start(last, "lmcache-move")
        return {"event_id": event, "num_tokens": held}

    def _finish(
        self, event: str, old: Member, new: Member, name: str, prompt: dict[str, Any], promised: int, copies: bool
    ) -> None:
        """Wait for the load of a move, and remove the prompt from its old place when all of it has arrived."""
        try:
            self._moves[event] = self._moved(old, new, name, prompt, promised, copies)
        except Exception as error:  # top of the thread
            if not isinstance(error, LMCacheError):
                logger.exception("A move failed")
            self._moves[event] = f"failed: {error}"

    def _moved(self, old: Member, new: Member, name: str, prompt: dict[str, Any], promised: int, copies: bool) -> str:
        end = self._runtime.now() + _MOVE_SECONDS
        while (told := new.call("prefetched", {"id": name})).get("state") == "loading":
            if self._runtime.now() > end:
                return f"failed: the load has not ended within {_MOVE_SECONDS:g} s; nothing was removed"
            self._runtime.sleep(_POLL_SECONDS)
        # Meanwhile the old place may have got more of the prompt, or evicted what the caller was told would move.
        held = max(promised, _most_tokens(old.call("lookup", prompt | {"tiers": False})))
        if int(told.get("l1_tokens", 0)) < held:
            arrived = f"{told.get('l1_tokens')} of {held} tokens have arrived"
            why = printable(str(told.get("reason", "")), _MOST_SAID)
            asked = "is the old place a peer of the new one, and does it still have the prompt?"
            return f"failed: {arrived}, so nothing was removed: {asked}{why and f' The new place says: {why}'}"
        if not copies:
            old.call("delete", prompt)
        return "finished"

    def check_finish(self, asked: Asked) -> dict[str, object]:
        """Return whether an event has finished. All events but moves finish before they are answered."""
        status = self._moves.get(asked.event_id)
        if status is None and asked.event_id.startswith("move"):
            raise Unknown(f"{asked.event_id[:80]}: this controller has begun no such move")
        return {"status": status or "finished"}

    def health(self, asked: Asked) -> dict[str, object]:
        """Return 0 for an instance that is healthy, 1 for one that is not."""
        healthy = bool(self._member(asked.instance_id).call("health", {}).get("healthy"))
        return {"event_id": _event("health"), "error_codes": {"0": 0 if healthy else 1}}

    def query_instance(self, asked: Asked) -> dict[str, object]:
        """Return the instance at an address."""
        found, _ = self._all("instance", {})
        for member, told in found.items():
            if asked.ip in _addresses_of(member.host):
                name = str(told.get("instance_id", ""))
                return {"event_id": _event("query_instance"), "instance_id": name, "res": name}
        raise Unknown(f"{asked.ip[:80]}: no server that this controller asks has this address")

    def instances(self) -> dict[str, object]:
        """Return the instances that answer now."""
        found, silent = self._all("instance", {})
        names = [
            {"instance_id": str(told.get("instance_id", "")), "host": member.host} for member, told in found.items()
        ]
        return {"instances": names} | ({"unanswered": silent} if silent else {})

    # Asking

    def _member(self, instance: str) -> Member:
        """Return the member of this name; the only one if no name is given.

        Raises:
            Unknown: none that answers has the name.
            ConfigError: several have it.
        """
        if not instance and len(self._members) == 1:
            return self._members[0]
        found, silent = self._all("instance", {})
        # The same server may be there twice, since all servers may be told the same list.
        named = {
            str(told.get("server_id", member.host)): member
            for member, told in reversed(found.items())
            if told.get("instance_id") == instance
        }
        if len(named) > 1:
            raise ConfigError(
                f'"instance_id" {instance[:200]!r}: {len(named)} servers are called so: give each an --instance-id of its own'
            )
        if named:
            return next(iter(named.values()))
        known = ", ".join(str(told.get("instance_id")) for told in found.values()) or "none"
        lost = f"; no answer from {', '.join(silent)}" if silent else ""
        raise Unknown(f'"instance_id" {instance[:200]!r}: no such server; known: {known}{lost}')

    def _all(self, verb: str, content: Mapping[str, Any]) -> tuple[dict[Member, dict[str, Any]], list[str]]:
        """Ask all members at the same time. Return the answers, and the hosts of those that did not answer in time.

        Raises:
            ConfigError, Refusal: the request is wrong, so that all decline it.
        """
        if len(self._members) == 1:
            return {self._members[0]: self._members[0].call(verb, content)}, []
        if self._pool is None:
            self._pool = self._runtime.pool(min(_THREADS, len(self._members)), "lmcache-controller")
        asked = [(one, self._pool.submit(one.call, verb, content)) for one in self._members]
        end, found, silent, wrong = (
            self._runtime.now() + _ROUND_SECONDS,
            dict[Member, dict[str, Any]](),
            list[str](),
            list[Exception](),
        )
        for member, future in asked:
            try:
                found[member] = self._within(future, end)
            except Unknown:
                pass  # it does not know the model
            except (FutureTimeout, ServerUnavailable, ServerRefused) as error:
                silent.append(member.host or "this server")
                logger.warning("The controller got no answer to %s: %s", verb, error)
            except (ConfigError, Refusal) as error:
                wrong.append(error)
        if wrong and not found:
            raise wrong[0]
        return found, silent

    def _within(self, future: Future[dict[str, Any]], end: float) -> dict[str, Any]:
        return future.result(max(0.0, end - self._runtime.now()))


def instance_name(config: ServerConfig) -> str:
    """Return the name of a server: the configured one, or that of its host and its port of HTTP."""
    return config.instance_id or f"{socket.gethostname()}:{config.http_port}"


def _event(kind: str) -> str:
    return f"{kind}{secrets.token_hex(8)}"


def _most_tokens(told: Mapping[str, Any]) -> int:
    """Return how many tokens of a prompt are in L1 by the answer of a lookup, of several models the most."""
    models = told.get("models")
    counts = [one.get("l1_tokens", 0) for one in models if isinstance(one, dict)] if isinstance(models, list) else []
    return max([0, *(one for one in counts if isinstance(one, int))])


def _check_location(location: str) -> None:
    if location not in L1_LOCATIONS:
        raise ConfigError(
            f"location {location[:80]!r}: only {L1_LOCATIONS[1]} (L1) can be named here; tiers keep KV by themselves"
        )


def _addresses_of(host: str) -> set[str]:
    """Return the host's name and addresses; of this host "" stands for all it has."""
    names: Iterable[str] = (host,) if host else ("localhost", socket.gethostname())
    found = set(names)
    for name in names:
        with suppress(OSError):
            found.update(addresses(name))
    return found
