"""/metrics as Prometheus and dashboards read it: the public project's names, the dashboard of deploy/, and a real Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine_process import Engine
from lmcache.observability.histogram import Histogram
from lmcache.server.earlier_names import HELP_0_5, MOST_MODELS, EarlierNames
from lmcache.server.metrics import HELP, families
from lmcache.wire import messages as m
from ports import free_port
from servers import PATIENCE, Process, Raw, Server, eventually, server_parts
from test_accounts import chain

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = ROOT / "deploy/grafana/lmcache.json"
FETCHED = ROOT / ".cache/prometheus/bin"
OLD = "--metrics-names", "lmcache-0.5"


def page(server: Server) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics", timeout=PATIENCE) as answer:
        return str(answer.read().decode())


def samples(server: Server) -> dict[tuple[str, str], float]:
    """(name, model or what else distinguishes it) -> value."""
    found = {}
    for family in text_string_to_metric_families(page(server)):
        for one in family.samples:
            found[one.name, " ".join(value for _, value in sorted(one.labels.items()))] = one.value
    return found


def expressions() -> Iterator[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for one in dashboard["templating"]["list"]:
        if one["type"] == "query":
            yield one["query"]["query"].split("(")[1].rpartition(",")[0]


# --- the public project's names


def test_only_a_server_that_was_told_has_the_names_of_0_5(server: Callable[..., Server]) -> None:
    own, old = (samples(server(flags=flags)) for flags in ((), OLD))
    named = [name for name, _ in old if name.startswith(("lmcache_mp_", "lmcache:"))]
    assert not [name for name, _ in own if name.startswith(("lmcache_mp_", "lmcache:"))]
    assert "lmcache_mp_l1_usage_ratio" in named and "lmcache:local_cache_usage" in named
    assert not [name for name in named if "_l2_" in name], "there is no tier, so nothing is known of tiers"
    assert {name for name, _ in own} <= {name for name, _ in old}, "they come beside the server's own"


def test_the_names_of_0_5_mean_what_they_meant(server: Callable[..., Server], folders: Callable[[str], Path]) -> None:
    disk = f"disk://{folders('/tmp')}?max_gb=1&name=disk"
    cache = server(l1=1.03, flags=(*OLD, "--l2", disk, "--worth", "always", "--l2-patience-seconds", "60"))
    raw = Raw(cache, "raw", shard_bytes=1 << 16)
    model, a = raw.layout.model_id, chain(1, 4)

    def look_up(hashes: bytes, request: str, tokens: int) -> int:
        def once() -> Any:
            found = raw.ask(m.Lookup(raw.space, hashes, 0, request=request, tokens=tokens))
            return None if found.loading else found

        found = eventually(once)
        raw.ask(m.Release([found.lease]))
        return int(found.chunks)

    def store(hashes: bytes, kept: int) -> None:
        raw.store(hashes)
        eventually(lambda: cache.counters().get('tier_kept_shards_total{tier="disk"}', 0) == kept)

    assert look_up(a, "first", 70) == 0
    store(a, 4)
    assert look_up(a, "second", 70) == 4
    store(chain(2, 6), 10)
    store(chain(3, 6), 16)
    store(chain(4, 8), 24)  # which needs the memory of `a`
    assert cache.counters()["evicted_chunks_total"] >= 4
    assert look_up(a, "third", 70) == 4
    raw.ask(m.Copied("load", 64, 0.001, 0, request="third"))
    raw.ask(m.Copied("store", 64, 0.002, 0, request="third"))
    found, own = samples(cache), cache.counters()
    for name, value in (
        ("lookup_requested_tokens_total", 3 * 64),
        ("lookup_hit_tokens_total", 2 * 64),
        ("lookup_hit_l1_tokens_total", 64),
        ("lookup_hit_l2_tokens_total", 64),
        ("lookups_requests_total", 3),
        ("l0_l1_load_throughput_GB_per_second_count", 1),
    ):
        assert found[f"lmcache_mp_{name}", model] == value, name
    rate = found["lmcache_mp_l0_l1_load_throughput_GB_per_second_sum", model]
    assert rate == pytest.approx(64 / 16 * 65536 / 0.001 / 1e9)
    assert found["lmcache_mp_num_chunks_loaded_total", ""] == 4
    assert found["lmcache_mp_l1_read_chunks_total", ""] == 4 + own['tier_kept_shards_total{tier="disk"}']
    assert found["lmcache_mp_l1_write_chunks_total", ""] == own["committed_chunks_total"] == 28
    assert found["lmcache_mp_l1_evicted_chunks_total", ""] == own["evicted_chunks_total"]
    assert found["lmcache_mp_l2_prefetch_load_completed_chunks_total", ""] == 4
    assert found["lmcache_mp_l2_prefetch_lookup_requests_total", ""] == own["fetches_total"] >= 2
    assert found["lmcache_mp_l2_usage_bytes", "disk"] == own['tier_stored_bytes{tier="disk"}'] > 0
    assert found["lmcache_mp_num_inflight_l2_loads", "0 disk"] == 0
    assert found["lmcache:num_lookup_hits_total", ""] / found["lmcache:num_lookup_tokens_total", ""] == 2 / 3
    assert 0 < found["lmcache_mp_l1_usage_ratio", ""] <= 1
    assert {
        re.sub("_(bucket|sum|count)$", "", name) for name, _ in found if name.startswith(("lmcache_mp_", "lmcache:"))
    } == {("lmcache" if name.startswith(":") else "lmcache_") + name for name in HELP_0_5} - {
        "lmcache_mp_l1_allocation_failure_chunks_total"
    }  # no store was refused
    raw.close()


def test_a_store_that_gets_no_memory_is_an_allocation_failure(server: Callable[..., Server]) -> None:
    cache = server(l1=1.03, flags=OLD)
    raw = Raw(cache, "raw", shard_bytes=1 << 16)
    assert raw.reserve(chain(1, 40)).refused > 0
    found = samples(cache)
    failed = found["lmcache_mp_l1_allocation_failure_chunks_total", f"l1_store {raw.layout.model_id}"]
    assert failed == cache.counters()["refused_chunks_total"] > 0
    raw.close()


def test_models_without_end_share_a_label(folders: Callable[[str], Path]) -> None:
    with server_parts(folders, 1 << 20) as (service, _):
        names = EarlierNames(service)
        labels = {names._model(f"model {number}") for number in range(3 * MOST_MODELS)}
    assert len(labels) == MOST_MODELS + 1 and 'model_name="other"' in labels


def test_the_page_lists_every_name_of_0_5() -> None:
    text = (ROOT / "docs/coming-from-lmcache-0.5.md").read_text()
    names = {("lmcache" if name.startswith(":") else "lmcache_") + name for name in HELP_0_5}
    assert sorted(name for name in names if f"| `{name}` |" not in text) == []
    assert set(re.findall(r"^\| `(lmcache[_:][a-zA-Z_0-9]+)` \|", text, re.MULTILINE)) == names


def test_a_histogram_is_one_family() -> None:
    one = Histogram((1, 2.5))
    for value in (0.5, 1, 2, 9):
        one.observe(value)
    (family,) = families(one.counters("x_seconds", 'a="b"'))
    assert (family.name, family.type) == ("lmcache_x_seconds", "histogram")
    assert [(one.name[18:], one.labels.get("le"), one.value) for one in family.samples] == [
        *(("bucket", "1", 2), ("bucket", "2.5", 3), ("bucket", "+Inf", 4)),
        *(("sum", None, 12.5), ("count", None, 4)),
    ]
    assert all(one.labels["a"] == "b" for one in family.samples)


# --- the dashboard


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(numbers) == len(set(numbers)) > 10
    asked = {name for text in expressions() for name in re.findall(r"lmcache_([a-z0-9_]+)", text)}
    assert asked and {re.sub("_bucket$", "", name) for name in asked} <= {*HELP}
    boxes = [panel["gridPos"] for panel in dashboard["panels"]]
    for place, one in enumerate(boxes):
        assert one["x"] + one["w"] <= 24
        for other in boxes[:place]:
            apart = one["x"] >= other["x"] + other["w"] or other["x"] >= one["x"] + one["w"]
            assert apart or one["y"] >= other["y"] + other["h"] or other["y"] >= one["y"] + one["h"], "panels overlap"


# --- a real Prometheus


def binary(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=FETCHED)
    if found is None:
        pytest.skip(f"no {name}: `./run test` fetches Debian's where there is apt-get")
    return found


def test_promtool_finds_nothing_to_complain_about(server: Callable[..., Server], engine: Callable[..., Engine]) -> None:
    tool, cache = binary("promtool"), server(flags=("--records-mb", "1"))
    one = engine(cache)
    one.store(list(range(64)))
    done = subprocess.run(
        [tool, "check", "metrics"], input=page(cache), capture_output=True, text=True, timeout=PATIENCE
    )
    complaints = [line for line in done.stderr.splitlines() if line.startswith("lmcache")]
    assert not complaints and done.returncode in (0, 3), done.stderr


def test_prometheus_answers_every_expression_of_the_dashboard(
    server: Callable[..., Server], engine: Callable[..., Engine], tmp_path: Path
) -> None:
    prometheus, cache, port = binary("prometheus"), server(flags=OLD), free_port()
    one = engine(cache)
    one.store(list(range(64)))
    one.lookup(list(range(80)))
    target = f"127.0.0.1:{cache.http_port}"
    job = {"job_name": "lmcache", "static_configs": [{"targets": [target]}]}
    (tmp_path / "prometheus.yml").write_text(
        json.dumps({"global": {"scrape_interval": "250ms", "scrape_timeout": "250ms"}, "scrape_configs": [job]})
    )
    flags = f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"
    scraper = Process([prometheus, *flags, f"--web.listen-address=127.0.0.1:{port}"])

    def ask(expression: str) -> Any:
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=PATIENCE) as answer:
            return json.load(answer)["data"]["result"]

    def scraped() -> Any:
        try:
            return ask("count_over_time(lmcache_requested_tokens_total[1m]) > 2")
        except OSError:
            return None

    try:
        eventually(scraped)
        assert float(ask("lmcache_mp_l1_write_chunks_total")[0]["value"][1]) == 4
        silent = []
        for text in expressions():
            filled = text.replace("$job", ".*").replace("$instance", ".*").replace("$__rate_interval", "1m")
            if not ask(filled):  # an error of the expression is an HTTP error
                silent.append(text)
    finally:
        scraper.end()
    of_tiers = "lmcache_tier_", "lmcache_refused_engines", "lmcache_fetches_", "predicted"  # not there yet
    assert [text for text in silent if not any(name in text for name in of_tiers)] == []


def test_what_an_engine_tells_of_its_speed_makes_no_infinite_numbers(
    server: Callable[..., Server], folders: Callable[[str], Path]
) -> None:
    """JSON has none, and a sum that has become infinite stays so."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    cache = server(chunk=16, flags=(*OLD, "--l2", f"dir://{folders('/tmp')}/store"))
    writer, reader = Raw(cache, "writer"), Raw(cache, "reader")
    for number, rate in enumerate((5e-324, 1e-300, float("inf"), float("nan"), -1.0, 1e300)):
        hashes = chain(number, 4)
        for one in (writer, reader):
            one.ask(m.Lookup(one.space, hashes, 0, request=f"r{number}", engine="e", prefill_rate=rate))
        writer.ask(m.Commit(writer.reserve(hashes).reservation, True))
        reader.ask(m.Lookup(reader.space, hashes, 0, request=f"r{number}", engine="e", prefill_rate=rate))
    for seconds in (5e-324, 0.5):
        writer.ask(m.Copied("store", 64, seconds, 0, request="r"))
    for path in ("status", "fetches", "requests"):
        with urllib.request.urlopen(f"http://127.0.0.1:{cache.http_port}/{path}", timeout=PATIENCE) as answer:
            json.loads(answer.read(), parse_constant=refuse)
    assert cache.get("/fetches")["fetches"], "there was something to tell"
    assert samples(cache)["lmcache_mp_l0_l1_store_throughput_GB_per_second_count", "raw"] == 1
    writer.close()
    reader.close()
