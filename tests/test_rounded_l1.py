"""Engines that round their KV (`int8-l1`, `k8v4-l1`) at real servers: who finds what, in how many bytes, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_process import Engine
from lmcache.chunks import Split
from lmcache.chunks.forms import Form
from lmcache.engine.identity import named
from rounding import BFLOAT16, extent_rows, from_extent
from servers import Server, eventually
from test_l2 import PATIENT, TOKENS, tiers_of, written
from test_splits import Ranks

Engines = Callable[..., Engine]
Servers = Callable[..., Server]
ROUNDING, K8V4 = (named("model").accepting(name) for name in ("int8-l1", "k8v4-l1"))
SHAPE: dict[str, Any] = {"layers": 4, "dims": 64}


def expecting(one: Engine, of_values: Form = Form.INT8) -> Engine:
    """Let the engine's comparisons expect rounded KV. It fills its blocks with that, too: rounded again, it stays so."""
    exact = one.kv_of

    def of(ids: Sequence[int]) -> Any:
        kv = exact(ids).copy()
        for plane, form in ((0, Form.INT8), (1, of_values)):
            raw = kv[:, plane].tobytes()
            back = from_extent(extent_rows(raw, 64, BFLOAT16, form), 64, BFLOAT16, form)
            kv[:, plane] = np.frombuffer(back, np.uint16).reshape(kv[:, plane].shape)
        return kv

    one.kv_of = of  # type: ignore[method-assign]
    return one


def computed(one: Engine, of_values: Form = Form.INT8) -> Engine:
    """Let the engine fill its blocks with exact KV, as a forward does, and expect what int8 brings back."""
    exact = one.kv_of
    expecting(one, of_values)
    fresh = one.fill

    def fill(ids: Sequence[int]) -> None:
        loaded, one.kv_of = one.kv_of, exact  # type: ignore[method-assign]
        fresh(ids)
        one.kv_of = loaded  # type: ignore[method-assign]

    one.fill = fill  # type: ignore[method-assign]
    return one


@pytest.mark.parametrize("mode", ["auto", "payload"])
def test_l1_holds_half_of_the_bytes(server: Servers, engine: Engines, mode: str) -> None:
    cache = server()
    one = computed(engine(cache, model=ROUNDING, mode=mode, **SHAPE))
    exact = engine(cache, "exact", mode=mode, **SHAPE)
    assert one.store(TOKENS) == len(TOKENS)
    assert exact.hit_tokens(TOKENS) == 0, "an exact engine knows no name of rounded KV"
    used = cache.status()["index"]["spaces"]
    assert one.load(TOKENS) == len(TOKENS) and one.load(TOKENS, 16, 37) == 21
    others = list(range(900, 1060))
    assert exact.store(others) == len(others) and one.hit_tokens(others) == 0
    assert exact.load(others) == len(others), "bit for bit"
    layouts = {
        told["layout"]["l1_codec"]: told["layout"] for told in cache.status()["engines"] if told["role"] == "worker"
    }
    assert layouts["none"]["token_bytes"] == 4 * 2 * 2 * 64 * 2
    assert layouts["int8"]["token_bytes"] == 4 * 2 * 2 * 68, "a byte a value, and 4 a head"
    assert layouts["int8"]["lossy_kv"] == "int8-l1"
    assert [space["shard_bytes"] for space in used if space["chunks"]] == [[16 * 4 * 2 * 2 * 68]]


def test_twice_the_tokens_fit(server: Servers, engine: Engines) -> None:
    """Two engines fill 64 MiB each, with 256 KiB of exact KV a chunk."""
    kept = []
    for number, model in enumerate((named("model"), ROUNDING)):
        cache = server(chunk=256, flags=("--l1-size-gb", "0.0625"))
        one = engine(cache, f"e{number}", model=model, layers=4, dims=64, heads=4, num_blocks=64)
        prompts = [[start + at for at in range(1024)] for start in range(0, 400_000, 2000)]
        for prompt in prompts:
            one.store(prompt)
        kept.append(cache.status()["index"]["chunks"])
    assert kept[0] < 70 and kept[1] > 1.75 * kept[0], kept


