"""What users of the public project bring: its flags, its operator's command line, its routes and verbs; and SIGHUP."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from lmcache.cli.main import main
from lmcache.config import ServerConfig
from lmcache.config.earlier import EARLIER_FLAGS, add_earlier_flags, answers
from lmcache.config.engine import ROWS
from lmcache.config.load import add_flags, load
from lmcache.errors import ConfigError
from lmcache.server import preflight
from ports import free_port
from servers import PATIENCE, READY, eventually

ROOT = Path(__file__).resolve().parents[1]
_FLAGS = """
    instance-id transport host port chunk-size null-block-id max-workers max-gpu-workers max-cpu-workers
    grpc-server-workers hash-algorithm engine-type supported-transfer-mode isolated-ipc runtime-plugin-locations
    runtime-plugin-config shm-name script-allowed-imports run-script-api-enabled separate-object-groups
    worker-reap-timeout-seconds session-ttl-seconds worker-registration-grace-seconds enable-segmented-prefix
    enable-dedup-content enable-blend-reorder enable kv-event-log-size server-module p2p-advertise-url p2p-listen-url
    p2p-lookup-timeout p2p-load-timeout p2p-transfer-engine http-host http-port coordinator-url coordinator-advertise-ip
    coordinator-heartbeat-interval coordinator-event-reporting coordinator-event-flush-interval
    coordinator-event-transport coordinator-kafka-bootstrap-servers coordinator-kafka-topic
    coordinator-kafka-delivery-timeout coordinator-blend-timeout coordinator-blend-match-concurrency
    coordinator-l2-event-reporting coordinator-l2-event-flush-interval l1-manager l1-size-gb l1-use-lazy l1-init-size-gb
    l1-align-bytes l1-use-hugepages l1-devdax-path gds-l1-path gds-l1-use-direct-io gds-l1-backend l1-write-ttl-seconds
    l1-read-ttl-seconds eviction-policy eviction-trigger-watermark eviction-ratio l2-store-policy l2-prefetch-policy
    l2-prefetch-max-in-flight periodic-notifier-interval-ms l2-adapter disable-observability disable-metrics
    disable-grpc-metrics disable-logging enable-tracing otlp-endpoint event-bus-queue-size prometheus-port
    metrics-sample-rate lookup-hash-log-dir lookup-hash-log-rotation-interval lookup-hash-log-rotation-max-size
    lookup-hash-log-max-files enable-gc-monitor gc-monitor-min-pause-ms gc-monitor-top-objects enable-extra-logging
    extra-logging-interval trace-level trace-output
"""
FLAGS_OF_0_5 = _FLAGS.split()
_SETTINGS = """
    chunk_size local_cpu max_local_cpu_size local_cpu_use_hugepages reserve_local_cpu_size local_disk
    local_disk_path_sharding max_local_disk_size remote_url remote_serde use_layerwise save_decode_cache
    pre_caching_hash_algorithm enable_blending blend_recompute_ratios blend_thresholds blend_check_layers
    blend_min_tokens blend_special_str retrieve_locations store_location enable_p2p p2p_host p2p_init_ports
    p2p_lookup_ports mp_host mp_port enable_controller lmcache_instance_id controller_pull_url controller_reply_url
    lmcache_worker_ports lmcache_worker_ids lmcache_worker_heartbeat_delay_time lmcache_worker_heartbeat_time enable_pd
    pd_role pd_buffer_size pd_buffer_device pd_peer_host pd_peer_init_port pd_peer_alloc_port pd_peer_query_port
    pd_proxy_host pd_proxy_port pd_allocation_timeout_sec pd_shutdown_timeout_sec pd_condition_poll_interval_sec
    pd_max_prefill_len pd_backend_mode pd_skip_proxy_notification pd_bidirectional transfer_channel nixl_backends
    nixl_buffer_size nixl_buffer_device gds_path gds_path_sharding gds_buffer_size maru_path maru_pool_size use_gds
    gds_backend audit_actual_remote_url internal_api_server_host extra_config save_unfull_chunk blocking_timeout_secs
    external_lookup_client py_enable_gc cache_policy numa_mode enable_async_loading internal_api_server_enabled
    internal_api_server_port_start priority_limit internal_api_server_include_index_list
    internal_api_server_socket_path_prefix runtime_plugin_locations storage_plugins remote_storage_plugins
    lookup_timeout_ms min_retrieve_tokens hit_miss_ratio lookup_server_worker_ids enable_scheduler_bypass_lookup
    script_allowed_imports run_script_api_enabled enable_lazy_memory_allocator lazy_memory_initial_ratio
    lazy_memory_expand_trigger_ratio lazy_memory_step_ratio lazy_memory_safe_size enable_chunk_statistics
    chunk_statistics_auto_start_statistics chunk_statistics_auto_exit_timeout_hours
    chunk_statistics_auto_exit_target_unique_chunks chunk_statistics_strategy enable_kv_events use_gpu_connector_v3
    pin_timeout_sec pin_check_interval_sec remote_config_url app_id enable_hidden_state_cache max_hidden_state_cpu_size
    hidden_state_layers hidden_states_retrieve_mode
