"""Loads layer by layer: what arrives when, who waits for it, and what becomes of a load that was not waited for."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from engine_process import POISON, kv_of
from lmcache.engine import Done, Load
from lmcache.integration.vllm.layers import Layers
from lmcache.integration.vllm.plan import StepReport
from lmcache.integration.vllm.worker import WorkerSide
from lmcache.transfer import cpu
from lmcache.transfer.progress import Progress, planes_in_group
from test_inprocess_units import in_process
from test_transfer_cpu import POISON as POISON_BYTE
from test_transfer_cpu import Case, aligned, build, cases, copiers, element_bytes
from test_vllm_units import Ranks, Request, Session, rank, step

PATIENCE = 60.0


class Watched(Progress):
    """Calls `told` in the copying thread with each group, before anybody else knows of it."""

    def __init__(self, told: Any) -> None:
        super().__init__()
        self.told = told

    def arrived(self, planes: int, point: Any = None) -> None:
        self.told(planes)
        super().arrived(planes, point)


@given(case=cases())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_groups_arrive_in_order_whole_and_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every group the planes up to it are there, byte for byte, and those behind it are untouched."""
    monkeypatch.setattr(cpu, "_GROUP_BYTES", 1)
    paged, memory = build(case.shape)
    arena = aligned(case.arena_bytes, case.shift)
    arena[:] = np.random.default_rng(case.seed).integers(0, 256, len(arena), dtype=np.uint8)
    runs = np.array(case.runs, dtype=np.int64).reshape(-1, 4)
    blocks = np.array(case.blocks, dtype=np.int32)
    indices = [element_bytes(paged, memory, case.chunk_tokens, case.blocks, run) for run in case.runs]

    def wanted(planes: int) -> Any:
        expected = np.full(len(memory), POISON_BYTE, dtype=np.uint8)
        for inside, in_arena in indices:
            part = slice(0, len(inside) * planes // len(paged.planes))
            expected[inside[part]] = arena[in_arena[part]]
        return expected

    for name, copier in copiers(paged, case.chunk_tokens).items():
        memory[:] = POISON_BYTE
        groups: list[int] = []

        def told(planes: int, name: str = name, groups: list[int] = groups) -> None:
            groups.append(planes)
            assert np.array_equal(memory, wanted(planes)), f"after {planes} planes, by {name}"

        copier.scatter(arena.ctypes.data, blocks, runs, arena_bytes=len(arena), progress=Watched(told))
        assert np.array_equal(memory, wanted(len(paged.planes))), name
        if any(run[2] for run in case.runs):
            assert groups == [*range(2, len(paged.planes), 2), len(paged.planes)]


def test_groups_are_of_whole_layers_and_not_too_small() -> None:
    assert planes_in_group(512 << 10, 4 << 20, 72) == 8
    assert planes_in_group(9 << 20, 4 << 20, 72) == 2
    assert planes_in_group(3 << 20, 4 << 20, 72) == 2
    assert planes_in_group(1, 4 << 20, 72) == 72
    assert planes_in_group(0, 4 << 20, 1) == 1


class Bed(threading.Condition):
    """Counts those who have lain down to wait; whoever wakes them comes after that."""

    def __init__(self) -> None:
        super().__init__()
        self.asleep = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self.asleep.release()
        return super().wait(timeout)


def test_a_wait_ends_with_its_group_or_with_the_load_and_not_before() -> None:
    progress, bed, log = Progress(), Bed(), []
    progress._changed = bed
    seen, go = threading.Semaphore(0), [threading.Event() for _ in range(4)]

    def reader() -> None:
        for at, planes in enumerate((1, 2, 3, 9)):
            go[at].wait(PATIENCE)
            progress.wait(planes)
            log.append(f"read {planes}")
            seen.release()

    def point(name: str) -> Any:
        return SimpleNamespace(wait=lambda: log.append(name))

    thread = threading.Thread(target=reader, daemon=True)
    thread.start()
    go[0].set()
    assert bed.asleep.acquire(timeout=PATIENCE) and not log
    progress.arrived(2, point("first point"))
    assert seen.acquire(timeout=PATIENCE)
    go[1].set()
    assert seen.acquire(timeout=PATIENCE)
    go[2].set()
    assert bed.asleep.acquire(timeout=PATIENCE) and log[-1] == "read 2"
    progress.arrived(4, point("second point"))
    assert seen.acquire(timeout=PATIENCE)
    progress.end()
    go[3].set()
    thread.join(PATIENCE)
    assert log == ["first point", "read 1", "first point", "read 2", "second point", "read 3", "read 9"]


def layered(one: Any, hit: Any, ids: list[int], progress: Progress) -> str:
    load = Load(hit.epoch, hit.lease, 0, hit.shard_extents(0), 0, len(ids), one.table(len(ids)), progress=progress)
    one.worker.load("layered", load)
    return "layered"


def test_the_first_layer_is_there_while_the_others_are_not(server: Any, engine: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(cpu, "_GROUP_BYTES", 1)
    one, ids = engine(server(), layers=3), list(range(320))
    one.store(ids)
    hit, wanted, more = one.lookup(ids), kv_of(ids, 3, 2, 16), threading.Semaphore(1)
    one.poison()
    progress = Watched(lambda planes: more.acquire(timeout=PATIENCE))
    job = layered(one, hit, ids, progress)
    for layer in range(3):
        progress.wait(2 * layer + 2)
        have = one.tokens(320)
        assert (have[: layer + 1] == wanted[: layer + 1]).all(), f"layer {layer} has been waited for"
        assert (have[layer + 2 :] == POISON).all(), "the copy goes one group further, and no more"
        more.release()
    assert one.wait(job).ok and one.right(ids, 0, 320)
    one.scheduler.release(hit)


def test_a_copy_that_fails_midway_ends_all_waits_and_is_a_failed_load(
    server: Any, engine: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(cpu, "_GROUP_BYTES", 1)
    one, ids = engine(server(), layers=3), list(range(320))
    one.store(ids)

    def told(planes: int) -> None:
        if planes == 4:
            raise OSError("the copy engine is on fire")

    hit, progress = one.lookup(ids), Watched(told)
    job = layered(one, hit, ids, progress)
    progress.wait(2)
    progress.wait(6)
    assert not one.wait(job).ok
    assert one.worker.counters["failed_loads"] == 1
    one.scheduler.release(hit)
    assert one.load(ids) == 320, "and the thread goes on"


# When vLLM's forward is relied on


def context(mode: str = "NONE", metadata: Any = "there") -> Any:
    return SimpleNamespace(cudagraph_runtime_mode=SimpleNamespace(name=mode), attn_metadata=metadata)


def forward(layers: Layers, called: str, **what: Any) -> bool:
    """One step whose forward calls for these layers; whether it was relied on."""
    layers.begin()
    relied_on = layers.will_wait(context(**what))
    for name in called:
        layers.wait(name, ())
    layers.end()
    return relied_on


def test_a_kind_of_forward_is_relied_on_once_one_has_called_for_every_layer() -> None:
    layers = Layers("abc", 6)
    assert not forward(layers, "abc")
    assert forward(layers, "abc")
    assert not forward(layers, "abc", mode="PIECEWISE"), "each kind by itself"
    assert forward(layers, "cba", mode="PIECEWISE")
    for _ in range(2):
        assert not forward(layers, "abc", mode="FULL"), "what was captured calls, what is replayed does not"
        assert not forward(layers, "abc", metadata=None), "this context says nothing of the forward"
    layers.begin()
    assert not layers.will_wait(object()), "nor does that of a release with other names"


def test_a_kind_that_once_did_not_call_is_never_relied_on_again() -> None:
    layers = Layers("abc", 6)
    forward(layers, "abc")
    assert forward(layers, "ac")
    for _ in range(3):
        assert not forward(layers, "abc")


def test_a_drafters_forward_is_not_taken_for_the_models() -> None:
    layers = Layers(["model.0", "draft.0"], 4)
    for _ in range(3):
        layers.begin()
        assert not layers.will_wait(context())
        layers.wait("model.0", ())
        assert not layers.end()
        layers.wait("draft.0", ())
        layers.end()


def test_layers_wait_for_their_planes_and_strangers_for_all() -> None:
    waited: list[int] = []
    layers = Layers("abc", 6)
    for name in ("a", "c", "b", "stranger"):
        layers.wait(name, [SimpleNamespace(wait=waited.append)])  # type: ignore[list-item]
    assert waited == [2, 6, 4, 6]


# A rank's half of the connector


class Copies(Ranks):
    """A session whose loads arrive layer by layer, as the test says; `wait_finished` ends them all."""

    def __init__(self, ok: bool = True) -> None:
        super().__init__()
        self.ok, self.dropped = ok, []

    def wait_finished(self, timeout_seconds: float) -> bool:
        self.done += [Done(job, "load", self.ok, 64, 0.001) for job in self.loads]
        self.loads.clear()
        return True

    def drop(self, chunks: int, reason: str) -> None:
        self.dropped.append((chunks, reason))


def started(copies: Copies) -> tuple[WorkerSide, Any, Any]:
    """A rank whose eager forwards are relied on, the scheduler, and a step that has just begun with a load of 64 tokens."""
    layers = Layers("ab", 4)
    forward(layers, "ab")
    worker = rank(copies, layers=layers)
    scheduler, request = in_process(Session(present=4)), Request("a", list(range(100)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([],), 64)
    request.num_computed_tokens = 64
    plan = scheduler.plan_step(step({"a": 36}, new={"a": [7]}))
    worker.start_loads(plan)
    return worker, scheduler, plan


def test_a_forward_that_waits_by_itself_is_not_held_up() -> None:
    copies = Copies()
    worker, _, plan = started(copies)
    worker.wait_before_forward(context())
    (load,) = copies.loads.values()
    load.progress.arrived(2)
    worker.wait_layer("a")
    load.progress.arrived(4)
    worker.wait_layer("b")
    assert copies.loads, "nobody has waited for the end yet"
    worker.wait_after_forward()
    assert not worker._arriving, "and later steps do not look at this load again"
    worker.start_stores(plan)
    assert not worker.take_invalid_blocks() and worker.loaded_tokens == 64
    assert worker.take_report().loaded == {plan.loads[0].job_id: 1} and len(copies.stores) == 1


def test_any_other_forward_waits_for_the_whole_load() -> None:
    for unsure in (context("FULL"), context("PIECEWISE"), context(metadata=None), object()):
        copies = Copies()
        worker, _, _ = started(copies)
        worker.wait_before_forward(unsure)
        assert not copies.loads
        worker.wait_after_forward()
        assert not worker.take_invalid_blocks(), "it has called for no layer, and has not read too early"


def test_a_load_that_a_forward_did_not_wait_for_has_failed_and_nothing_is_stored_of_it() -> None:
    copies = Copies()
    worker, scheduler, plan = started(copies)
    worker.wait_before_forward(context())
    worker.wait_after_forward()
    worker.start_stores(plan)
    invalid, report = worker.take_invalid_blocks(), worker.take_report()
    assert invalid == {7} and (worker.failed_loads, worker.loaded_tokens) == (1, 0)
    assert not copies.stores and copies.dropped == [(3, "computed from a failed load")]
    assert report.stored == {plan.stores[0].job_id: 1}, "its blocks are not held for a store that will not be"
    scheduler.transferred(invalid_blocks=invalid, report=report)


def test_what_is_computed_from_a_failed_load_is_not_stored_until_the_scheduler_knows() -> None:
    """The next step may have been planned before it does."""
    copies = Copies(ok=False)
    worker, scheduler, plan = started(copies)
    worker.wait_before_forward(object())
    worker.start_stores(plan)
    scheduler.requests.session.present = 0
    for request, table in ((Request("b", list(range(64))), [7]), (Request("c", list(range(64))), [8])):
        scheduler.match(request, 0)
        scheduler.allocated(request, ([],), 0)
        meanwhile = scheduler.plan_step(step({request.request_id: 64}, new={request.request_id: table}))
        worker.start_loads(meanwhile)
        worker.start_stores(meanwhile)
    assert [one.blocks for one in copies.stores.values()] == [[8]]
    assert [chunks for chunks, _ in copies.dropped] == [3, 4]
    scheduler.transferred(invalid_blocks=worker.take_invalid_blocks(), report=worker.take_report())
    request = Request("d", list(range(64)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([],), 0)
    after = scheduler.plan_step(step({"d": 64}, new={"d": [7]}))
    assert after.known_failures == [plan.loads[0].job_id]
    worker.start_loads(after)
    worker.start_stores(after)
    assert [one.blocks for one in copies.stores.values()] == [[8], [7]]


def test_several_ranks_store_what_follows_a_load_once_all_have_loaded() -> None:
    """One of them may fail, and a chunk of its right shard and of another rank's wrong one would be wrong."""
    scheduler, request = in_process(Session(present=2), ranks=2), Request("a", list(range(100)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([],), 32)
    request.num_computed_tokens = 32
    plan = scheduler.plan_step(step({"a": 40}, new={"a": [7]}))
    request.num_computed_tokens = 72
    assert not plan.stores
    for stored in ([], [(32, 64)]):
        scheduler.transferred(report=StepReport(loaded={plan.loads[0].job_id: 1}))
        assert [(store.start, store.end) for store in scheduler.plan_step(step({"a": 0})).stores] == stored


def test_reports_without_failures_carry_none() -> None:
    copies = Copies()
    worker, scheduler, _ = started(copies)
    worker.wait_before_forward(object())
    scheduler.transferred(report=worker.take_report())
    assert not scheduler.plan_step(step()).known_failures
