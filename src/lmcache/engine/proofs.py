"""The mutual proof before payload frames without a key: first the server proves itself to the engine, then the engine to it."""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets

from lmcache.errors import ServerRefused, ServerUnavailable
from lmcache.wire import auth
from lmcache.wire import messages as m
from lmcache.wire.carriers import ZmqCarrier

_SECONDS = 1.0
_REMEDIES = {
    auth.NO_FILE: "mount the server's --socket-dir here at the same path",
    auth.OTHER_USER: "run server and engine as the same user",
    auth.UNSAFE_FILE: "start the server anew",
    auth.OTHER_ADDRESS: "a program in between passes it on: give the engine the server's own address, or stop that program",
    auth.BEYOND_LOOPBACK: "if everybody on that network may read and write the cache, set LMCACHE_INSECURE_NO_AUTH=1",
}
_STRANGER = "`ss -ltnp` shows what it is: stop it, or give the server another --port and the engine the same"


def prove(door: ZmqCarrier, welcome: m.Welcome, hello: m.Hello, insecure: bool) -> bytes:
    """Return this engine's proof for a server that has proved itself; b"" if it has not and `insecure` allows that.

    Raises:
        ServerRefused: the server has not proved itself and gets no payload. The message says what to do.
    """
    try:
        return _prove(door, welcome)
    except auth.Unproven as error:
        if insecure:
            return b""
        if error.reason:
            door.post(m.Declined(error.reason, hello.instance, hello.role, hello.rank, hello.pid, os.getuid()))
        remedy = _REMEDIES.get(error.reason, _STRANGER)
        raise ServerRefused(f"nothing was sent to it, for {error}: {remedy}, or {auth.KEY_FOR_BOTH}") from error


def _prove(door: ZmqCarrier, welcome: m.Welcome) -> bytes:
    """As `prove`. Raises Unproven."""
    if not ipaddress.ip_address(door.host).is_loopback:
        raise auth.Unproven(auth.BEYOND_LOOPBACK, f"{door.host} is no loopback address, and no key is set")
    cookie = auth.read_cookie(welcome.cookie_path)
    nonce = secrets.token_bytes(m.NONCE_BYTES)
    try:
        proven, _ = door.exchange(m.Challenge(nonce), _SECONDS)
    except ServerUnavailable as error:
        raise auth.Unproven("", f"what listens there does not prove itself ({error})") from error
    if isinstance(proven, m.Proven):
        here = door.connection_name()
        words = welcome.server, nonce, proven.nonce
        if hmac.compare_digest(proven.proof, auth.proof(cookie, "server", *words, here)):
            return nonce + proven.nonce + auth.proof(cookie, "engine", *words, here)
        if hmac.compare_digest(proven.proof, auth.proof(cookie, "server", *words, proven.connection)):
            why = f"this connection is {here} at this end, and {proven.connection} at the server's"
            raise auth.Unproven(auth.OTHER_ADDRESS, why)
    raise auth.Unproven("", "what listens there is no server of this user")