"""
SETTINGS_OF_0_5 = _SETTINGS.split()
_OPERATOR = """
    --host 127.0.0.1 --l1-size-gb 0.1 --chunk-size 256 --max-workers 1 --hash-algorithm blake3 --eviction-policy LRU
    --eviction-trigger-watermark 0.80 --eviction-ratio 0.20
"""
OPERATOR = _OPERATOR.split()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(made)
    add_earlier_flags(made)
    return made


def answered(*words: str) -> list[str]:
    return list(answers(vars(parser().parse_args(words))))


def test_every_flag_is_known() -> None:
    assert len(FLAGS_OF_0_5) == 89
    known = parser()._option_string_actions
    assert [flag for flag in FLAGS_OF_0_5 if f"--{flag}" not in known] == []
    assert not any(one.flag in parser().format_help() for one in EARLIER_FLAGS)


def test_every_setting_of_an_engine_is_known() -> None:
    assert len(SETTINGS_OF_0_5) == 108
    assert set(SETTINGS_OF_0_5) - {row.name for row in ROWS} == set()


@pytest.mark.parametrize("one", EARLIER_FLAGS, ids=lambda one: str(one.flag))
def test_each_is_answered_in_one_line_that_names_it(one: object) -> None:
    for words in ([one.flag], [one.flag, "value"]):  # type: ignore[attr-defined]
        if one.refused:  # type: ignore[attr-defined]
            with pytest.raises(ConfigError) as error:
                answered(*words, *(() if words[1:] else ("x",)))
            line = str(error.value)
            assert "is not supported: " in line
        else:
            (line,) = answered(*words)
            assert ": has no effect: " in line
        assert line.startswith(words[0]) and "\n" not in line
    assert answered() == []


def test_some_values_are_what_is_done_anyway() -> None:
    assert answered("--transport", "zmq") == []
    with pytest.raises(ConfigError, match="--transport grpc: is not supported: engines connect over ZMQ"):
        answered("--transport", "grpc")
    assert parser().parse_args(["--l1-use-hugepages"]).huge_pages == "always"


@pytest.mark.parametrize(
    ("typed", "gib"), [("2GB", 2), ("2 GiB", 2), ("2g", 2), ("512MB", 0.5), ("1.5G", 1.5), ("1T", 1024), ("3", 3)]
)
def test_sizes_with_units(typed: str, gib: float) -> None:
    assert load({}, {"LMCACHE_L1_SIZE_GB": typed}).config.l1_size_gb == gib
    assert load({"l1_size_gb": typed}, {"LMCACHE_L1_SIZE_GB": "7"}).config.l1_size_gb == gib


@pytest.mark.parametrize("typed", ["2KB", "GB", "2GBs", "1e9GB", "..G", "0MB"])
def test_sizes_that_are_none(typed: str) -> None:
    with pytest.raises(ConfigError, match="must be a number from"):
        load({"l1_size_gb": typed}, {})


def test_a_small_shm_is_not_taken_for_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_bytes", lambda directory: 64 << 20)
    config = ServerConfig(port=0, http_port=0)
    with pytest.raises(ConfigError) as error:
        preflight.check_machine(config, port=False, http=False)
    assert all(part in str(error.value) for part in ("only 64 MiB", "--shm-size", "emptyDir", "--arena-dir"))


@pytest.fixture
def run(tmp_path: Path, folders: Callable[[str], Path]) -> Iterator[Callable[..., Callable[[], str]]]:
    """Start `lmcache server` with these words, and return what its log says so far."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(words: Sequence[str], **environ: str) -> Callable[[], str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_")}
        flags = ["--port", "0", "--arena-dir", str(folders("/dev/shm")), "--socket-dir", str(folders("/tmp") / "s")]
        command = [sys.executable, "-m", "lmcache.cli.main", "server", *flags, *words]
        log = tmp_path / f"log{len(processes)}"
        with log.open("w") as output:
            processes.append(
                subprocess.Popen(command, stderr=output, env=inherited | environ | {"PYTHONPATH": str(ROOT / "src")})
            )
        eventually(lambda: processes[-1].poll() is not None or READY in log.read_text())
        assert processes[-1].poll() is None, log.read_text()
        return log.read_text

    start.processes = processes  # type: ignore[attr-defined]
    yield start
    for one in processes:
        one.terminate()
    for one in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.wait(PATIENCE)


