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
Frames = Sequence[zmq.Frame]


@dataclass(eq=False)
class Question:
    """answered: takes the answer with its payload frames. lost: takes the reason why none will come. One of them is called."""

    request: m.Message
    answered: Callable[[m.Answer, Frames], None]
    lost: Callable[[str], None]
    asked: float = field(default=0.0, init=False)


class Link:
    """Takes over the carrier. timeout_seconds: a link that is silent for longer while it owes an answer is lost."""

    def __init__(self, carrier: ZmqCarrier, timeout_seconds: float, now: float) -> None:
        self.carrier, self.sockets = carrier, carrier.sockets
        self._timeout_seconds, self._heard = timeout_seconds, now
        self._waiting: dict[int, Question] = {}
        """By number, the oldest first."""

    def __len__(self) -> int:
        """Return the number of unanswered questions."""
        return len(self._waiting)

    def ask(self, now: float, question: Question) -> None:
        """Raises ServerUnavailable if the other server has hung up; the question is not asked then."""
        number = self.carrier.send(question.request)
        question.asked = now
        self._waiting[number] = question

    def is_slow(self, now: float) -> bool:
        return now - self._since(now) > SLOW_SECONDS

    def hear(self, now: float) -> None:
        """Take all answers that have arrived.

        Raises:
            ServerUnavailable: the link is lost.
        """
        while (arrived := self.carrier.receive()) is not None:
            number, answer, frames = arrived
            question = self._waiting.pop(number, None)
            if question is None:
                raise ServerUnavailable(f"it answers what was not asked: {printable(str(answer), 200)}")
            self._heard = now
            question.answered(answer, frames)
        if self.carrier.hung_up():
            raise ServerUnavailable("it has hung up")

    def tick(self, now: float) -> None:
        """Ask for a sign of life now and then. Raises ServerUnavailable if the link is lost."""
        if now - max(self._since(now), self._heard) > self._timeout_seconds and self._waiting:
            raise ServerUnavailable(f"it has not answered for {self._timeout_seconds:g} s")
        if not self._waiting and now - self._heard > PING_SECONDS:
            self.ask(now, Question(m.Ping(), lambda answer, frames: None, lambda reason: None))

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
