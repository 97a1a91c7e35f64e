"""The connectors for SGLang without SGLang: the calls that its radix caches make, on arrays in place of tensors."""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine_process import pause_once
from hashing import Turns
from lmcache.config.engine import FILE_VARIABLE
from lmcache.engine import Loading, connection
from lmcache.engine.agreement import Agreement
from lmcache.errors import ConfigError, LayoutError
from lmcache.integration.sglang import model as model_of_sglang
from lmcache.integration.sglang import unified_lmcache_mp_connector as unified
from lmcache.integration.sglang import weights
from lmcache.integration.sglang.model import Ranks, describe_rank, pool_groups
from lmcache.integration.sglang.multi_process_adapter import LMCacheMPConnector
from lmcache.integration.sglang.ranks import block_table
from lmcache.integration.sglang.settings import read_settings
from lmcache.integration.sglang.sglang_adapter import LMCacheLayerwiseConnector, LoadMetadata, StoreMetadata
from lmcache.integration.sglang.utils import lmcache_get_config
from lmcache.runtime import RUNTIME
from lmcache.transfer.progress import Progress
from servers import PATIENCE, Server, beside, eventually
from sglang_pool import HEADS, VOCABULARY, MHATokenToKVPool, MLATokenToKVPool, ModelConfig, SGLang

Servers = Callable[..., Server]
Engines = Callable[..., SGLang]


def tokens(count: int, seed: int) -> list[int]:
    return [random.Random(seed * 7919 + at).randrange(1, VOCABULARY) for at in range(count)]


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    return str(tmp_path / "model")


def config(folder: Path, server: Server, **more: Any) -> str:
    settings = {"mp_host": "127.0.0.1", "mp_port": server.port, "blocking_timeout_secs": PATIENCE, **more}
    with tempfile.NamedTemporaryFile(
        "w", dir=folder, suffix=".yaml", delete=False
    ) as file:  # ranks write theirs side by side
        file.write("".join(f"{key}: {value}\n" for key, value in settings.items()))
    return file.name


