"""A directory of servers in a Redis or Valkey that they have anyway: each writes its address there, and reads the others'.

Whoever can write to the store could name any address, and servers would connect to it. So an address counts only with a proof
that its writer has the servers' key (`--auth-key-file`): a keyed BLAKE3 of the address. An old entry can be written again by
somebody without the key, which makes servers try an address that one of them once had, and no other.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from hmac import compare_digest

from blake3 import blake3

from lmcache.config.hosts import in_url
from lmcache.config.options import peers
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger, printable
from lmcache.peers.dial import Myself, Name
from lmcache.tiers import TierError
from lmcache.tiers.redis.leases import Leases
from lmcache.wire.auth import read_key

logger = init_logger(__name__)
LEASE_SECONDS = 30.0
"""An address that is not written again is in the directory for so long. A server that has seen it there connects to it for as
long again, so that an emptied directory ends no connection: all servers write theirs within `roster.RESOLVE_SECONDS`."""
_CONTEXT = "lmcache directory of peers v1"


class Directory:
    """shown: the store's URL for people. now: the clock. Other methods than `trouble` block, and are called by one thread at a
    time."""

    def __init__(self, leases: Leases, shown: str, now: Callable[[], float]) -> None:
        self._leases, self._shown, self._now = leases, shown, now
        self._key = b""
        self._given, self._host, self._port = "", "", 0
        self._own: str | None = None
        """The address that this server writes, "" for none; None before it is known."""
        self._seen: dict[str, float] = {}
        """The address of each other server -> when it was last seen in the directory."""
        self.trouble = ""
        """Why the directory could not be read last time; "" if it could. Any thread may read this."""
        self._strange = 0
        """The store's last answer had so many entries without a valid proof."""

    def introduce(self, myself: Myself) -> None:
        """Say who reads and writes the directory.

        Raises:
            ConfigError: the server has no key, or no port that others could know.
        """
        if myself.key_file is None:
            raise ConfigError(
                f"--peers {self._shown}: a directory needs --auth-key-file on all servers, since others may write to the store"
            )
        if not myself.address and not myself.port:
            raise ConfigError(f"--peers {self._shown}: --port 0 has no address that others could know: pass a port")
        self._key = blake3(read_key(myself.key_file), derive_key_context=_CONTEXT).digest()
        self._given, self._host, self._port = myself.address, myself.host, myself.port

    def look_up(self) -> list[Name]:
        """Write this server's address, and return those of the others. If the store fails, return those that were known last."""
        try:
            if self._own is None:
                self._own = self._address()
            texts = self._leases.renew(self._entry(self._own) if self._own else "", LEASE_SECONDS)
        except TierError as error:
            if not self.trouble:
                logger.warning(
                    "The directory of peers fails; the %d peers that it named last stay: %s", len(self._seen), error
                )
            self.trouble = f"the directory of peers: {error}"
            return self._names()
        if self.trouble:
            logger.info("The directory of peers answers again")
        self.trouble = ""
        self._note(texts)
        return self._names()

    def close(self) -> None:
        self._leases.close()

    def _note(self, texts: list[bytes]) -> None:
        now, strange = self._now(), list[bytes]()
        for text in texts:
            address = self._proved(text)
            if address is None:
                strange.append(text)
            elif address != self._own:
                self._seen[address] = now
        self._seen = {address: at for address, at in self._seen.items() if now - at <= LEASE_SECONDS}
        if len(strange) > self._strange:
            logger.warning(
                "The directory of peers has %d entries without a proof by this server's key, such as %s: they are ignored",
                *(len(strange), printable(strange[0].decode("utf-8", "replace"), 80)),
            )
        self._strange = len(strange)

    def _names(self) -> list[Name]:
        parts = (address.rpartition(":") for address in self._seen)
        return [(host.strip("[]"), int(port)) for host, _, port in parts]

    def _address(self) -> str:
        """Return the address by which others reach this server: what the user says, the address that it listens on, or, if these
        are all, the one by which it reaches the store. Raises TierError if it does not reach the store."""
        if self._given:
            return self._given
        own = ipaddress.ip_address(self._leases.own_address())
        host = ipaddress.ip_address(self._host)
        if host.is_loopback and not own.is_loopback:
            logger.warning(
                "--host %s lets nobody from other hosts in, so this server does not write its address into the directory",
                host,
            )
            return ""
        if host.is_unspecified and own.is_loopback:
            logger.warning(
                "The directory of peers is reached at %s, so this server writes that address, by which no other host finds it: "
                "if there are servers on other hosts, pass --peer-address HOST:%d",
                *(own, self._port),
            )
        return f"{in_url(str(own if host.is_unspecified else host))}:{self._port}"

    def _entry(self, address: str) -> str:
        return f"{address} {blake3(address.encode(), key=self._key).hexdigest()}"

    def _proved(self, text: bytes) -> str | None:
        """Return the address in an entry; None if nobody with the key has written it."""
        address = text.partition(b" ")[0].decode("utf-8", "replace")
        if not compare_digest(self._entry(address).encode(), text):
            return None
        try:
            return peers(address)[0]
        except (ValueError, IndexError):
            return None
