"""A link is one connection to another server, with the questions that it has not answered yet. Links belong to one thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import zmq

from lmcache.errors import ServerUnavailable
from lmcache.observability.log import printable
from lmcache.wire import messages as m
from lmcache.wire.carriers import ZmqCarrier

PING_SECONDS = 5.0
"""A link is asked for a sign of life if it has been silent for so long. The other server forgets it after 30 s of silence."""
SLOW_SECONDS = 0.1
"""A link with an older unanswered question is not asked another one, so a server that hangs delays few lookups."""
SLACK_BYTES = 1 << 20
"""What an answer may have beside its payload. The headers of 512 shards take 64 KiB."""
Frames = Sequence[zmq.Frame]


@dataclass(eq=False)
class Question:
    """answered: takes the answer with its payload frames. lost: takes the reason why none will come. One of them is called.
    size: the most bytes of payload in the answer. wanted: whether the answer is still of use."""

    request: m.Message
    answered: Callable[[m.Answer, Frames], None]
    lost: Callable[[str], None]
    size: int = 0
    wanted: Callable[[], bool] = lambda: True
    asked: float = field(default=0.0, init=False)
    link: Link | None = field(default=None, init=False)
    """The link over which it was asked; None before that."""


class Link:
    """Takes over the carrier. timeout_seconds: a link that is silent for longer while it owes an answer is lost."""

    def __init__(self, carrier: ZmqCarrier, timeout_seconds: float, now: float) -> None:
        self.carrier, self.sockets = carrier, carrier.sockets
        self._timeout_seconds, self._heard = timeout_seconds, now
        self._waiting: dict[int, Question] = {}
        """The questions without an answer, by number, the oldest first."""
        self._received = carrier.received()
        """Bytes, when it was last looked at."""
        self._read = self._received
        """Bytes, when the last answer was taken or before it was."""

    def __len__(self) -> int:
        """Return the number of unanswered questions."""
        return len(self._waiting)

    @property
    def awaited_bytes(self) -> int:
        """Payload that the answers to the unanswered questions may have."""
        return sum(one.size for one in self._waiting.values())

    def ask(self, now: float, question: Question) -> None:
        """Raises ServerUnavailable if the other server has hung up; the question is not asked then."""
        number = self.carrier.send(question.request)
        question.asked, question.link = now, self
        self._waiting[number] = question

    def is_slow(self, now: float) -> bool:
        return now - self._since(now) > SLOW_SECONDS

    def hear(self, now: float) -> None:
        """Take all answers that have arrived.

        Raises:
            ServerUnavailable: the link is lost.
        """
        received = self.carrier.received()
        while (arrived := self.carrier.receive()) is not None:
            number, answer, frames = arrived
            question = self._waiting.pop(number, None)
            if question is None:
                raise ServerUnavailable(f"it answers what was not asked: {printable(str(answer), 200)}")
            self._heard, self._read = now, received
            question.answered(answer, frames)
        if self.carrier.hung_up():
            raise ServerUnavailable("it has hung up")

    def tick(self, now: float) -> None:
        """Ask for a sign of life now and then. Raises ServerUnavailable if the link is lost, or brings too much."""
        if self._waiting:
            self._look(now)
        if now - max(self._since(now), self._heard) > self._timeout_seconds and self._waiting:
            raise ServerUnavailable(f"it has not answered for {self._timeout_seconds:g} s")
        if not self._waiting and now - self._heard > PING_SECONDS:
            self.ask(now, Question(m.Ping(), lambda answer, frames: None, lambda reason: None))

    def _look(self, now: float) -> None:
        """Look at what has arrived of answers that are not complete: ZMQ buffers an answer of any length. Payload that arrives is
        a sign of life, since one shard may take a slow network longer than the timeout."""
        received, awaited = self.carrier.received(), self.awaited_bytes
        if self.carrier.hung_up():
            raise ServerUnavailable("it has hung up")
        if received - self._read > 2 * awaited + SLACK_BYTES * len(
            self._waiting
        ):  # encrypted frames are a little longer
            raise ServerUnavailable(f"it has sent {received - self._read} bytes, and {awaited} were asked for")
        if received > self._received and awaited:
            self._heard = now
        self._received = received

    def close(self, reason: str, goodbye: bool = False) -> None:
        """Close the connection. All unanswered questions are lost for this reason."""
        if goodbye:
            try:
                self.carrier.send(m.Bye())
            except ServerUnavailable:
                pass  # it has hung up
        self.carrier.close()
        waiting, self._waiting = self._waiting, {}
        for question in waiting.values():
            question.lost(reason)

    def _since(self, now: float) -> float:
        """Return when the oldest unanswered question was asked; now if there is none."""
        return next((one.asked for one in self._waiting.values()), now)
