"""The ZMQ socket serves engines on any host. Engines on this host get the path of the Unix socket; others get payload frames.

A message is [msgpack, frame...]; any other message gets an `Error` as answer and has no effect. Beyond loopback, the socket needs
a key (CURVE) or an explicit waiver. On loopback, server and payload engines prove to each other that they can read a cookie file
of mode 0600. A peer without a proof gets only short answers to short messages.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import zmq

from lmcache.config.hosts import in_url
from lmcache.errors import ConfigError, WireError
from lmcache.observability.log import Seldom, init_logger
from lmcache.server.handshakes import Handshakes
from lmcache.server.loop import Loop
from lmcache.server.payload import Frames, nothing
from lmcache.server.refused import Reason
from lmcache.server.service import Service
from lmcache.server.sessions import Peer, who_says
from lmcache.wire import auth
from lmcache.wire import messages as m

logger = init_logger(__name__)
SILENCE_SECONDS = 30.0
"""A payload engine counts as gone if it has sent nothing, or has taken none of its unsent bytes, for so long. It pings three
times in this time."""
PROOF_SECONDS = 30.0
"""The longest time from the server's proof to the engine's, which normally takes a second or two."""
MAX_PEERS = 1024
MAX_HELLO_BYTES = 1 << 14
"""The size of a message, which must be a single frame, from a peer that is not admitted."""
MAX_STRANGER_ANSWERS, MAX_STRANGERS_ANSWERS = 16, 512
"""How many messages are answered in one tick (0.25 s): of one connection that is not admitted, and of all of them together. An
engine needs three answers to be admitted, and tries again after a second if it gets none."""
MAX_UNREAD_ANSWERS = 128
"""The most unread answers of one engine, which counts as gone at the next answer."""
_ENCRYPTING_THREADS = 2
"""ZMQ's threads where connections are encrypted. Each connection belongs to one of them, and encrypts half a GB/s or so."""
_COPIED_BYTES = 1 << 16
"""Answers up to this size are copied into ZMQ, and are not counted as held."""


