"""Short texts with a time to live in Redis or Valkey: who is there, for others who name the same store.

They are the members of one sorted set, whose scores are the ends of their lives by the store's own clock, so no clock of another
machine matters. Whoever writes also removes what has ended, and the set itself ends with the last text.
"""

from __future__ import annotations

import hashlib
import time

from lmcache.tiers.redis.nodes import Nodes
from lmcache.tiers.redis.resp import ScriptLost
from lmcache.tiers.tier import TierError

MAX_LEASES = 256
"""The most texts that one answer has."""
MAX_TEXT_BYTES = 400
"""Longer texts are not ours, and are left in the store."""

_SCRIPT = rb"""
local call, clock = redis.call, redis.call('TIME')
local now = string.format('%.0f', clock[1] * 1000 + math.floor(clock[2] / 1000))
if ARGV[1] ~= '' then
  call('ZADD', KEYS[1], string.format('%.0f', now + ARGV[2]), ARGV[1])
  call('PEXPIRE', KEYS[1], ARGV[2])
end
for _, gone in ipairs(call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, 64)) do call('ZREM', KEYS[1], gone) end
local found = {}
for _, one in ipairs(call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf', 'LIMIT', 0, ARGV[3])) do
  if #one <= tonumber(ARGV[4]) then found[#found + 1] = one end
end
return found
"""
_DIGEST = hashlib.sha1(_SCRIPT, usedforsecurity=False).hexdigest().encode()


class Leases:
    """The texts under one key. Its name is outside of what tiers with the same prefix keep and clear."""

    def __init__(self, nodes: Nodes, prefix: str, timeout_seconds: float) -> None:
        self._nodes, self._timeout_seconds = nodes, timeout_seconds
        self._tag, self._key = f"{{{prefix}}}".encode(), f"{{{prefix}}}-peers".encode()

    def own_address(self) -> str:
        """Return the numeric address by which this machine reaches the store. Raises TierError if it does not reach it."""
        try:
            deadline = self._refreshed()
            with self._nodes.of(self._tag).connection(deadline) as connection:
                return connection.own_address()
        except TierError:
            self._nodes.stale = self._nodes.moves
            raise

    def renew(self, text: str, seconds: float) -> list[bytes]:
        """Keep this text for so long from now on ("" to keep none), and return all texts that live, with this one. seconds: the
        same for all texts under one key, since the key ends with the text that was written last.

        Raises:
            TierError: the store does not answer, or not as it should.
        """
        try:
            return self._renew(text, seconds)
        except ScriptLost:
            return self._renew(text, seconds)
        except TierError:
            self._nodes.stale = self._nodes.moves
            raise

    def _renew(self, text: str, seconds: float) -> list[bytes]:
        deadline = self._refreshed()
        with self._nodes.of(self._tag).connection(deadline) as connection:
            arguments = text, int(seconds * 1000), MAX_LEASES, MAX_TEXT_BYTES
            connection.queue_script(_SCRIPT, _DIGEST, self._key, *arguments)
            reply = connection.answer()
            if not isinstance(reply, list) or not all(isinstance(one, bytes) for one in reply):
                raise TierError("protocol", f"Redis at {connection.name}: unexpected answer {reply!r:.80}")
            return [one for one in reply if isinstance(one, bytes)]

    def _refreshed(self) -> float:
        """Ask who has the key, if that may have changed. Returns the deadline of the call."""
        deadline = time.monotonic() + self._timeout_seconds
        if self._nodes.stale:
            self._nodes.refresh(deadline)
        return deadline

    def close(self) -> None:
        self._nodes.close()
