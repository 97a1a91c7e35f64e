"""Tiers are attached, removed and paused while the server runs: by SIGHUP with other settings, or over HTTP. Both come here.

A tier is opened before lookups hear of it. A removed one is ignored by lookups at once; what is queued for it is still
written for a while, and it is closed when the last of its operations has ended. All methods run in the loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger
from lmcache.server.loop import Loop
from lmcache.server.tier_runner import CLOSE_SECONDS, TierRunner
from lmcache.server.tiering import Tiering

if TYPE_CHECKING:
    from lmcache.tiers.registry import TierSpec  # imports what only servers with tiers need

logger = init_logger(__name__)
MOST_TIERS = 16
"""The most tiers at a time, with those that are being opened or removed: one that hangs keeps its threads and its memory."""
MOST_NAMES = 64
"""The most names of tiers since the start, since the counters of a removed tier are kept."""
Done = Callable[[str], None]
"""Takes what went wrong; "" if nothing did."""


class Attaching:
    """Changes which tiers a server has.

    Args:
        texts: the URLs of the tiers that it has, as they were given, nearest first.
        make: makes a tier from a URL, without opening it. Imports may take long, so it is not called in the loop's thread.
        workers: the threads in which it is called.
        drain_seconds: how long what is queued for a removed tier is written, unless the caller says otherwise.
    """

    def __init__(
        self,
        loop: Loop,
        tiering: Tiering,
        texts: Sequence[str],
        make: Callable[[str], TierSpec],
        workers: Executor,
        drain_seconds: float,
    ) -> None:
        self.make = make
        self._loop, self._tiering, self._workers, self._drain_seconds = loop, tiering, workers, drain_seconds
        self._texts = dict(zip(tiering.runners, texts, strict=True))
        """The URL of each attached tier, with its secrets."""
        self._making = set[str]()
        """URLs that SIGHUP has brought and whose tiers a thread makes now."""
        self.failed = set[str]()
        """URLs that SIGHUP has brought and that could not be attached. The next one tries again, also by the same settings."""
        self._opening: dict[TierRunner, Done] = {}
        """Tiers that are being opened, and who waits for that."""
        self._draining: dict[TierRunner, tuple[float, Done]] = {}
        """Tiers that leave -> until when what is queued is written, and who waits for the end."""
        self._closing: dict[TierRunner, tuple[float, Done]] = {}
        """Tiers that are being closed -> until when somebody waits for that."""
        loop.on_tick.append(self._tick)

    def add(self, spec: TierSpec, text: str, done: Done, before: str = "", keeps: bool = False) -> str:
        """Open a tier and attach it. Return its name; `done` is called when it serves, or cannot be opened.

        before: the name of the tier that will be the next farther one; "": this is the farthest. keeps: attach a tier that cannot
        be opened, too, and try again.

        Raises:
            ConfigError: the name or the URL is taken, there is no tier `before`, or there are too many.
        """
        tiering, everywhere = self._tiering, [*self._tiering.runners, *self._opening, *self._tiering.leaving]
        taken = {one.name for one in everywhere}
        if text in self._texts.values():
            raise ConfigError(f"{spec.url}: this tier is attached already")
        if spec.name in taken and spec.name != spec.tier.scheme:
            raise ConfigError(f"{spec.url}: name={spec.name} is taken by another tier: choose another name")
        if spec.name in taken:
            free = (f"{spec.name}{number}" for number in range(2, len(taken) + 3))
            spec = replace(spec, name=next(one for one in free if one not in taken))
        if before:
            self._named(before)
        if len(everywhere) >= MOST_TIERS:
            raise ConfigError(
                f"{spec.url}: there are {len(everywhere)} tiers, with those that are being removed: no more"
            )
        known = taken | set(tiering.report.gone)
        if spec.name not in known and len(known) >= MOST_NAMES:
            raise ConfigError(
                f"{spec.url}: {len(known)} names of tiers have been used since the start: reuse one of them"
            )
        if spec.warning:
            logger.warning("%s", spec.warning)
        runner = tiering.runner_of(spec)
        self._opening[runner] = done
        self._texts[runner] = text
        runner.open(partial(self._opened, runner, before, keeps))
        return spec.name

    def _opened(self, runner: TierRunner, before: str, keeps: bool, error: Exception | None) -> None:
        if runner not in self._opening:
            return  # it is not wanted any more, or the server ends
        if error is not None and not keeps:
            self._give_up(runner, f"it cannot be opened: {error}")
            return
        done = self._opening.pop(runner)
        runners = self._tiering.runners
        place = next((at for at, one in enumerate(runners) if one.name == before), None)
        runner.opened(error)
        self._tiering.join(runner, place)
        logger.info("Tier %s attached: %s, write=%s", runner.name, runner.spec.url, runner.spec.write)
        done("")

    def _give_up(self, runner: TierRunner, why: str) -> None:
        """Close a tier that is being opened, and say why to whoever waits for it."""
        done = self._opening.pop(runner)
        del self._texts[runner]
        self._tiering.leaving.append(runner)
        runner.close()
        done(why)

    def remove(self, name: str, done: Done, drain_seconds: float | None = None) -> None:
        """Detach a tier. `done` is called when it is closed, or after the bound of closing. To a paused tier nothing is written.

        Raises:
            ConfigError: there is no tier of this name.
        """
        opening = next((one for one in self._opening if one.name == name), None)
        if opening is not None:
            self._give_up(opening, "it was removed while it was being opened")
            self._closing[opening] = self._loop.now() + CLOSE_SECONDS, done
            return
        runner = self._named(name)
        seconds = self._drain_seconds if drain_seconds is None else drain_seconds
        del self._texts[runner]
        self._tiering.leave(runner)
        self._draining[runner] = self._loop.now() + seconds, done
        logger.info("Tier %s is being removed: %d chunks are to be written to it first", name, len(runner.queue))
        self._loop.call_soon(self._tick)

    def pause(self, name: str, paused: bool) -> TierRunner:
        """Let lookups and writes leave a tier alone from now on, or no longer. What is queued for it waits. Its running
        operations go on; when `under_way` is empty, nothing touches its store.

        Raises:
            ConfigError: there is no tier of this name.
        """
        runner = self._named(name)
        if runner.paused != paused:
            runner.paused = paused
            logger.info("Tier %s is paused" if paused else "Tier %s goes on", name)
            self._loop.call_soon(self._tiering.writes.pump)
        return runner

    def change(self, old: Sequence[str], new: Sequence[str]) -> None:
        """Do what leads from the tiers of old settings to those of new ones. A tier that was attached or removed over HTTP since
        then stays so. Failures are logged."""
        mine = {text: runner.name for runner, text in self._texts.items()}
        for text in old:
            if text not in new:
                self._making.discard(text)
                self.failed.discard(text)
            if text not in new and text in mine:
                self.remove(mine.pop(text), partial(_log, "SIGHUP"))
        for at in reversed(range(len(new))):  # the farthest first, so that each finds the one behind it
            if new[at] not in mine and (new[at] not in old or new[at] in self.failed):
                self.failed.discard(new[at])
                self._making.add(new[at])
                self._workers.submit(self.make, new[at]).add_done_callback(
                    partial(self._made, new[at], tuple(new[at + 1 :]))
                )

    def _made(self, text: str, behind: Sequence[str], made: Future[TierSpec]) -> None:
        """Attach a tier that a thread has made before the first of those behind it."""

        def add() -> None:
            if text not in self._making:
                return  # the settings of another SIGHUP name it no more
            self._making.discard(text)
            names = {given: runner.name for runner, given in self._texts.items() if runner in self._tiering.runners}
            before = next((names[one] for one in behind if one in names), "")
            try:
                self.add(made.result(), text, partial(_log, "SIGHUP"), before, keeps=True)
            except ConfigError as error:
                self.failed.add(text)
                logger.error("SIGHUP: %s", error)

        self._loop.call_soon(add)

    def close(self) -> None:
        """Close the tiers that are being opened, with all others, as the server ends."""
        self._tiering.leaving.extend(self._opening)
        self._opening.clear()

    def _named(self, name: str) -> TierRunner:
        for runner in self._tiering.runners:
            if runner.name == name:
                return runner
        known = ", ".join(one.name for one in self._tiering.runners) or "none"
        which = {one.name: "this tier is being removed" for one in self._tiering.leaving}
        which |= {one.name: "this tier is still being opened" for one in self._opening}
        raise ConfigError(f"{name}: {which.get(name, 'there is no such tier')}; known: {known}")

    def _tick(self) -> None:
        now = self._loop.now()
        for runner in list(self._opening):
            runner.tick(now)
        for runner, (until, done) in list(self._draining.items()):
            left = len(runner.queue) and runner.may_store_by(until)
            if now < until and (left or runner.under_way):
                continue
            del self._draining[runner]
            self._tiering.let_go_of(runner)
            self._closing[runner] = now + CLOSE_SECONDS, done
        for runner, (until, done) in list(self._closing.items()):
            if runner.closed or now >= until:
                del self._closing[runner]
                calls = ", ".join(f"{count} of {method}" for method, count in runner.under_way.items())
                done("" if runner.closed else f"tier {runner.name} is left behind: calls have not returned: {calls}")
                logger.info("Tier %s has been removed", runner.name)


def _log(what: str, wrong: str) -> None:
    if wrong:
        logger.warning("%s: %s", what, wrong)
