"""No wait without an end: each call that may wait names its time-out, or is listed here with what ends it."""

from __future__ import annotations

import ast
from pathlib import Path

import lmcache

PACKAGE = Path(lmcache.__file__).parent
WAITING = {"wait", "wait_for", "join", "result", "get", "acquire", "accept", "communicate", "synchronize", "shutdown"}
"""Names of methods that return only when something has happened, unless they are given a time. A socket's time-out is set on
the socket."""
OUR_OWN_COPY = "it ends with a copy between memories of this process, which waits for nothing"
A_COPY = "each copy ends with its session: those that have begun by themselves, the others when it is closed"
THE_DEVICE = (
    "it ends with work that was launched on the device before; a device that hangs, hangs the engine's step as well"
)
THE_TIERS_CALL = (
    "it is a part of one call of the tier; the server gives a tier's calls up when it stops (`server.tier_runner`)"
)
ENDS = {
    ("cli/replay.py", "one.result()"): "no wait: a simulation's result",
    ("config/hosts.py", "answer.result()"): "the answer is there: it has been waited for, with a time-out",
    ("peers/mover.py", "process.wait()"): "the process was killed, and this thread has nothing else to do",
    ("peers/tier.py", "self._copiers.shutdown(wait=False, cancel_futures=True)"): "it does not wait",
    ("peers/tier.py", "self._diallers.shutdown(wait=False, cancel_futures=True)"): "it does not wait",
    (
        "engine/access.py",
        "self._populating.join()",
    ): "`_stop` is set, and the thread looks at it after each step of a few MiB",
    (
        "engine/copy_threads.py",
        "self._ready[kind].wait_for(lambda: queue or unreported or self._closed)",
    ): "a copying thread's work comes, or `close` notifies it",
    ("engine/copy_threads.py", "point.synchronize()"): THE_DEVICE,
    ("engine/identity.py", "self._thread.join()"): "the thread looks at `_unwanted` after each tensor",
    ("engine/points.py", "point.synchronize()"): THE_DEVICE,
    ("integration/vllm/paged.py", "written.synchronize()"): THE_DEVICE,
    (
        "engine/rank_arenas.py",
        "self._thread.join()",
    ): "the datagram before it wakes the thread, which sees `_closed`",
    ("integration/vllm/worker.py", "self._copies.wait(self._synchronous_loads())"): A_COPY,
    ("integration/transformers/attach.py", "self._lock.acquire(blocking=False)"): "it does not wait",
    (
        "memory/arena.py",
        "self._thread.join()",
    ): "`_stop` is set, and the thread looks at it after each step of a few MiB",
    ("server/loop.py", "executor.shutdown(wait=False, cancel_futures=True)"): "it does not wait",
    ("server/main.py", "logging.shutdown()"): "it flushes the log, as every line does",
    ("server/unix_endpoint.py", "self._listener.accept()"): "the socket does not block",
    ("testing/conformance.py", "thread.join()"): "a test of a tier, by pytest, which has a time-out",
    ("tiers/directory/tier.py", "self._watch.join()"): THE_TIERS_CALL,
    ("tiers/directory/tier.py", "self._pool.shutdown()"): THE_TIERS_CALL,
    ("tiers/disk/tier.py", "self._idle.wait()"): THE_TIERS_CALL,
    ("tiers/disk/stripes.py", "one.result()"): THE_TIERS_CALL,
    ("tiers/disk/stripes.py", "pool.shutdown()"): THE_TIERS_CALL,
    ("tiers/frame_io.py", "checksum.result()"): OUR_OWN_COPY,
    ("tiers/frame_io.py", "one.result()"): OUR_OWN_COPY,
    ("tiers/object_store/tier.py", "self._sweeper.join()"): THE_TIERS_CALL,
    ("tiers/object_store/tier.py", "self._pool.shutdown()"): THE_TIERS_CALL,
    ("tiers/threads.py", "pool.shutdown()"): "its threads wait at a barrier that was aborted, and end",
    ("tiers/object_store/tier.py", "part.result()"): THE_TIERS_CALL,
    ("tiers/threads.py", "part.result()"): THE_TIERS_CALL,
    ("tiers/mooncake/tier.py", "self._starting.acquire(blocking=False)"): "it does not wait",
    (
        "tiers/mooncake/client.py",
        "thread.join()",
    ): "the process has nothing else to do; it ends with the server, or is killed by it",
    ("transfer/cpu.py", "self._pool.shutdown()"): OUR_OWN_COPY,
    ("server/attaching.py", "made.result()"): "it is done: it is asked by the callback of its end",
    ("server/http_sockets.py", "super().accept()"): "the event loop calls it for a socket that does not block",
    ("transfer/cpu.py", "other.result()"): OUR_OWN_COPY,
    ("transfer/gpu/launch.py", "torch.cuda.current_stream().synchronize()"): THE_DEVICE,
    ("transfer/gpu/launch.py", "last.synchronize()"): THE_DEVICE,
    ("transfer/gpu/pinned.py", "self._thread.join()"): "the driver registers one piece of the arena, or has failed to",
    ("transfer/gpu/reader.py", "self._stream.synchronize()"): THE_DEVICE,
    ("transfer/gpu/ring.py", "self.used.synchronize()"): THE_DEVICE,
    ("transfer/gpu/ring.py", "self._launch_all(base, blocks, runs, progress).synchronize()"): THE_DEVICE,
    ("transfer/gpu/ring.py", "self._copies.synchronize()"): THE_DEVICE,
    ("transfer/gpu/ring.py", "self._kernels.synchronize()"): THE_DEVICE,
    (
        "transfer/progress.py",
        "self._changed.wait_for(lambda: self._ended or self._reached(planes) is not None)",
    ): "the copying thread says `_ended` however its copy ends; " + THE_DEVICE,
    ("transfer/progress.py", "group[1].wait()"): THE_DEVICE,
}
"""(file, call) -> what ends the wait."""


def may_wait_for_ever(call: ast.Call) -> bool:
    """Whether it waits and is given no time. The first argument of `wait_for` is its condition, and of `Copies.wait` and
    `WorkerSession.wait` what is waited for; other names with arguments are those of strings (`join`) and mappings (`get`), or the
    argument is the time."""
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in WAITING:
        return False
    owner = ast.unparse(call.func.value).rpartition(".")[2].lstrip("_")
    has_object = call.func.attr == "wait_for" or (call.func.attr == "wait" and owner in ("copies", "session"))
    timed = len(call.args) > has_object or any("time" in (word.arg or "") for word in call.keywords)
    return not timed


def waits() -> set[tuple[str, str]]:
    return {
        (path.relative_to(PACKAGE).as_posix(), ast.unparse(node))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and may_wait_for_ever(node)
    }


def test_every_wait_has_an_end() -> None:
    new = waits() - set(ENDS)
    assert not new, "give it a time-out, or say in ENDS what ends it"


def test_the_list_holds_nothing_that_is_gone() -> None:
    assert not set(ENDS) - waits()