def test_engines_of_each_kind_share_a_server_and_no_chunk(server: Servers, engine: Engines) -> None:
    """All of them store the same prompt, and each finds its own."""
    cache = server()
    tiers_may = engine(cache, "tiers may", model=named("model").accepting("int8"), **SHAPE)
    engines = [engine(cache, "exact", **SHAPE), tiers_may]
    engines += [computed(engine(cache, "int8", model=ROUNDING, **SHAPE))]
    engines += [computed(engine(cache, "k8v4", model=K8V4, **SHAPE), Form.INT4)]
    for number, one in enumerate(engines):
        assert [other.hit_tokens(TOKENS) for other in engines] == [len(TOKENS)] * number + [0] * (4 - number)
        assert one.store(TOKENS) == len(TOKENS)
    assert [one.load(TOKENS) for one in engines] == [len(TOKENS)] * 4
    told = [one["layout"] for one in cache.status()["engines"] if one["role"] == "worker"]
    assert {one["l1_codec"]: one["token_bytes"] for one in told} == {
        "none": 2048,
        "int8": 4 * 2 * 136,
        "k8v4": 4 * 2 * 108,
    }


@pytest.mark.parametrize("scheme", ["disk", "dir"])
def test_tiers_keep_what_l1_holds_and_a_new_server_finds_it(
    server: Servers, engine: Engines, folders: Callable[[str], Path], scheme: str
) -> None:
    """Whatever the tier's codec is: what is rounded already stays as it is, and is not encoded again."""
    store = f"{scheme}://{folders('/tmp')}/store"
    first = server(flags=("--l2", f"{store}?codec=int8", *PATIENT))
    one = computed(engine(first, model=ROUNDING, **SHAPE))
    assert one.store(TOKENS) == len(TOKENS)
    written(first, 10, scheme)
    assert tiers_of(first)[scheme]["codec"]["raw_bytes"] == 0
    first.end()
    second = server(flags=("--l2", f"{store}?codec=pack12", *PATIENT))
    again, exact = expecting(engine(second, "again", model=ROUNDING, **SHAPE)), engine(second, "exact", **SHAPE)
    other = engine(second, "other", model=named("model").accepting("int8"), **SHAPE)
    assert again.load(TOKENS) == len(TOKENS)
    assert exact.hit_tokens(TOKENS) == other.hit_tokens(TOKENS) == 0


@pytest.mark.parametrize(
    ("one", "other", "model", "form"),
    [
        (Split((), 1), Split((), 2), ROUNDING, Form.INT8),
        (Split((), 4), Split((), 2), ROUNDING, Form.INT8),
        (Split((2, 6), 4), Split((3, 6), 2), K8V4, Form.INT4),
    ],
    ids=str,
)
def test_each_split_reads_what_another_has_stored(
    server: Servers, one: Split, other: Split, model: Any, form: Form
) -> None:
    cache = server(chunk=16)
    ids = list(range(200))
    first = Ranks(cache, "first", one, model=model, dims=64)
    second = Ranks(cache, "second", other, model=model, dims=64)
    try:
        first.store(ids)
        for rank in second.ranks:
            expecting(rank, form)
        assert second.load(ids) == 192 and second.load(ids, 37, 101) == 192
    finally:
        first.close()
        second.close()


def test_kv_with_a_nan_is_computed_each_time(server: Servers, engine: Engines) -> None:
    cache = server()
    one = computed(engine(cache, model=ROUNDING, **SHAPE))
    fresh = one.fill

    def fill(ids: Sequence[int]) -> None:
        fresh(ids)
        one.kv[3, 1, one.table(len(ids))[4], 3, 1, 17] = 0x7FC0

    one.fill = fill  # type: ignore[method-assign]
    assert one.store(TOKENS) == 0 and one.hit_tokens(TOKENS) == 0
    eventually(lambda: cache.counters()['engine_dropped_chunks_total{reason="not finite"}'] == 10)
    one.fill = fresh  # type: ignore[method-assign]
    assert one.store(TOKENS) == len(TOKENS) and one.load(TOKENS) == len(TOKENS)


@pytest.mark.parametrize(
    ("wanted", "served", "remedy"), [("int8", ROUNDING, "lossy_kv=int8-l1"), ("none", named("model"), "lossy_kv=none")]
)
def test_a_server_may_take_one_kind_of_kv_only(
    server: Servers, engine: Engines, wanted: str, served: Any, remedy: str
) -> None:
    cache = server(flags=("--l1-codec", wanted))
    taken = engine(cache, model=served, **SHAPE)
    assert taken.store(TOKENS) == len(TOKENS)
    other = Engine(cache.address, "other", model=named("model") if wanted == "int8" else ROUNDING, **SHAPE)
    try:
        eventually(lambda: cache.counters()['refused_engines_total{reason="l1 codec"}'] >= 1)
        assert other.scheduler is not None and not other.scheduler.connected
        cache.line_with(f"set {remedy} for the engine, or start the server with --l1-codec auto")
    finally:
        other.close()