class ZmqEndpoint:
    """A ROUTER socket in the server's loop.

    Raises:
        ConfigError: the port is taken, or the key file cannot be used.
    """

    def __init__(
        self,
        loop: Loop,
        service: Service,
        host: str,
        port: int,
        cookie_dir: Path,
        key_file: Path | None,
        open_door: bool,
    ) -> None:
        self.loop, self.service, self._now = loop, service, loop.now
        self._malformed, self._unanswered = Seldom(logger, loop.now), Seldom(logger, loop.now)
        self._peers: dict[bytes, tuple[Peer, float]] = {}
        self._strangers_answers: Counter[bytes] = Counter()
        """Answers since the last tick, by connections that are not admitted."""
        self._unsent: list[tuple[zmq.MessageTracker, Peer, int, Callable[[], None]]] = []
        """Large answers, whose memory ZMQ holds until they are sent or their connections end."""
        self._receiving = False
        self._context = zmq.Context(_ENCRYPTING_THREADS if key_file else 1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, m.MAX_PAYLOAD_BYTES)
        self._socket.setsockopt(zmq.SNDTIMEO, 0)
        self._socket.setsockopt(zmq.SNDHWM, MAX_UNREAD_ANSWERS)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # else an answer that cannot be sent is dropped silently
        self._socket.setsockopt(zmq.TCP_MAXRT, int(SILENCE_SECONDS * 1000))
        self._socket.copy_threshold = 0  # ZMQ does not report when a copied frame has been sent
        if ":" in host:
            self._socket.setsockopt(zmq.IPV6, 1)
        self._authenticator = auth.protect_server(self._context, self._socket, key_file) if key_file else None
        self._handshakes = Handshakes(self._context, self._socket, host, key_file, service.sessions.refused, loop.now)
        self._needs_proof = key_file is None and not open_door
        self._cookie = secrets.token_bytes(auth.COOKIE_BYTES)
        self._used: set[bytes] = set()
        """The server's nonces that engines have used in proofs within the last `PROOF_SECONDS`."""
        self._cookie_path = cookie_dir / f"{service.sessions.server_id.hex()[:16]}.cookie"
        descriptor = os.open(self._cookie_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(self._cookie)
        service.sessions.cookie_path = str(self._cookie_path)
        try:
            self._socket.bind(f"tcp://{in_url(host)}:{port}")
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"--port {port}: cannot listen on {host}: {error.strerror}; pass another port") from error
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self._descriptor: int = self._socket.FD
        loop.watch(self._descriptor, self._receive_all)
        loop.watch(self._handshakes.descriptor, self._handshakes.hear)
        strangers = self._handshakes.strangers
        loop.watch(strangers.descriptor, strangers.look_at_arrivals)
        loop.call_soon(self._receive_all)  # ZMQ signals only what arrives after it was found empty
        loop.on_tick += [self._forget_silent, self._strangers_answers.clear, strangers.look_at_all, self._receive_all]

    def close(self) -> None:
        if hasattr(self, "_descriptor"):
            self.loop.unwatch(self._descriptor)
            self.loop.unwatch(self._handshakes.descriptor)
            self.loop.unwatch(self._handshakes.strangers.descriptor)
            self.loop.on_tick.remove(self._receive_all)
        self._cookie_path.unlink(missing_ok=True)
        if self._authenticator is not None:
            self._authenticator.stop()
        self._handshakes.close()
        self._socket.close()
        self._context.term()

    def _receive_all(self) -> None:
        """Handle messages until none waits. This must follow each use of the socket, which may take the signal of an arrival from
        its descriptor."""
        if self._socket.closed:
            return
        self._release_sent()
        self._handshakes.hear()
        self._receiving, may_wait = True, False
        try:
            for _ in range(256):
                may_wait = False
                if not int(self._socket.EVENTS) & zmq.POLLIN:
                    break
                envelope = self._socket.recv(zmq.NOBLOCK, copy=False)  # an uncopied frame has the sender's address
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
                may_wait = True
                self._serve(envelope, frames)
        finally:
            self._receiving = False
            if may_wait:  # more messages may wait, also after one that failed: let other callbacks run first
                self.loop.call_soon(self._receive_all)

    def _serve(self, envelope: zmq.Frame, frames: list[bytes]) -> None:
        identity = envelope.bytes
        if identity not in self._peers and not self._may_answer(identity):
            self.service.counters["unanswered_messages"] += 1
            self._unanswered.warning(
                "Ignoring messages of connections that are not admitted, such as one from %s: there are too many; check what "
                "connects to port %d",
                *(_host_of(envelope), self.port),
            )
            return
        try:
            sequence, request = self._decoded(identity, frames)
        except WireError as error:
            self.service.counters["malformed_messages"] += 1
            self._malformed.warning("A malformed ZMQ message: %s", error)
            readable = bool(frames) and len(frames[0]) <= self._most_bytes(identity)
            sequence = m.sequence_of(frames[0]) if readable else 0
            self._send(identity, sequence, m.Error("malformed", str(error)), [])
            return
        answer = self._answer_without_session(request, envelope)
        if answer is not None:
            self._send(identity, sequence, answer, [])
        elif (peer := self._peer(identity, request, envelope)) is not None:
            self._serve_peer(peer, envelope, sequence, request, frames[1:])
        else:
            self._send(identity, sequence, self._why_not(request, _host_of(envelope)), [])

    def _may_answer(self, identity: bytes) -> bool:
        """Return whether a connection that is not admitted gets one more answer in this tick, and count it."""
        answers = self._strangers_answers
        if answers[identity] >= MAX_STRANGER_ANSWERS or answers.total() >= MAX_STRANGERS_ANSWERS:
            return False
        answers[identity] += 1
        return True

    def _most_bytes(self, identity: bytes) -> int:
        return m.MAX_MESSAGE_BYTES if identity in self._peers else MAX_HELLO_BYTES

    def _decoded(self, identity: bytes, frames: list[bytes]) -> tuple[int, m.Request]:
        """Decode a message to (its number, the request). Raises WireError if it is malformed or too long for this sender."""
        size = len(frames[0]) if frames else 0
        if not frames or size > self._most_bytes(identity) or (len(frames) > 1 and identity not in self._peers):
            raise WireError(f"{len(frames)} frames, the first of {size} bytes")
        return m.decode_request(frames[0])

    def _answer_without_session(self, request: m.Request, envelope: zmq.Frame) -> m.Message | None:
        """Answer a request that neither needs nor begins a session; None for all others."""
        match request:
            case m.Hello(payload=False, version=m.PROTOCOL_VERSION):
                return self.service.sessions.welcome()  # contains the path of the Unix socket
            case m.Hello(payload=False):
                return self.service.sessions.refuse_version(request, _host_of(envelope))
            case m.Challenge():
                return self._prove(request.nonce, auth.connection_name(envelope, "server"))
            case m.Declined():
                return self._note_declined(request, _host_of(envelope))
        return None

    def _note_declined(self, request: m.Declined, host: str) -> m.Ok:
        why = auth.REASONS.get(request.reason, "a reason that this server does not know: upgrade it")
        facts = f"the engine runs as user {request.user}, this server as user {os.getuid()}, and the file is {self._cookie_path}"
        if request.user != os.getuid():
            own = f"start this server with --allow-uid {request.user} and the engine with LMCACHE_ALLOW_SERVER_UID={os.getuid()}"
            facts = f"{facts}; on one host there is another way: {own}"
        remedy = f"it does without this server: {why}, or {auth.KEY_FOR_BOTH}; {facts}"
        self.service.sessions.refused.note(who_says(request, host), "no proof", remedy)
        return m.Ok()

    def _serve_peer(
        self, peer: Peer, envelope: zmq.Frame, sequence: int, request: m.Request, payload: list[bytes]
    ) -> None:
        """Pass a request to the service, from an engine that is admitted or that sends its hello."""
        identity = envelope.bytes
        known = identity in self._peers
        self._peers[identity] = peer, self._now()

        def reply(answer: m.Message, frames: Frames, sent: Callable[[], None] = nothing) -> None:
            self._send(identity, sequence, answer, frames, sent)

        self.service.handle(peer, request, payload, reply)
        if not peer.process:  # the request was a `Bye` or a hello that was refused
            self._peers.pop(identity, None)
        elif not known:
            self._handshakes.let_in(envelope.get(zmq.SRCFD))

    def _peer(self, identity: bytes, request: m.Request, envelope: zmq.Frame) -> Peer | None:
        if identity in self._peers:
            return self._peers[identity][0]
        if not isinstance(request, m.Hello) or len(self._peers) >= MAX_PEERS:
            return None
        allowed = not self._needs_proof or self._is_proven(request.proof, auth.connection_name(envelope, "server"))
        return Peer("ZMQ", _host_of(envelope)) if allowed else None

    def _prove(self, nonce: bytes, connection: str) -> m.Proven:
        """Prove to an engine that this server belongs to the engine's user. The server stores nothing about the engine, since
        peers without a proof could otherwise displace what is stored about others."""
        own = int(self._now() * 1e9).to_bytes(8, "big") + secrets.token_bytes(m.NONCE_BYTES - 8)
        return m.Proven(
            own, auth.proof(self._cookie, "server", self.service.sessions.server_id, nonce, own, connection), connection
        )

    def _is_proven(self, sent: bytes, connection: str) -> bool:
        """Check whether the engine knows the cookie. The server need not store its own nonce, since an engine makes a proof only
        after the server's proof for the same nonces and connection. The nonce must be fresh, and serves for one proof."""
        nonce, own, proof = sent[: m.NONCE_BYTES], sent[m.NONCE_BYTES : 2 * m.NONCE_BYTES], sent[2 * m.NONCE_BYTES :]
        right = auth.proof(self._cookie, "engine", self.service.sessions.server_id, nonce, own, connection)
        fresh = 0 <= self._age_seconds(own) < PROOF_SECONDS and own not in self._used
        if not hmac.compare_digest(proof, right) or not fresh:
            return False
        self._used.add(own)
        return True

    def _why_not(self, request: m.Request, host: str) -> m.Error:
        if not isinstance(request, m.Hello):
            return m.Error("hello", "say hello first")
        if len(self._peers) >= MAX_PEERS:
            reason: Reason = "too many"
            why = f"{MAX_PEERS} engines use payload frames already"
        elif request.proof:
            reason = "no proof"
            why = (
                f"its proof is not for this connection, or was used before, or came later than {PROOF_SECONDS:g} s after "
                f"this server's: an engine connects again by itself and gives a new one; if that fails too, {auth.KEY_FOR_BOTH}"
            )
        else:
            reason = "no proof"
            why = (
                f"the engine cannot read {self._cookie_path}, and the server has no key file: run the engine as user "
                f"{os.getuid()}, in a container with {self._cookie_path.parent} mounted at the same path, or start the "
                "server with --auth-key-file FILE and the engine with LMCACHE_AUTH_KEY_FILE=FILE"
            )
        self.service.sessions.refused.note(who_says(request, host), reason, why)
        return m.Error("refused", why)

    def _send(
        self,
        identity: bytes,
        sequence: int,
        answer: m.Message,
        payload: Frames,
        sent: Callable[[], None] = nothing,
    ) -> None:
        """Send an answer. `sent` is called when ZMQ no longer reads the payload's memory, which may be at once."""
        if not self._receiving:
            self.loop.call_soon(self._receive_all)
        frames = [m.encode(sequence, answer), *payload]
        size = sum(map(len, frames))
        large = size > _COPIED_BYTES
        if large and identity not in self._peers:  # the peer was removed while the answer was being made
            self.service.counters["unsent_answers"] += 1
            sent()
            return
        try:
            tracker = self._socket.send_multipart([identity, *frames], zmq.NOBLOCK, copy=not large, track=large)
        except zmq.ZMQError as error:
            sent()
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self.service.counters["unsent_answers"] += 1
            # A peer that has disconnected may reconnect. A peer that does not read has lost an answer for good.
            if error.errno == zmq.EAGAIN and identity in self._peers:
                peer, _ = self._peers[identity]
                logger.warning(
                    "Disconnecting %s rank %d, pid %d: it has not read %d answers; check whether it hangs, it may connect again",
                    *(peer.role, peer.rank, peer.pid, MAX_UNREAD_ANSWERS),
                )
                self._forget(identity)
            return
        if tracker is None:
            sent()
        else:
            peer, _ = self._peers[identity]
            self.service.sessions.hold(peer, size)
            self._unsent.append((tracker, peer, size, sent))

    def _release_sent(self) -> None:
        """Stop counting the answers that ZMQ has sent or dropped."""
        unsent, self._unsent = self._unsent, []
        for one in unsent:
            tracker, peer, size, sent = one
            if tracker.done:
                self.service.sessions.hold(peer, -size)
                sent()
            else:
                self._unsent.append(one)

    def _forget(self, identity: bytes) -> None:
        peer, _ = self._peers.pop(identity)
        self.service.sessions.gone(peer)

    def _forget_silent(self) -> None:
        limit = self._now() - SILENCE_SECONDS
        for identity in [one for one, (_, heard) in self._peers.items() if heard < limit]:
            self._forget(identity)
        self._used = {nonce for nonce in self._used if self._age_seconds(nonce) < PROOF_SECONDS}

    def _age_seconds(self, nonce: bytes) -> float:
        """Return the time since this server made the nonce."""
        return self._now() - int.from_bytes(nonce[:8], "big") / 1e9


def _host_of(envelope: zmq.Frame) -> str:
    """Return the address of a message's sender."""
    return str(envelope.get("Peer-Address"))
