"""The connection of one engine process to the server: a thread keeps it up, and the first missed deadline closes it.

While there is no connection every call fails at once. So a dead server costs an engine one deadline, and a missing one nothing.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable, Sequence

from lmcache.engine.endpoint import Endpoint
from lmcache.engine.hello import Absent, NotThereYet, is_away, refusal_in, say_hello
from lmcache.errors import IdentityUnknown, LMCacheError, ServerUnavailable
from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime
from lmcache.wire import messages as m
from lmcache.wire.carriers import Carrier, UnixCarrier

logger = init_logger(__name__)

_BACKOFF_SECONDS = (0.2, 0.5, 1.0, 2.0)
_USELESS_BACKOFF_SECONDS = (0.2, 1.0, 10.0)
"""Pauses between attempts where a server answers but cannot serve this engine until one of the two has been restarted."""
_SOCKET_SECONDS = 0.1
"""Seconds between checks for something that is expected soon: a server's socket, or the identity of the weights. A check costs
microseconds, and the first prompt must find the connection ready."""
_STARTING_SECONDS = 60.0
"""How long the socket of an expected server may be missing before that is logged: ranks are ready before schedulers are."""
START_SECONDS = 10.0
"""How long the start of an engine waits for a server that listens and has not answered the hello: a busy server is slow."""
OWN_START_SECONDS = 30.0
"""How long the start of an engine waits for a server of its own, which starts at the same time; a busy machine needs seconds."""
_LOOK_SECONDS = 1.0
"""The longest time between two checks for due heartbeats and renewals. The end of a connection is noticed at once."""
GONE_SECONDS = 10.0
"""A server that ended and is not back after this time is taken for gone. Loads that were planned before have ended by then."""
ERRAND_SECONDS = 0.1
"""The pause between two errands: those of them that ask the server cost the engine some 0.3 ms each."""
RENEWALS = 4
"""How often a lease is renewed within the life of a claim: one late or lost renewal does no harm."""

_connections: set[Connection] = set()
"""The connections of this process. What one of them has logged, another one to the same server does not repeat."""
_lost: set[str] = set()
"""Addresses of servers whose loss has been logged, until a connection to the server has been made again."""
_logging = threading.Lock()
"""Guards `_connections`, `_lost` and what the connections have logged."""


class Connection:
    """Connects to the server and reconnects, in a thread of its own, which runs the callbacks.

    on_welcome: registers through the carrier of a new connection, before any other use of it; raises LMCacheError if this server
    cannot serve; must close the arena's descriptor unless it is -1. before_hello: runs while there is no connection and returns
    once this process fills no extent any more, as the hello states; IdentityUnknown makes the thread try again, without a log
    line. held: returns the leases of this process, renewed `RENEWALS` times within the life of a claim. on_gone: runs at each
    attempt to connect that fails `GONE_SECONDS` or more after the server of a mapped arena has ended. errand: runs about every
    `ERRAND_SECONDS` while there is a connection."""

    def __init__(
        self,
        endpoint: Endpoint,
        on_welcome: Callable[[Carrier, m.Welcome, int], None],
        before_hello: Callable[[], object] = lambda: None,
        held: Callable[[], list[int]] = list,
        on_gone: Callable[[], None] = lambda: None,
        runtime: Runtime = RUNTIME,
        errand: Callable[[], None] | None = None,
    ) -> None:
        self.endpoint, self._now, self._runtime = endpoint, runtime.now, runtime
        self._errand, self._errand_seconds = errand, ERRAND_SECONDS if errand is not None else math.inf
        self._on_gone = on_gone
        self._ended_at = math.inf
        """When the server closed the connection. A server does so when it ends, and not while it is frozen."""
        self._before_hello, self._held = before_hello, held
        self._session = secrets.token_bytes(16)
        self._on_welcome = on_welcome
        self._carrier: Carrier | None = None
        self._lock = threading.Lock()
        self._closed, self._goodbye = False, True
        self._wake = runtime.event()
        self._connected = runtime.event()
        self._settled = runtime.event()
        """There is a connection, or the last attempt has found no server, or none that can serve this engine."""
        self._welcomed = False
        """A server has answered the hello, and `on_welcome` has not returned yet."""
        self._logged = ""
        """Why no server serves this process, as last logged; "" since the last connection."""
        self._since = self._now()
        self._payload = False
        self._renewal_seconds = self._renewed = math.inf
        self._beaten = -math.inf
        with _logging:
            _connections.add(self)
        self._thread = runtime.start(self._keep_up, f"lmcache-link-{endpoint.role}")

    @property
    def connected(self) -> bool:
        return self._carrier is not None

    def wait_connected(self, timeout_seconds: float) -> bool:
        return self._connected.wait(timeout_seconds)

    def wait_for_server(self, seconds: float | None = None) -> None:
        """Wait for the first connection, at most until `seconds` after this object was made. Return at once when it is known that
        no server listens, or none that can serve this engine. None: `START_SECONDS`, or `OWN_START_SECONDS` at a Unix socket."""
        if seconds is None:
            seconds = OWN_START_SECONDS if self.endpoint.is_unix else START_SECONDS
        until = self._since + seconds
        self._settled.wait(max(0.0, until - self._now()))

    def wait_welcomed(self) -> None:
        """If a server has answered the hello and `on_welcome` still runs, wait for its end, at most one deadline."""
        if self._welcomed:
            self._connected.wait(self.endpoint.deadline_seconds)

    def call(
        self, request: m.Message, expect: type[m.AnswerT], frames: Sequence[bytes | memoryview] = ()
    ) -> tuple[m.AnswerT, list[bytes]]:
        """Send one request and return its answer and payload frames.

        Raises:
            ServerUnavailable: no connection, or no answer within the deadline, which closes the connection.
            ServerRefused: the server understood the request and declined it.
        """
        with self._lock:
            carrier = self._carrier
            if carrier is None:
                raise ServerUnavailable(f"no server at {self.endpoint.address}")
            try:
                answer, payload = carrier.exchange(request, self.endpoint.deadline_seconds, frames)
            except ServerUnavailable as error:
                self._give_up(str(error))
                raise
            except BaseException:
                # Ctrl-C: the answer, which may grant a lease, is lost. The next connection reports the leases that are held.
                self._give_up("a call was interrupted")
                raise
            if type(answer) is m.Error and answer.code == "hello":
                self._give_up("it has forgotten this engine")
        if isinstance(answer, expect):
            return answer, payload
        raise refusal_in(answer)

    def post(self, request: m.Message) -> None:
        """Send a message without waiting. It is lost if there is no connection."""
        with self._lock:
            if self._carrier is None:
                return
            try:
                self._carrier.post(request)
            except ServerUnavailable as error:
                self._give_up(str(error))
            except BaseException:  # a part of the message may have been sent
                self._give_up("a call was interrupted")
                raise

    def close(self, goodbye: bool = True) -> None:
        """Close the connection and end the thread. Without `goodbye` the server keeps this process's claims until it ends."""
        self._closed, self._goodbye = True, goodbye
        self._wake.set()
        self._hang_up()
        self._thread.join(5.0)
        with _logging:
            _connections.discard(self)

    def _give_up(self, why: str) -> None:
        """Close the carrier. The caller holds the lock."""
        if self._carrier is not None:
            if isinstance(self._carrier, UnixCarrier) and self._carrier.wait_for_end(0.0):
                self._ended_at = self._now()
            self._carrier.close()
            self._carrier = None
            self._connected.clear()
            address = self.endpoint.address
            with _logging:
                is_known = address in _lost
                _lost.add(address)
            if not is_known:
                logger.warning("Lost the LMCache server at %s (%s); the engine goes on without it", address, why)
        self._wake.set()

    # The connection's thread

    def _keep_up(self) -> None:
        attempt = 0
        while not self._closed:
            carrier = self._carrier
            if carrier is None:
                try:
                    self._connect()
                    attempt = 0
                    continue
                except Exception as error:  # the edge of the thread: no message of a server may end it
                    starting = self._now() - self._since < _STARTING_SECONDS
                    coming = isinstance(error, IdentityUnknown) or (isinstance(error, NotThereYet) and starting)
                    if not coming:
                        self._log_once(error)
                    if isinstance(error, Absent) or not (coming or is_away(error)):
                        self._settled.set()
                    if not isinstance(error, (LMCacheError, OSError)):
                        logger.debug("Unexpected error while connecting", exc_info=True)
                    if self._now() - self._ended_at >= GONE_SECONDS:
                        self._on_gone()
                    backoff = _BACKOFF_SECONDS if is_away(error) else _USELESS_BACKOFF_SECONDS
                    self._wake.wait(_SOCKET_SECONDS if coming else backoff[min(attempt, len(backoff) - 1)])
                    self._wake.clear()
                    attempt += 1
            else:
                self._watch(carrier)
        self._hang_up()

    def _hang_up(self) -> None:
        with self._lock:
            if self._carrier is not None:
                if self._goodbye:
                    try:
                        self._carrier.post(m.Bye())
                    except ServerUnavailable as error:
                        logger.debug("The goodbye was not sent: %s", error)
                self._carrier.close()
                self._carrier = None

    def _watch(self, carrier: Carrier) -> None:
        """Wait until the connection ends, or a heartbeat or a renewal is due, and send what is due."""
        if not isinstance(carrier, UnixCarrier):  # ZMQ does not report the end of a connection
            pause = min(self.endpoint.heartbeat_seconds, self._renewal_seconds)
            self._wake.wait(min(pause, self._errand_seconds))
            self._wake.clear()
            if not self._closed and (self._errand is None or self._now() - self._beaten >= pause):
                self._beat()
        elif carrier.wait_for_end(min(_LOOK_SECONDS, self._renewal_seconds, self._errand_seconds), self._runtime) and (
            not self._closed
        ):
            with self._lock:
                if self._carrier is carrier:
                    self._give_up("it has hung up")
        now = self._now()
        if now - self._renewed >= self._renewal_seconds and not self._closed:
            self._renewed = now
            if held := self._held():
                self.post(m.Renew(held))
        if self._errand is not None and not self._closed:
            self._errand()

    def _beat(self) -> None:
        self._beaten = self._now()
        try:
            self.call(m.Ping(), m.Ok)
        except LMCacheError as error:
            logger.debug("A heartbeat failed: %s", error)

    def _connect(self) -> None:
        self._before_hello()
        carrier, welcome, descriptor = say_hello(self.endpoint, self._session)
        self._payload = not isinstance(carrier, UnixCarrier)
        self._welcomed = True
        self._renewal_seconds = welcome.claim_seconds / RENEWALS if welcome.claim_seconds > 0 else math.inf
        self._renewed = self._beaten = self._now()
        try:
            self._on_welcome(carrier, welcome, descriptor)
            with _logging:
                _lost.discard(self.endpoint.address)
            with self._lock:
                self._carrier = carrier
            self._logged, self._ended_at = "", math.inf
            self._connected.set()
            self._settled.set()
        except BaseException:
            carrier.close()
            raise
        finally:
            self._welcomed = False
        how = "payload frames" if self._payload else "the mapped arena"
        logger.info(
            "Connected to the LMCache server at %s (%d-token chunks, %s)",
            self.endpoint.address,
            welcome.chunk_tokens,
            how,
        )

    def _others(self) -> list[Connection]:
        """Return this process's other connections to the same server."""
        return [one for one in _connections if one is not self and one.endpoint.address == self.endpoint.address]

    def _log_once(self, error: Exception) -> None:
        why = str(error) or type(error).__name__
        with _logging:
            is_known = why == self._logged or any(other._logged == why for other in self._others())
            self._logged = why
        if is_known:
            return
        what = (
            "No LMCache server at %s yet" if is_away(error) else "The LMCache server at %s is of no use to this engine"
        )
        logger.warning(f"{what} (%s); prompts are computed without it", self.endpoint.address, why)