@pytest.fixture
def sglang(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    """Engines: sglang(server, page_size, ...), connected."""
    made: list[SGLang] = []
    monkeypatch.setattr(connection, "START_SECONDS", PATIENCE)

    def make(server: Server, page_size: int, settings: dict[str, Any] | None = None, **more: Any) -> SGLang:
        made.append(SGLang(config(tmp_path, server, **(settings or {})), model, page_size, **more))
        return made[-1]

    yield make
    for one in made:
        one.connector.close()


# The unified radix cache


def test_an_engine_whose_own_server_cannot_be_started_waits_for_none(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    monkeypatch.setattr(connection, "START_SECONDS", 1000 * PATIENCE)
    monkeypatch.setattr(connection, "OWN_START_SECONDS", 1000 * PATIENCE)
    settings = tmp_path / "own.yaml"
    settings.write_text("max_local_cpu_size: 0.1\n")
    one = SGLang(str(settings), model, 16)
    assert one.load("a", tokens(64, 1))[0] == 0 and one.compute_and_store("b", tokens(64, 1)) is None
    assert "its own server has not started" in caplog.text
    one.connector.close()


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("chunk", [8, 24, 256])
def test_what_one_engine_stored_another_one_loads(server: Servers, sglang: Engines, page_size: int, chunk: int) -> None:
    daemon = server(chunk=chunk)
    first, second = sglang(daemon, page_size), sglang(daemon, page_size)
    text = tokens(700, 1)
    first.compute_and_store("a", text)
    handed = len(text) // page_size * page_size // chunk * chunk
    found, slots = second.load("b", text)
    assert found == handed // page_size * page_size > 0
    assert np.array_equal(second.pool.read(slots), second.expected(text)[:, :, :found])
    have = found // 2 // page_size * page_size
    again, slots = second.load("c", text, have=have, seed=2)
    assert again == found
    assert np.array_equal(second.pool.read(slots), second.expected(text)[:, :, have:found])
    assert second.load("d", text, have=found)[0] <= found
    different = [*text[:300], *tokens(400, 2)]
    assert second.load("e", different)[0] == 300 // chunk * chunk // page_size * page_size


def test_large_weights_are_hashed_while_the_engine_runs(
    server: Servers, sglang: Engines, model: str, turns: Turns
) -> None:
    Path(model, "model.safetensors").write_bytes(bytes(10_000))
    daemon, text = server(chunk=16), tokens(320, 4)
    engine = sglang(daemon, 16)
    engine.compute_and_store("a", text)
    assert engine.load("b", text)[0] == 0
    for request in "ab":
        engine.connector.finish_request(request)
    turns.give()
    reason = 'engine_dropped_chunks_total{reason="identity not known yet"}'
    eventually(lambda: daemon.counters().get(reason) == 20)
    rank = engine.connector._rank
    eventually(lambda: rank.worker.connected and rank.scheduler.connected)
    engine.compute_and_store("c", text)
    assert engine.load("d", text)[0] == 320


def test_a_request_is_stored_piece_by_piece(server: Servers, sglang: Engines) -> None:
    """After each prefill and at the end; each time only what is new is handed over."""
    engine = sglang(server(chunk=24), 16)
    text = tokens(500, 3)
    for length in (100, 230, 231, 500):
        engine.compute_and_store("a", text[:length])
    assert engine.connector.get_store_start("a", 496) == 496 // 24 * 24 // 16 * 16
    engine.connector.finish_request("a")
    assert engine.connector.get_store_start("a", 496) == 0
    found, slots = engine.load("b", text)
    assert found == 480
    assert np.array_equal(engine.pool.read(slots), engine.expected(text)[:, :, :found])


def test_pages_of_other_engines_make_no_difference(server: Servers, sglang: Engines) -> None:
    daemon, text = server(chunk=16), tokens(320, 4)
    sglang(daemon, 64).compute_and_store("a", text)
    other = sglang(daemon, 1)
    found, slots = other.load("b", text)
    assert found == 320
    assert np.array_equal(other.pool.read(slots), other.expected(text))


def test_salts_and_keys_are_told_apart(server: Servers, sglang: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon, text = server(chunk=16), tokens(64, 5)
    engine = sglang(daemon, 1)
    salt = engine.connector.build_cache_salt
    engine.compute_and_store("a", text, salt=salt("one", None))
    assert engine.load("b", text, salt=salt("one", None))[0] == 64
    others = [salt(None, None), salt("two", None), salt(None, "one"), salt("one", "x"), salt('["one", ""]', None)]
    assert [engine.load(f"c{at}", text, salt=other)[0] for at, other in enumerate(others)] == [0] * len(others)
    monkeypatch.setattr(unified, "lora_enabled", lambda: True)
    adapters = [sglang(daemon, 1), sglang(daemon, 1)]
    keys = [one.connector.build_cache_salt(None, "adapter") for one in adapters]
    assert keys[0] != keys[1], "an adapter's name does not say what is in it"
    assert adapters[0].connector.build_cache_salt("one", None) == salt("one", None)


def test_only_text_is_kept(server: Servers, sglang: Engines) -> None:
    """Behind the vocabulary are SGLang's numbers for images: 30 bits of a hash, which may be another image's too."""
    engine = sglang(server(chunk=16), 1)
    text = [*tokens(40, 6), VOCABULARY + 123456, *tokens(60, 7)]
    engine.compute_and_store("a", text)
    assert engine.load("b", text)[0] == 32


def test_a_hit_that_waits_is_given_back_and_asked_for_again(
    server: Servers, sglang: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unified, "HIT_SECONDS", 0.0)
    daemon, text = server(chunk=16), tokens(160, 8)
    engine = sglang(daemon, 16)
    engine.compute_and_store("a", text)
    lookup = engine.connector.submit_lookup("b", text, local_hit_tokens=0, cache_salt="")
    assert engine.connector.poll_lookup(lookup) == 160 and lookup.tracker.hit is not None
    engine.connector._swept = 0.0
    engine.connector.ready_prefix_count([])
    assert lookup.tracker.hit is None
    slots = engine.slots(160, 9)
    load = engine.connector.submit_load(lookup, [slots], local_hit_tokens=0, owned_device_indices=slots)
    assert engine.connector.prepare_load_on_stream(load, None)
    assert np.array_equal(engine.pool.read(slots), engine.expected(text))
    daemon.clear()
    lookup = engine.connector.submit_lookup("c", text, local_hit_tokens=0, cache_salt="")
    load = engine.connector.submit_load(lookup, [slots], local_hit_tokens=0, owned_device_indices=slots)
    assert not engine.connector.prepare_load_on_stream(load, None), "gone meanwhile: computed"


def test_the_tree_may_lose_its_part_before_the_load(server: Servers, sglang: Engines) -> None:
    """SGLang evicts between lookup and load: then more has to be loaded than was asked about."""
    engine, text = sglang(server(chunk=16), 16), tokens(160, 18)
    engine.compute_and_store("a", text)
    lookup = engine.connector.submit_lookup("b", text, local_hit_tokens=96, cache_salt="")
    assert engine.connector.poll_lookup(lookup) == 160
    slots = engine.slots(128, 19)
    load = engine.connector.submit_load(lookup, [slots], local_hit_tokens=32, owned_device_indices=slots)
    assert engine.connector.prepare_load_on_stream(load, None)
    assert np.array_equal(engine.pool.read(slots), engine.expected(text)[:, :, 32:])
    engine.connector.finish_request("b")
    assert engine.connector._rank is not None and not engine.connector._rank.scheduler._held


def test_no_lease_is_left_behind(server: Servers, sglang: Engines) -> None:
    daemon, text = server(chunk=16), tokens(160, 10)
    engine = sglang(daemon, 16)
    engine.compute_and_store("a", text)
    connector = engine.connector
    for request, end in (("loaded", None), ("not loaded", 160), ("aborted", None), ("asked twice", None)):
        if request == "loaded":
            engine.load(request, text)
            continue
        lookup = connector.submit_lookup(request, text, local_hit_tokens=0, cache_salt="")
        connector.poll_lookup(lookup)
        if request == "asked twice":
            connector.poll_lookup(connector.submit_lookup(request, text, local_hit_tokens=0, cache_salt=""))
        if end is not None:
            connector.free_lookup_locks(request, start=0, end=end)
        connector.finish_request(request)
    lookup = connector.submit_lookup("at the end of all", text, local_hit_tokens=0, cache_salt="")
    connector.poll_lookup(lookup)
    connector.end_all_sessions()
    assert connector._rank is not None and not connector._rank.scheduler._held


class Updater:
    """What changes SGLang's weights, and through which its KV pool is reached."""

    def __init__(self, taken_slots: int) -> None:
        pool = SimpleNamespace(size=4099, page_size=4, available_size=lambda: 4096 - taken_slots)
        self.done: list[str] = []
        tree = SimpleNamespace(check_hicache_events=lambda: self.done.append("looked"))
        self.scheduler = SimpleNamespace(token_to_kv_pool_allocator=pool, tree_cache=tree)

    def update_weights_from_disk(self, path: str) -> str:
        self.done.append("updated")
        return f"loaded {path}"

    def release_memory_occupation(self, request: Any) -> None:
        self.done.append("released")


@pytest.fixture
def updater(monkeypatch: pytest.MonkeyPatch) -> type[Updater]:
    fresh = type("Updater", (Updater,), {})
    monkeypatch.setattr(weights, "_owner", lambda: fresh)
    monkeypatch.setattr(weights, "_listeners", [])
    monkeypatch.setattr(weights, "_waits", [])
    return fresh


@pytest.mark.parametrize("taken_slots", [0, 4])
def test_a_prompt_shorter_than_a_page_is_computed_while_weights_change(
    server: Servers, sglang: Engines, updater: type[Updater], taken_slots: int
) -> None:
    """SGLang asks nothing about such a prompt, and hands it over when its answer has filled a page."""
    engine, text = sglang(server(chunk=16), 16), tokens(160, 11)
    engine.connector.end_all_sessions()
    updater(taken_slots).update_weights_from_disk("x")
    salt = engine.connector.build_cache_salt(None, None)
    engine.compute_and_store("short prompt", text, salt=salt)
    assert engine.load("next", text, salt=salt)[0] == (0 if taken_slots else 160)


def test_new_weights(server: Servers, sglang: Engines, updater: type[Updater]) -> None:
    daemon, text = server(chunk=16), tokens(160, 11)
    engine, other = sglang(daemon, 16), sglang(daemon, 16)
    salt = engine.connector.build_cache_salt(None, None)
    engine.compute_and_store("a", text, salt=salt)
    asked = engine.connector.submit_lookup("asked before", text, local_hit_tokens=0, cache_salt=salt)
    assert engine.connector.poll_lookup(asked) == 160
    weights.forget(other.connector._rank._new_weights)  # another process, really
    assert updater(160).update_weights_from_disk("x") == "loaded x"
    slots = engine.slots(160, 12)
    load = engine.connector.submit_load(asked, [slots], local_hit_tokens=0, owned_device_indices=slots)
    assert not engine.connector.prepare_load_on_stream(load, None)
    fresh = engine.connector.build_cache_salt(None, None)
    assert engine.load("b", text, salt=fresh)[0] == 0
    engine.compute_and_store("asked before", text, salt=fresh)
    assert engine.load("c", text, salt=fresh)[0] == 0, "half of it may be of the old weights"
    engine.compute_and_store("not asked before", text, salt=fresh)
    assert engine.load("c", text, salt=fresh)[0] == 0, "the radix tree may hold what the old weights computed"
    engine.connector.end_all_sessions()  # now it is empty
    engine.compute_and_store("d", text, salt=fresh)
    assert engine.load("e", text, salt=fresh)[0] == 160
    assert other.load("f", text, salt=salt)[0] == 160, "the other engine has the old weights"


@pytest.mark.parametrize("releases", [False, True])
def test_sglang_hears_of_the_ends_of_stores_before_it_empties_its_cache(
    server: Servers, sglang: Engines, updater: type[Updater], releases: bool
) -> None:
    """It refuses to do so while a store runs, and ends if it was told to release memory."""
    engine, one, text = sglang(server(chunk=16), 16), updater(160), tokens(160, 11)
    rank = engine.connector._rank
    assert rank is not None
    runs, go = threading.Event(), threading.Event()

    def midway() -> None:
        runs.set()
        assert go.wait(PATIENCE)
        one.done.append("stored")

    pause_once(rank.worker._access.parts[0].copier, "gather", midway)
    stores = beside(lambda: engine.compute_and_store("a", text))
    assert runs.wait(PATIENCE)
    waits = rank.copies.session.wait_finished
    rank.copies.session.wait_finished = lambda seconds: (go.set(), waits(seconds))[1]  # type: ignore[method-assign]
    if releases:
        one.release_memory_occupation(SimpleNamespace(tags=["kv_cache"]))
    else:
        one.update_weights_from_disk("x")
    assert one.done == ["stored", "looked", "released" if releases else "updated"]
    assert stores.result(PATIENCE).future.ok


@pytest.mark.parametrize(
    ("name", "request_of", "backup", "changes"),
    [
        ("update_weights_from_ipc", {}, False, True),
        ("begin_weight_update", {}, False, True),
        ("end_weight_update", {}, False, True),
        ("check_weights", {"action": "checksum"}, False, False),
        ("check_weights", {"action": "reset_tensors"}, False, True),
        ("release_memory_occupation", {"tags": ["kv_cache"]}, False, False),
        ("release_memory_occupation", {"tags": ["weights"]}, False, True),
        ("release_memory_occupation", {"tags": None}, False, True),
        ("release_memory_occupation", {"tags": None}, True, False),
    ],
)
def test_what_sglang_does_to_its_weights(
    monkeypatch: pytest.MonkeyPatch, name: str, request_of: dict[str, Any], backup: bool, changes: bool
) -> None:
    owner = type("Owner", (), {name: lambda self, request: "done"})
    monkeypatch.setattr(weights, "_owner", lambda: owner)
    monkeypatch.setattr(weights, "_listeners", [])
    monkeypatch.setattr(weights, "_waits", [])
    monkeypatch.setattr(model_of_sglang, "_server_args", lambda: SimpleNamespace(enable_weights_cpu_backup=backup))
    heard: list[bool] = []
    weights.on_new_weights(heard.append)
    assert getattr(owner(), name)(SimpleNamespace(**request_of)) == "done"
    assert heard == [True] * changes, "a release that does not tell of its slots may have KV in them"


@pytest.mark.parametrize(
    "arguments",
    [
        {"load_format": "pt"},
        {"torchao_config": "int4wo-32"},
        {"kt_weight_path": "/experts"},
        {"forward_hooks": [{"name": "steer"}]},
        {"model_impl": "transformers"},
    ],
)
def test_arguments_that_change_the_numbers_change_the_layout(
    monkeypatch: pytest.MonkeyPatch, model: str, arguments: dict[str, Any]
) -> None:
    def fingerprint(**arguments: Any) -> bytes:
        monkeypatch.setattr(model_of_sglang, "_server_args", lambda: SimpleNamespace(**arguments))
        (described,) = describe_rank(pool_groups(MHATokenToKVPool(64), 1), ModelConfig(model), 1, Ranks())
        return described.layout(16).fingerprint

    assert fingerprint() == fingerprint(load_format="fastsafetensors", attention_backend="any", page_size=64)
    assert fingerprint(**arguments) != fingerprint()


def test_kv_that_may_be_rounded_has_a_name_of_its_own(model: str) -> None:
    (exact,), (lossy,) = (
        describe_rank(pool_groups(MHATokenToKVPool(64), 1), ModelConfig(model), 1, Ranks(), lossy_kv=name)
        for name in ("none", "int8")
    )
    assert exact.layout(16).fingerprint != lossy.layout(16).fingerprint and lossy.layout(16).rounded_row > 0


def test_random_weights_are_shared_with_nobody(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setattr(model_of_sglang, "_server_args", lambda: SimpleNamespace(load_format="dummy"))
    described = [
        describe_rank(pool_groups(MHATokenToKVPool(64), 1), ModelConfig(model), 1, Ranks(), engine_id=name)[0].layout(
            16
        )
        for name in ("one", "one", "other")
    ]
    assert described[0] == described[1] != described[2]


@pytest.mark.parametrize(
    ("arguments", "hf_config", "why"),
    [
        ({"load_format": "remote_instance"}, {}, "remote_instance .*model_id in the LMCache config file"),
        ({"dllm_algorithm": "LowConfidence"}, {}, "diffusion"),
        ({}, {"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"quantization_param_path": "scales.json"}, {}, "quantization-param-path"),
    ],
)
def test_what_no_identity_tells_is_refused(
    monkeypatch: pytest.MonkeyPatch, model: str, arguments: dict[str, Any], hf_config: dict[str, Any], why: str
) -> None:
    monkeypatch.setattr(model_of_sglang, "_server_args", lambda: SimpleNamespace(**arguments))
    with pytest.raises(LayoutError, match=why):
        describe_rank(pool_groups(MHATokenToKVPool(64), 1), ModelConfig(model, hf_config), 1, Ranks())


def test_clear_and_close(server: Servers, sglang: Engines) -> None:
    daemon, text = server(chunk=16), tokens(160, 13)
    engine = sglang(daemon, 16)
    engine.compute_and_store("a", text)
    assert engine.connector.clear()
    assert engine.load("b", text)[0] == 0
    daemon.kill()
    assert not engine.connector.clear()
    engine.compute_and_store("c", text)
    assert engine.load("d", text)[0] == 0
    engine.connector.close()
    assert engine.compute_and_store("e", text) is None
    assert engine.load("f", text)[0] == 0


def test_the_log_says_what_happened(
    server: Servers, sglang: Engines, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of the documentation's pair of prompts."""
    monkeypatch.setattr(logging.getLogger("lmcache"), "propagate", True)
    engine = sglang(server(chunk=8), 1)
    first = tokens(135, 14)
    second = [*first[:24], *tokens(116, 15)]
    with caplog.at_level(logging.INFO, "lmcache"):
        engine.compute_and_store("a", first[:100])
        engine.compute_and_store("a", first)
        engine.connector.finish_request("a")
        assert engine.load("b", second[:104])[0] == 24
        engine.compute_and_store("b", second[:105])
        engine.compute_and_store("b", second)
        engine.connector.finish_request("b")
    said = caplog.text
    stored = [line for line in said.splitlines() if "Stored" in line]
    assert "Stored 128 out of total 135 tokens. size: 0.0001 gb" in stored[0]
    assert "put_time" in stored[0] and "skipped: 0 tokens (request a)" in stored[0]
    assert "Retrieved 24 out of 24 required tokens (from 104 total tokens)" in said
    assert any("Stored 112 out of total 140 tokens. " in line and "skipped: 24 tokens" in line for line in stored)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tree_components": (SimpleNamespace(name="FULL"), SimpleNamespace(name="C128"))}, "keeps full, c128"),
        (
            {"tree_components": (SimpleNamespace(name="SWA"),), "sliding_window_size": 100},
            "keeps swa, its pools hold full",
        ),
        ({"pool": SimpleNamespace(k_buffer=[])}, "KV pool of kind SimpleNamespace"),
        ({"model_config": ModelConfig("none/such")}, "set model_id in the LMCache config file"),
        ({"model_config": None}, "release of SGLang is not understood"),
    ],
)
def test_other_models_run_without(
    server: Servers,
    sglang: Engines,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    reason: str,
) -> None:
    monkeypatch.setattr(logging.getLogger("lmcache"), "propagate", True)
    engine = sglang(server(), 16, **change)
    lines = {line for line in caplog.messages if "serves nothing for this engine" in line}
    assert len(lines) == 1 and reason in lines.pop()
    engine.pool = MHATokenToKVPool(64 * 64)
    assert engine.compute_and_store("a", tokens(64, 1)) is None
    assert engine.load("b", tokens(64, 1))[0] == 0
    assert engine.connector.aligned_swa_window_size() == (112 if "sliding_window_size" in change else 0)
    engine.connector.reset_mamba_checkpoint_metadata(None)
    engine.connector.finish_request("a")
    engine.connector.end_all_sessions()


@pytest.mark.parametrize("attribute", ["k_scale_buffer", "kv_cache_layout", "dtype"])
def test_pools_that_keep_something_else_are_refused(server: Servers, sglang: Engines, attribute: str) -> None:
    pool = MHATokenToKVPool(64 * 64)
    setattr(pool, attribute, "torch.int4")
    assert sglang(server(), 16, pool=pool).connector._rank is None


def made(kind: str, **attributes: Any) -> Any:
    """An object of a class of this name."""
    return type(kind, (), attributes)()


def with_states(states: Any) -> Any:
    return made(
        "HybridLinearKVPool",
        full_attention_layer_id_mapping={1: 0},
        full_kv_pool=MHATokenToKVPool(64),
        mamba_pool=states,
    )


@pytest.mark.parametrize(
    ("pool", "why"),
    [
        (made("SWAKVPool", layers_mapping={0: (0, True), 1: (1, True)}), "layers all have sliding windows"),
        (made("UnifiedSWAKVPool"), "pool of kind UnifiedSWAKVPool"),
        (with_states(made("UnifiedMambaPool")), "pool of states of kind UnifiedMambaPool"),
        (
            with_states(
                made(
                    "MambaPool",
                    mamba_cache=SimpleNamespace(conv=[], temporal=None, replayssm_d=object()),
                    _slot_siblings=(made("NGramPool"),),
                )
            ),
            "more than a plain state .replayssm_d, NGramPool.",
        ),
    ],
)
def test_pools_of_windows_and_states_that_keep_something_else_are_refused(pool: Any, why: str) -> None:
    with pytest.raises(LayoutError, match=why):
        pool_groups(pool, 16, 127)


def test_chunks_fill_the_window_or_are_longer(model: str) -> None:
    """Else SGLang never has all of the chunks that the window reaches into."""
    places = {0: (0, True), 1: (0, False), 2: (1, True), 3: (1, False), 4: (2, True), 5: (2, False)}
    pools = {"full_kv_pool": MHATokenToKVPool(64), "swa_kv_pool": MHATokenToKVPool(32)}
    groups = pool_groups(made("SWAKVPool", layers_mapping=places, **pools), 16, 127)
    assert [(one.layers, one.reach_tokens) for one in groups] == [((1, 3, 5), 0), ((0, 2, 4), 128)]
    full, window = describe_rank(groups, ModelConfig(model), 16, Ranks())
    assert full.layout(48).num_layers == window.layout(64).num_layers == 3
    for chunk in (1, 16, 64, 128, 144, 256):
        window.layout(chunk)
    for chunk in (48, 96):
        with pytest.raises(LayoutError, match="--chunk-size 128, or with one that divides 128"):
            window.layout(chunk)


def test_pipelines_are_refused() -> None:
    pool = MHATokenToKVPool(64)
    with pytest.raises(LayoutError, match="pp_size=2"):
        describe_rank(pool_groups(pool, 1), ModelConfig("none/such"), 1, Ranks(pp_size=2), model_id="mine")


def test_mla_is_one_latent_a_token(server: Servers, sglang: Engines) -> None:
    engine = sglang(server(chunk=16), 16, pool=MLATokenToKVPool(64 * 64))
    rank = engine.connector._rank
    assert rank is not None and rank.kv.model.kind == "mla" and rank.kv.shard.count == 1


class Together(Agreement):
    """The agreement of two ranks that are threads here."""

    def __init__(self, *groups: tuple[Any, int], device: str = "cpu") -> None:
        super().__init__()
        self.alone = all(size == 1 for _, size in groups)

    barrier = threading.Barrier(2, timeout=PATIENCE)
    said: tuple[list[int], list[int]] = ([], [])

    def least(self, number: int) -> int:
        if self.alone:
            return number
        place = self.barrier.wait()
        self.said[place].append(number)
        self.barrier.wait()
        answer = min(self.said[0][-1], self.said[1][-1])
        self.barrier.wait()
        return answer


class Held:
    """In place of a rank's copier: copies nothing, tells of layers at once, as a GPU's does, and ends when it may."""

    bytes_per_second = 1e9

    def __init__(self, planes: int, points: bool) -> None:
        self.planes, self.may_end, self.waited = planes, threading.Event(), list[int]()
        self._points = points

    def scatter(self, base: int, blocks: Any, runs: Any, *, arena_bytes: Any = None, progress: Any = None) -> None:
        for planes in range(2, self.planes + 1, 2):
            if not self._points:
                break
            progress.arrived(planes, SimpleNamespace(wait=lambda planes=planes: self.waited.append(planes)))
        assert self.may_end.wait(PATIENCE)
        if not self._points:
            raise LayoutError("it cannot be copied")

    def close(self) -> None:
        self.may_end.set()


def begin_load(engine: SGLang, request: str, text: list[int]) -> tuple[Any, int]:
    """(load under way, tokens)."""
    lookup = engine.connector.submit_lookup(request, text, local_hit_tokens=0, cache_salt="")
    found = engine.connector.poll_lookup(lookup)
    slots = engine.slots(found, 3)
    load = engine.connector.submit_load(
        lookup, [slots], local_hit_tokens=0, owned_device_indices=slots, producer_stream=None
    )
    return load, found


def test_a_forward_waits_for_each_layer_of_the_loads_under_way(
    server: Servers, sglang: Engines, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lmcache"), "propagate", True)
    daemon, text = server(chunk=16), tokens(160, 30)
    engine = sglang(daemon, 1)
    engine.compute_and_store("a", text)
    counter = engine.pool.layer_transfer_counter
    assert (counter.num_layers, counter.consumer_index) == (3, -1)
    worker = engine.connector._rank.worker
    real, held = worker._access.parts[0].copier, Held(6, points=True)
    worker._access.parts[0] = worker._access.parts[0]._replace(copier=held)
    try:
        load, found = begin_load(engine, "b", text)
        assert found == 160
        assert engine.connector.prepare_load_on_stream(load, None)
        assert not load.future.ended()
        assert engine.connector.ready_prefix_count([load]) == 0
        assert counter.consumer_index == 0
        assert daemon.status()["index"]["leases"] == 1, "what is read is not given away"
        for layer in (0, 1, 2):
            engine.pool.get_layer(layer)
        assert held.waited == [2, 4, 6]
        held.may_end.set()
        assert load.future.result(PATIENCE)
        engine.pool.get_layer(0)
        assert held.waited == [2, 4, 6], "nothing to wait for"
        assert counter.consumer_index == -1
        with caplog.at_level(logging.INFO, "lmcache"):
            assert engine.connector.ready_prefix_count([load]) == 1
            assert engine.connector.complete_load(load)
            said = caplog.text.count("Retrieved 160 out of 160 required tokens")
            assert engine.connector.complete_load(load)
            engine.connector.finish_request("b")
        assert caplog.text.count("Retrieved 160 out of 160 required tokens") == said > 0
        eventually(lambda: daemon.status()["index"]["leases"] == 0)
    finally:
        worker._access.parts[0] = worker._access.parts[0]._replace(copier=real)


def test_a_load_that_fails_before_it_is_certain_is_no_load(server: Servers, sglang: Engines) -> None:
    daemon, text = server(chunk=16), tokens(160, 31)
    engine = sglang(daemon, 1)
    engine.compute_and_store("a", text)
    worker = engine.connector._rank.worker
    real, held = worker._access.parts[0].copier, Held(6, points=False)
    worker._access.parts[0] = worker._access.parts[0]._replace(copier=held)
    held.may_end.set()
    try:
        load, _ = begin_load(engine, "b", text)
        assert not engine.connector.prepare_load_on_stream(load, None)
        assert engine.pool.layer_transfer_counter.consumer_index == -1
    finally:
        worker._access.parts[0] = worker._access.parts[0]._replace(copier=real)
    assert engine.load("c", text)[0] == 160


def test_how_fast_prompts_were_computed_is_told(
    server: Servers, sglang: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load from a tier is judged by it. Answers and prompts that are loaded say nothing of it."""
    engine, told, now = sglang(server(chunk=16), 1), list[float](), [1000.0]
    rank = engine.connector._rank
    poll = rank.scheduler.poll

    def noting(chain: Any, have: int, rate: float, **more: Any) -> Any:
        told.append(rate)
        return poll(chain, have, rate, **more)

    monkeypatch.setattr(rank.scheduler, "poll", noting)
    rank.requests.runtime = replace(RUNTIME, now=lambda: now[0])
    text = tokens(700, 33)
    assert engine.load("a", text)[0] == 0
    assert told == [0.0]
    now[0] += 4.0
    engine.compute_and_store("a", text[:400])
    now[0] += 2.0
    engine.compute_and_store("a", text)
    engine.load("b", tokens(200, 34))
    assert told[1] == 150.0, "the faster of both steps: 300 tokens in 2 s"
    now[0] += 0.1
    engine.compute_and_store("a", [*text, *tokens(400, 35)])  # its answer
    assert engine.load("c", text)[0] == 688
    now[0] += 0.1
    engine.compute_and_store("c", text)
    engine.load("d", tokens(200, 36))
    assert told[-1] == told[1]


def test_a_load_that_hangs_costs_one_deadline(
    server: Servers, sglang: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of waiting until it is certain and until it has ended together; then it is called off."""
    engine, text = sglang(server(chunk=16), 1), tokens(160, 37)
    engine.compute_and_store("a", text)
    rank, waits, now = engine.connector._rank, list[float | None](), [1000.0]
    rank.requests.runtime = rank.worker.runtime = replace(RUNTIME, now=lambda: now[0])

    def in_vain(self: Progress, planes: int, seconds: float) -> bool:
        now[0] += seconds
        return False

    monkeypatch.setattr(Progress, "wait_recorded", in_vain)
    wait = rank.copies.wait

    def noting(copies: Any, seconds: float | None) -> bool:
        waits.append(seconds)
        return wait(copies, seconds)

    monkeypatch.setattr(rank.copies, "wait", noting)
    load, _ = begin_load(engine, "b", text)
    engine.connector.prepare_load_on_stream(load, None)
    assert now[0] == 1000.0 + PATIENCE and waits[0] == 0.0, "nothing is left of it"


def test_a_block_table_begins_with_token_0() -> None:
    slots = np.array([7, 3, 9])[:, None] * 16 + np.arange(16)
    table, filled = block_table(slots.reshape(-1)[:40], 16, 32)
    assert filled is None and table.dtype == np.int32 and table[2:].tolist() == [7, 3, 9] and len(table) == 5


@pytest.mark.parametrize("why", ["switched off", "another counter"])
def test_where_layers_cannot_wait_loads_end_before_the_forward(server: Servers, sglang: Engines, why: str) -> None:
    pool, settings = MHATokenToKVPool(64 * 64), {}
    theirs = object() if why == "another counter" else None
    pool.layer_transfer_counter = theirs
    if why == "switched off":
        settings["use_layerwise"] = False
    engine = sglang(server(chunk=16), 1, settings, pool=pool)
    text = tokens(160, 32)
    engine.compute_and_store("a", text)
    assert pool.layer_transfer_counter is theirs
    found, slots = engine.load("b", text)
    assert np.array_equal(engine.pool.read(slots), engine.expected(text)[:, :, :found])


def test_two_ranks_decide_together(server: Servers, sglang: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has half of the heads. What one of them cannot load, neither does; a whole engine finds what both have stored."""
    monkeypatch.setattr(unified, "Agreement", Together)
    daemon, text = server(chunk=16), tokens(160, 16)
    results: dict[int, list[Any]] = {0: [], 1: []}
    stored = threading.Barrier(2, timeout=PATIENCE)  # there is nothing to find before both have

    def rank(number: int) -> None:
        said = results[number]
        engine = sglang(daemon, 16, tp=(2, number))
        engine.compute_and_store("a", text)
        stored.wait()
        found, slots = engine.load("b", text)
        said += [found, np.array_equal(engine.pool.read(slots), engine.expected(text)[:, :, :found])]
        if number == 1:
            monkeypatch.setattr(engine.connector._rank, "settle", lambda copy, progress=None: False)
        said.append(engine.load("c", text)[0])
        assert engine.connector._rank is not None
        said.append(engine.connector._rank.kv.shard)

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        assert results[number][:3] == [160, True, 0]
        assert results[number][3].first_head == number * HEADS // 2


def test_ranks_that_store_nothing_do_not_wait_for_the_one_that_does(
    server: Servers, sglang: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank has all of the latents, and the first one stores them."""
    ranks = SimpleNamespace(alone=False, name=lambda engine: "the engine", least=lambda number: number)
    monkeypatch.setattr(unified, "Agreement", lambda *_: ranks)
    daemon, text = server(chunk=16), tokens(160, 16)
    first, second = (sglang(daemon, 16, pool=MLATokenToKVPool(64 * 64), tp=(2, number)) for number in (0, 1))
    ranks.name = lambda engine: "another engine"
    other = sglang(daemon, 16, pool=MLATokenToKVPool(64 * 64), tp=(2, 1))

    def answer(engine: SGLang) -> int | None:
        assert engine.connector._rank is not None
        engine.connector._rank.requests.prefill.tokens_per_second = 1.0  # so that a wait would be long
        return engine.connector.poll_lookup(
            engine.connector.submit_lookup("a", text, local_hit_tokens=0, cache_salt="")
        )

    assert second.connector._rank is not None and not second.connector._rank.kv.stores
    assert answer(first) == answer(second) == 0 and answer(other) is None


def test_only_complete_pages_are_announced(server: Servers, sglang: Engines) -> None:
    daemon, text = server(chunk=16), tokens(100, 19)
    engine = sglang(daemon, 64)
    assert engine.load("a", text)[0] == 0 and daemon.counters()["promised_chunks"] == 4
    engine.compute_and_store("a", text)
    assert daemon.counters()["promised_chunks"] == 0 and engine.load("b", text)[0] == 64


def test_a_lookup_that_has_waited_long_enough_gets_what_is_there(server: Servers, sglang: Engines) -> None:
    daemon, text = server(chunk=16), tokens(160, 18)
    one, other = sglang(daemon, 16), sglang(daemon, 16)
    one.compute_and_store("a", text[:80])
    lookup = one.connector.submit_lookup("b", text, local_hit_tokens=0, cache_salt="")
    assert one.connector.poll_lookup(lookup) == 80, "it computes the others"
    other.connector.operation_timeout = 0.0
    lookup = other.connector.submit_lookup("b", text, local_hit_tokens=0, cache_salt="")
    assert other.connector.poll_lookup(lookup) == 80


def test_what_a_tier_brings_is_waited_for(server: Servers, sglang: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, text = sglang(server(chunk=16), 16), tokens(160, 17)
    engine.compute_and_store("a", text)
    connector, rank = engine.connector, engine.connector._rank
    assert rank is not None
    really = rank.scheduler.poll
    monkeypatch.setattr(rank.scheduler, "poll", lambda *_, **__: Loading(0, 10))
    lookup = connector.submit_lookup("b", text, local_hit_tokens=0, cache_salt="")
    assert connector.poll_lookup(lookup) is None
    monkeypatch.setattr(rank.scheduler, "poll", really)
    assert connector.poll_lookup(lookup) == 160
    connector.finish_request("b")
    monkeypatch.setattr(rank.scheduler, "poll", lambda *_, **__: Loading(0, 10))
    connector.operation_timeout = 0.0
    assert connector.poll_lookup(connector.submit_lookup("c", text, local_hit_tokens=0, cache_salt="")) == 0


# The older radix caches


def older(model: str, page_size: int = 1) -> dict[str, Any]:
    pool = MHATokenToKVPool(4096)
    return {
        "sgl_config": ModelConfig(model),
        "tp_size": 1,
        "rank": 0,
        "k_pool": pool.k_buffer,
        "v_pool": pool.v_buffer,
        "tp_group": None,
    } | {"pool": pool}


@pytest.mark.parametrize("chunk", [8, 24])
def test_the_layerwise_connector(
    server: Servers,
    tmp_path: Path,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    updater: type[Updater],
    chunk: int,
) -> None:
    """As SGLang 0.5.10 calls it: it has `offset` tokens, and slots for all that follow."""
    monkeypatch.setenv(FILE_VARIABLE, config(tmp_path, server(chunk=chunk)))
    arguments = older(model)
    pool = arguments.pop("pool")
    connector = LMCacheLayerwiseConnector(**arguments)
    text, slots = tokens(135, 20), np.random.default_rng(0).permutation(4096)[:300].astype(np.int64)
    pool.fill(slots[:135], text)
    node = SimpleNamespace(key=SimpleNamespace(extra_key=None))
    connector.store_kv(StoreMetadata(last_node=node, token_ids=text, kv_indices=slots[:135], offset=0))
    whole = 135 // chunk * chunk
    for have in (0, 50):
        target = np.full(135, -1, np.int64)
        target[have:] = slots[140 : 275 - have]
        pad = have % connector.chunk_size()
        count = connector.start_load_kv(LoadMetadata(token_ids=text, slot_mapping=target, offset=have - pad))
        assert count - pad == whole - have
        for layer in range(3):
            connector.load_kv_layerwise(layer)
        filled = pool.read(target[have:whole])
        assert np.array_equal(filled, pool.read(slots[have:whole]))
    target = np.concatenate((np.full(whole, -1, np.int64), slots[140 : 275 - whole]))
    assert connector.start_load_kv(LoadMetadata(text, target, whole)) == 0, "nothing beyond what the tree has"
    secret = tokens(64, 21)
    tenant = SimpleNamespace(key=SimpleNamespace(extra_key="tenant"))
    connector.store_kv(StoreMetadata(tenant, secret, slots[:64], 0))
    assert connector.start_load_kv(LoadMetadata(secret, slots[:64], 0)) == 0
    for emptied, taken_slots, clean in ((False, 4, False), (False, 0, False), (True, 4, False), (True, 0, True)):
        if emptied:
            connector.reset()
        updater(taken_slots).update_weights_from_disk("x")
        connector.store_kv(StoreMetadata(node, text, slots[:135], 0))
        found = connector.start_load_kv(LoadMetadata(text, slots[:135], 0))
        assert found == (whole if clean else 0), "else the radix tree may hold what the old weights computed"
    connector.close()
    connector.store_kv(StoreMetadata(node, text, slots[:135], 0))
    assert connector.start_load_kv(LoadMetadata(text, slots[:135], 0)) == 0


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_multi_process_connector(server: Servers, tmp_path: Path, model: str, page_size: int) -> None:
    """As SGLang 0.5.17 calls it: look up, take slots, retrieve; and let go of what is not retrieved."""
    found = lmcache_get_config(config(tmp_path, server(chunk=8)))
    arguments = older(model)
    pool = arguments.pop("pool")
    connector = LMCacheMPConnector(page_size=page_size, host=found.mp_host, port=found.mp_port, **arguments)
    text, slots = tokens(135, 22), np.arange(16, 416, dtype=np.int64)
    pool.fill(slots[:135], text)
    assert connector.lookup_kv(text, "r") == 0
    connector.store_kv(StoreMetadata(None, text, slots[:135], 0, request_id="r"))
    connector.end_session("r")
    matched = connector.lookup_kv(text[:130], "s")
    assert matched == 128
    have = 32
    target = np.concatenate((np.full(have, -1, np.int64), slots[160 : 160 + matched - have]))
    load = LoadMetadata(text[:130], target, offset=have, prefix_pad=0, request_id="s")
    assert connector.retrieve_kv(load) == matched - have
    assert np.array_equal(pool.read(target[have:]), pool.read(slots[have:matched]))
    assert connector.retrieve_kv(load) == 0, "it was retrieved before"
    assert connector.lookup_kv(text, "t") == connector.lookup_kv(text, "t") == 128
    connector.release_pending("t")
    connector.release_pending("t")
    assert connector._rank is not None and not connector._rank.scheduler._held
    connector.close()


def test_older_releases_refuse_adapters(
    server: Servers, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache.integration.sglang.older.lora_enabled", lambda: True)
    monkeypatch.setenv(FILE_VARIABLE, config(tmp_path, server()))
    arguments = older(model)
    arguments.pop("pool")
    assert LMCacheLayerwiseConnector(**arguments)._rank is None


# Settings


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("LMCACHE_")]:
        monkeypatch.delenv(name)
    return tmp_path / "settings.yaml"


def test_settings(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings(None).address == ""
    file.write_text("chunk_size: 8\nlocal_cpu: true\nuse_layerwise: true\nmax_local_cpu_size: 10\n")
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    found = read_settings(None)
    assert (found.config.chunk_size, found.config.max_local_cpu_size, found.address) == (8, 10, "")
    other = file.with_name("other.yaml")
    other.write_text("mp_port: 5556\nmodel_id: mine\n")
    found = read_settings(str(other))
    assert (found.address, found.model_id, found.config.chunk_size) == ("tcp://localhost:5556", "mine", 256)
    other.write_text("mp_host: tcp://10.0.0.5\n")
    assert read_settings(str(other)).address == "tcp://10.0.0.5:5555"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("chunk_sise: 8", "did you mean"),
        ("chunk_size: 0", "chunk_size"),
        ("mp_port: many", "mp_port 'many'"),
        ("mp_host: udp://x", "only tcp"),
        ("- a", "key: value"),
        ("a: [", "not YAML"),
    ],
)
def test_wrong_settings(file: Path, text: str, word: str) -> None:
    file.write_text(text + "\n")
    with pytest.raises(ConfigError, match=word):
        read_settings(str(file))


def test_no_file(file: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(str(file))