def test_the_operators_command_line_starts_a_healthy_server(
    run: Callable[..., Callable[[], str]], capsys: pytest.CaptureFixture[str]
) -> None:
    port, second = free_port(), free_port()
    log = run([*OPERATOR, "--http-port", str(port), "--prometheus-port", str(second)], LMCACHE_LOG_LEVEL="INFO")
    for flag in ("--hash-algorithm blake3", "--eviction-trigger-watermark 0.80", "--eviction-ratio 0.20"):
        assert log().count(f"{flag}: has no effect") == 1
    for one in (port, second):
        url = f"http://127.0.0.1:{one}"
        assert "lmcache_chunks " in httpx.get(f"{url}/metrics", timeout=PATIENCE).text
        assert httpx.get(url, headers={"Accept": "application/json"}, timeout=PATIENCE).json()["status"] == "ok"
        assert "<h1>LMCache " in httpx.get(url, headers={"Accept": "text/html,*/*"}, timeout=PATIENCE).text
    status = httpx.get(f"{url}/status", timeout=PATIENCE).json()
    names = ("is_healthy", "chunk_size", "hash_algorithm", "active_sessions", "active_prefetch_jobs")
    assert [status[name] for name in names] == [True, 256, "blake3", 0, 0]
    assert httpx.get(f"{url}/config", timeout=PATIENCE).json() == status["config"]
    assert httpx.post(f"{url}/cache/clear", timeout=PATIENCE).json() == {"status": "ok"}
    assert httpx.get(f"{url}/cache/clear", timeout=PATIENCE).status_code == 405

    def verb(*words: str) -> str:
        assert main([*words, "--url", url]) == 0
        return str(capsys.readouterr().out)

    capsys.readouterr()
    assert "is healthy" in verb("ping", "kvcache", "--wait", "5") and verb("ping", "-q") == ""
    assert json.loads(verb("ping", "--json")) == json.loads(verb("ping", "--format", "json"))
    assert "is empty now" in verb("kvcache", "clear")
    assert "active_sessions" in verb("describe", "kvcache")
    screen = verb("status")
    assert "is healthy" in screen and "of 102.4 MiB used" in screen and "no engine process is connected" in screen
    assert len(screen.splitlines()) < 24
    assert json.loads(verb("status", "--json"))["chunk_size"] == 256


def test_ping_of_an_engine_and_of_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["ping", "engine", "--url", url]) == 1
    assert f"no engine answers at {url}/health" in capsys.readouterr().err
    assert main(["ping", "--url", url, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["status"] == "unhealthy" and f"no server at {url}" in answer["reason"]
    assert main(["ping", "--url", url, "-q"]) == 1
    assert capsys.readouterr() == ("", "")


def test_bare_and_misspelt(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "lmcache status" in capsys.readouterr().out
    for words, said in (
        (["pingg"], "pingg: no such verb: did you mean ping?"),
        (["zzz"], "zzz: no such verb: lmcache --help lists the verbs"),
        (["server", "--hash-algoritm", "x"], "did you mean --hash-algorithm?"),
        (["server", "--zzzzzzzz"], "--zzzzzzzz: no such flag of `lmcache server`: lmcache server --help lists them"),
        (
            ["server", "--run-script-api-enabled"],
            "--run-script-api-enabled: is not supported: the server runs no scripts",
        ),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err


def test_hangup_reads_the_settings_again(run: Callable[..., Callable[[], str]], tmp_path: Path) -> None:
    port, file, token = free_port(), tmp_path / "lmcache.yaml", tmp_path / "token"
    token.write_text("first-token-of-twenty")
    token.chmod(0o600)
    file.write_text(f"l1-size-gb: 0.1\nlog-level: INFO\napi-token-file: {token}\n")
    log = run(["--http-port", str(port), "--config", str(file)])
    (process,) = run.processes  # type: ignore[attr-defined]

    def status(name: str) -> int:
        url = f"http://127.0.0.1:{port}/status"
        return httpx.get(url, headers={"Authorization": f"Bearer {name}"}, timeout=PATIENCE).status_code

    assert status("first-token-of-twenty") == 200
    token.write_text("second-token-of-twenty")
    file.write_text(f"l1-size-gb: 0.2\nlog-level: DEBUG\napi-token-file: {token}\n")
    process.send_signal(signal.SIGHUP)
    eventually(lambda: "need a restart of the server: l1-size-gb" in log())
    assert "in effect now: api-token, log-level" in log()
    assert status("first-token-of-twenty") == 403 and status("second-token-of-twenty") == 200
    eventually(lambda: "HTTP GET /status" in log())
    file.write_text("l1-sise-gb: 3\n")
    process.send_signal(signal.SIGHUP)
    eventually(lambda: "the settings are wrong, so nothing changes: " in log())
    assert status("second-token-of-twenty") == 200 and process.poll() is None
