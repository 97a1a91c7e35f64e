"""Settings: where each comes from, which source wins; every mistake is one line that names value and remedy."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache.config.given import check_secret_file
from lmcache.config.load import add_flags, load
from lmcache.config.options import GIB, integer, number, word
from lmcache.config.server import OPTIONS, ServerConfig
from lmcache.errors import ConfigError
from lmcache.server import preflight
from lmcache.server.preflight import check_machine, memory_available_bytes


def file_of(tmp_path: Path, text: str, mode: int = 0o600) -> str:
    path = tmp_path / "lmcache.yaml"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def error_of(flags: dict[str, str | None], environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(flags, environ or {})
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- sources ----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_documented_ones() -> None:
    config = load({}, {}).config
    assert config == ServerConfig()
    assert (config.host, config.port, config.http_host, config.http_port) == ("127.0.0.1", 5555, "0.0.0.0", 8080)
    assert (config.chunk_size, config.eviction_policy, config.max_workers) == (256, "LRU", 2)
    assert config.arena_dir == Path("/dev/shm") and config.log_level == "INFO" and config.lease_seconds == 30


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("--l1-size-gb 20 --eviction-policy LRU --chunk-size 16", {"l1_size_gb": 20.0, "chunk_size": 16}),
        ("--l1-size-gb 2 --eviction-policy LRU --port 5555", {"l1_size_gb": 2.0}),
        (
            "--l1-size-gb 60 --eviction-policy LRU --max-workers 4 --port 6555",
            {"l1_size_gb": 60.0, "max_workers": 4, "port": 6555},
        ),
    ],
)
def test_the_documented_starts_mean_what_they_say(words: str, settings: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert load(vars(parser.parse_args(words.split())), {}).config == ServerConfig(**settings)


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    path = file_of(tmp_path, "port: 1001\nhttp-port: 1002\nchunk_size: 16\n")
    environ = {"LMCACHE_SERVER_PORT": "2001", "LMCACHE_SERVER_HTTP_PORT": "2002"}
    settings = load({"config": path, "port": "3001", "max_workers": None}, environ)
    config = settings.config
    assert (config.port, config.http_port, config.chunk_size, config.max_workers) == (3001, 2002, 16, 2)
    assert settings.sources["port"] == "--port"
    assert settings.sources["http_port"] == "LMCACHE_SERVER_HTTP_PORT"
    assert settings.sources["chunk_size"] == f"{path}:3"
    assert settings.sources["max_workers"] == "default"
    assert settings.warnings == ()


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    assert load({}, {"LMCACHE_SERVER_CONFIG": file_of(tmp_path, "port: 1001")}).config.port == 1001


SAMPLES = {
    "peers": ("host-b,10.0.0.1:7", ("host-b:5555", "10.0.0.1:7")),
    "peer_address": ("host-a", "host-a:5555"),
    "peer_keep": ("no", "no"),
    "peer_transport": ("NIXL", "nixl"),
    "peer_devices": ("mlx5_0:1,eth1", "mlx5_0:1,eth1"),
    "l1_codec": ("INT8", "int8"),
    "l1_size_gb": ("2.5", 2.5),
    "eviction_policy": ("lru", "LRU"),
    "chunk_size": ("1", 1),
    "lease_seconds": ("5", 5.0),
    "max_workers": ("4", 4),
    "predict": ("OFF", "off"),
    "record_trace": ("/tmp/trace", Path("/tmp/trace")),
    "record_trace_mb": ("20", 20),
    "host": ("::1", "::1"),
    "port": ("6555", 6555),
    "http_host": ("localhost", "127.0.0.1"),
    "http_port": ("0", 0),
    "socket_dir": ("/run/x", Path("/run/x")),
    "insecure_no_auth": ("true", True),
    "api_token": ("0123456789abcdef", "0123456789abcdef"),
    "arena_dir": ("/dev/hugepages", Path("/dev/hugepages")),
    "log_level": ("debug", "DEBUG"),
    "log_format": ("JSON", "json"),
    "otlp_endpoint": ("http://localhost:4318", "http://localhost:4318"),
    "metrics_names": ("LMCACHE-0.5", "lmcache-0.5"),
    "prometheus_port": ("9090", 9090),
    "records_mb": ("16", 16.0),
    "numa": ("0,2-3", "0,2-3"),
    "huge_pages": ("ALWAYS", "always"),
    "l2": ("disk:///a?max_gb=1 dir:///b", ("disk:///a?max_gb=1", "dir:///b")),
    "l2_adapter": ("{'type': 'fs'}", ("{'type': 'fs'}",)),
    "l2_required": ("true", True),
    "l2_patience_seconds": ("3", 3.0),
    "l2_queue_gb": ("0.5", 0.5),
    "worth": ("ALWAYS", "always"),
    "drain_seconds": ("2.5", 2.5),
    "allow_uid": ("1000,7", (1000, 7)),
    "allow_gid": ("9", (9,)),
    "pinned_share": ("0.25", 0.25),
    "instance_id": ("the-first", "the-first"),
    "control_peers": ("http://a:8080,https://b/", ("http://a:8080", "https://b")),
    "tokenizer_url": ("http://localhost:8000", "http://localhost:8000"),
}


@pytest.mark.parametrize("name", [option.name for option in OPTIONS])
def test_every_setting_has_a_flag_a_variable_a_key_and_help(name: str, tmp_path: Path) -> None:
    """One table: what is added to it is reachable every way, or this fails."""
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef\n")
    secret.chmod(0o600)
    empty = file_of(tmp_path, "")
    files = {"auth_key_file": str(secret), "api_token_file": str(secret), "config": empty}
    text, value = SAMPLES.get(name) or (files[name], Path(files[name]))
    option = next(option for option in OPTIONS if option.name == name)
    parser = argparse.ArgumentParser()
    add_flags(parser)
    words = [option.flag] if option.is_switch else [option.flag, text]
    assert getattr(load(vars(parser.parse_args(words)), {}).config, name) == value
    assert getattr(load({}, {option.env: text}).config, name) == value
    if option.in_file:
        path = file_of(tmp_path, f'{option.key}: "{text}"\n')
        assert getattr(load({"config": path}, {}).config, name) == value
    written = " ".join(parser.format_help().split())
    assert option.env in written and len(option.help) > 20


def test_tiers_may_be_given_several_times_everywhere(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    found = load(vars(parser.parse_args(["--l2", "disk:///a", "--l2", "redis://h?name=x"])), {})
    assert found.config.l2 == ("disk:///a", "redis://h?name=x")
    path = file_of(tmp_path, 'l2:\n  - disk:///a\n  - "redis://:${PASSWORD}@h"\nl2-adapter: \'{"type": "fs"}\'\n')
    config = load({"config": path}, {}).config
    assert config.l2 == ("disk:///a", "redis://:${PASSWORD}@h") and config.l2_adapter == ('{"type": "fs"}',)
    for wrong in ("l2: {a: b}\n", "l2: [[a]]\n"):
        with pytest.raises(ConfigError, match="l2 must be a value or a list"):
            load({"config": file_of(tmp_path, wrong)}, {})


def test_a_password_in_a_tiers_url_is_never_shown(tmp_path: Path) -> None:
    text = "redis://user:hunter2@host:6379/0?access_key=hunter3&key_file=/k"
    config = load({"l2": [text]}, {}).config
    assert "hunter" not in str(config.redacted()) and "user:***@host" in str(config.redacted())
    path = file_of(tmp_path, f"l2: {text}\n")
    Path(path).chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600") as caught:
        load({"config": path}, {})
    assert "hunter" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"--l2: must be URLs; 'hello' is not one"):
        load({"l2": ["hello"]}, {})


def test_log_level_has_its_old_variable_too() -> None:
    assert load({}, {"LMCACHE_LOG_LEVEL": "debug"}).config.log_level == "DEBUG"
    both = {"LMCACHE_LOG_LEVEL": "debug", "LMCACHE_SERVER_LOG_LEVEL": "ERROR"}
    assert load({}, both).config.log_level == "ERROR"


def test_an_empty_variable_is_not_set() -> None:
    assert load({}, {"LMCACHE_SERVER_PORT": "", "LMCACHE_SERVER_API_TOKEN": ""}).config == ServerConfig()


def test_kubernetes_service_links_are_not_settings() -> None:
    """A Service called lmcache-server makes these in every pod of its namespace."""
    environ = {
        "LMCACHE_SERVER_PORT": "tcp://10.0.0.1:5555",
        "LMCACHE_SERVER_PORT_5555_TCP_ADDR": "10.0.0.1",
        "LMCACHE_SERVER_SERVICE_HOST": "10.0.0.1",
        "LMCACHE_SERVER_SERVICE_PORT_ZMQ": "5555",
    }
    settings = load({}, environ)
    assert settings.config.port == 5555 and len(settings.warnings) == 1 and "Kubernetes" in settings.warnings[0]


def test_an_unknown_variable_is_warned_of() -> None:
    (warning,) = load({}, {"LMCACHE_SERVER_L1_SISE_GB": "2"}).warnings
    assert "LMCACHE_SERVER_L1_SISE_GB" in warning and "did you mean LMCACHE_SERVER_L1_SIZE_GB?" in warning


def test_gigabytes_are_gibibytes_in_complete_sectors() -> None:
    assert ServerConfig(l1_size_gb=20).l1_bytes == 20 * GIB


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ServerConfig().port = 1  # type: ignore[misc]


def test_socket_dir_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert ServerConfig().socket_dir == Path(f"/tmp/lmcache-{os.getuid()}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/dev/shm")
    assert ServerConfig().socket_dir == Path("/dev/shm/lmcache")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    assert ServerConfig().socket_dir == Path(f"/tmp/lmcache-{os.getuid()}")


@pytest.mark.parametrize(
    ("typed", "meant"), [("learned", "learned"), ("ARC", "learned"), ("arc", "learned"), ("Lru", "LRU")]
)
def test_policies_of_eviction_have_names_of_the_public_project_too(typed: str, meant: str) -> None:
    assert load({"eviction_policy": typed}, {}).config.eviction_policy == meant


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"eviction_policy": "FIFO"}, ["--eviction-policy FIFO", "unknown", "known: LRU"]),
        ({"eviction_policy": "isolatedlru"}, ["--eviction-policy isolatedlru", "cache_salt", "pass LRU"]),
        ({"eviction_policy": "noop"}, ["--eviction-policy noop", "pass LRU"]),
        ({"chunk_size": "0"}, ["--chunk-size 0", "from 1 to"]),
        ({"chunk_size": "many"}, ["--chunk-size many", "whole number"]),
        ({"chunk_size": "1_6"}, ["--chunk-size 1_6"]),
        ({"l1_size_gb": "0"}, ["--l1-size-gb 0", "0.001"]),
        ({"l1_size_gb": "nan"}, ["--l1-size-gb nan", "number"]),
        ({"l1_size_gb": "20GBs"}, ["--l1-size-gb 20GBs", "number"]),
        ({"port": "70000"}, ["--port 70000", "65535"]),
        ({"port": "-1"}, ["--port -1", "from 0"]),
        ({"port": "8080"}, ["--port 8080", "--http-port 8080", "change one"]),
        ({"max_workers": "0"}, ["--max-workers 0", "from 1"]),
        ({"lease_seconds": "inf"}, ["--lease-seconds inf", "number from 1"]),
        ({"log_level": "LOUD"}, ["--log-level LOUD", "DEBUG, INFO"]),
        ({"host": "example.org"}, ["--host example.org", "IP address"]),
        ({"host": "0.0.0.0"}, ["--host 0.0.0.0", "--auth-key-file", "--insecure-no-auth"]),
        ({"host": "*"}, ["--host * lets", "--insecure-no-auth"]),
        ({"port": "0555", "http_port": "555"}, ["--port 0555 and --http-port 555", "change one"]),
        ({"chunk_size": "١٦"}, ["--chunk-size ١٦", "whole number"]),
        ({"l1_size_gb": "1e7"}, ["--l1-size-gb 1e7", "from 0.001 to 1000000"]),
        ({"l1_size_gb": "10000000"}, ["--l1-size-gb 10000000", "from 0.001 to 1000000"]),
        ({"host": "::"}, ["--host ::", "--insecure-no-auth"]),
        ({"socket_dir": "/" + "x" * 90}, ["--socket-dir", "80 bytes"]),
        ({"api_token": "two words"}, ["--api-token", "without spaces"]),
        ({"api_token_file": "/nonexistent/token"}, ["--api-token-file", "/nonexistent/token", "No such file"]),
        ({"auth_key_file": "/nonexistent/key"}, ["--auth-key-file", "No such file", "make one with", "curve_keypair"]),
        ({"auth_key_file": "/dev/null"}, ["--auth-key-file", "is not a file"]),
        ({"config": "/nonexistent.yaml"}, ["--config /nonexistent.yaml", "No such file"]),
    ],
)
def test_a_wrong_flag_is_one_line_with_value_and_remedy(flags: dict[str, str | None], parts: list[str]) -> None:
    message = error_of(flags)
    assert all(part in message for part in parts), message


def test_a_wrong_variable_is_named() -> None:
    assert error_of({}, {"LMCACHE_SERVER_CHUNK_SIZE": "0"}).startswith("LMCACHE_SERVER_CHUNK_SIZE=0: must be")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("port: 1\nl1-sise-gb: 2\n", [":2: ", "'l1-sise-gb'", "did you mean l1-size-gb?"]),
        ("zzzzzz: 2\n", ["'zzzzzz'", "known: l1-size-gb"]),
        ("config: other.yaml\n", ["unknown key 'config'"]),
        ("chunk-size: 0\n", [":1: chunk-size: 0", "from 1"]),
        ("chunk-size: [1]\n", [":1: chunk-size", "one value"]),
        ("port: 1\nport: 2\n", [":2: port", "twice", ":1"]),
        ("l1-size-gb: 1\nl1_size_gb: 2\n", [":2: l1-size-gb", "twice"]),
        ("- port\n", ["key: value"]),
        ("port: [1\n", ["is not YAML", ":2"]),
        ("a: !!python/object/apply:os.system [true]\n", ["unknown key 'a'"]),
        ("arena-dir: !!python/object/apply:os.getcwd []\n", ["one value"]),
        ("insecure-no-auth: perhaps\n", ["true or false"]),
        ("arena-dir: ${NOT_SET_ANYWHERE}/x\n", ["${NOT_SET_ANYWHERE}", "export NOT_SET_ANYWHERE"]),
    ],
)
def test_a_wrong_file_is_one_line_with_its_place(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = file_of(tmp_path, text)
    message = error_of({"config": path})
    assert path in message and all(part in message for part in parts), message


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in error_of({"config": str(path)})
    path.write_bytes(b"#" * (1 << 21))
    assert "larger than 1 MiB" in error_of({"config": str(path)})


def test_an_empty_file_and_null_values_change_nothing(tmp_path: Path) -> None:
    assert load({"config": file_of(tmp_path, "")}, {}).sources["port"] == "default"
    assert load({"config": file_of(tmp_path, "port:\nchunk-size: null\n")}, {}).config.port == 5555


# --- secrets ----------------------------------------------------------------------------------------------------------

TOKEN = "a-token-that-nobody-may-see"


def test_a_token_in_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path, f"api-token: {TOKEN}\n", mode=0o644)
    message = error_of({"config": path})
    assert f"chmod 600 {path}" in message and TOKEN not in message
    os.chmod(path, 0o600)
    assert load({"config": path}, {}).config.api_token == TOKEN


def test_a_reference_keeps_the_token_out_of_the_file(tmp_path: Path) -> None:
    path = file_of(tmp_path, "api-token: ${MY_TOKEN}\n", mode=0o644)
    assert load({"config": path}, {"MY_TOKEN": TOKEN}).config.api_token == TOKEN


def test_token_file(tmp_path: Path) -> None:
    path = file_of(tmp_path, TOKEN + "\n")
    assert load({"api_token_file": path}, {}).config.api_token == TOKEN
    os.chmod(path, 0o640)
    assert f"chmod 600 {path}" in error_of({"api_token_file": path})
    os.chmod(path, 0o600)
    assert "keep one of the two" in error_of({"api_token_file": path}, {"LMCACHE_SERVER_API_TOKEN": TOKEN})
    Path(path).write_text("two words\n")
    assert "two words" not in error_of({"api_token_file": path})


def test_a_token_on_the_command_line_works_with_a_warning() -> None:
    settings = load({"api_token": TOKEN}, {})
    assert settings.config.api_token == TOKEN
    assert any("--api-token-file" in warning for warning in settings.warnings)
    assert load({}, {"LMCACHE_SERVER_API_TOKEN": TOKEN}).warnings == ()
    assert "guessed" in load({}, {"LMCACHE_SERVER_API_TOKEN": "short"}).warnings[0]


def test_secrets_are_not_shown() -> None:
    config = ServerConfig(api_token=TOKEN)
    assert TOKEN not in repr(config) and TOKEN not in str(config.redacted())
    assert config.redacted()["api-token"] == "***" and ServerConfig().redacted()["api-token"] is None
    assert TOKEN + "\x01" not in error_of({}, {"LMCACHE_SERVER_API_TOKEN": TOKEN + "\x01"})


def test_wide_doors_need_a_key_or_a_word(tmp_path: Path) -> None:
    key = file_of(tmp_path, "key")
    assert load({"host": "0.0.0.0", "auth_key_file": key}, {}).config.beyond_loopback
    wide = load({"host": "0.0.0.0", "insecure_no_auth": "true"}, {}).config
    assert "every host" in wide.reach and "WITHOUT any authentication" in wide.reach
    assert "this host only" in ServerConfig().reach
    assert "contradict" in error_of({"host": "0.0.0.0", "insecure_no_auth": "true", "auth_key_file": key})
    directory = {"peers": "redis://:hunter2@store:6379/0"}
    for more in ({}, {"insecure_no_auth": "true"}):
        assert "needs --auth-key-file" in (text := error_of({**directory, **more})) and "hunter" not in text
    config = load({**directory, "auth_key_file": key}, {}).config
    assert config.peers == ("redis://:hunter2@store:6379/0",) and "hunter" not in str(config.redacted())
    path = Path(file_of(tmp_path, f"peers: {directory['peers']}\nauth-key-file: {key}\n", 0o644))
    assert "chmod 600" in error_of({"config": str(path)})


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(folders: Callable[[str], Path]) -> ServerConfig:
    """A small server that would start."""
    return ServerConfig(
        l1_size_gb=0.01,
        host="127.0.0.1",
        port=0,
        http_host="127.0.0.1",
        http_port=0,
        socket_dir=folders("/tmp") / "sockets",
    )


def refused(config: ServerConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_machine(config)
    return str(caught.value)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_what_fits_passes_and_creates_nothing(config: ServerConfig, tmp_path: Path) -> None:
    assert check_machine(config) == config
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["port", "http_port"])
def test_a_taken_port_names_a_free_one(config: ServerConfig, taken: int, name: str) -> None:
    flag = "--" + name.replace("_", "-")
    message = refused(dataclasses.replace(config, **{name: taken}))
    assert message.startswith(f"{flag} {taken}: taken") and f"such as {flag} " in message


def test_a_foreign_address_is_named(config: ServerConfig) -> None:
    assert refused(dataclasses.replace(config, http_host="192.0.2.7")).startswith("--http-host 192.0.2.7: not an addr")


def test_too_large_an_l1_says_what_to_pass(config: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_bytes", lambda directory: 30 * GIB)
    monkeypatch.setattr(preflight, "memory_available_bytes", lambda: 18 * GIB)
    message = refused(dataclasses.replace(config, l1_size_gb=20))
    assert message == (
        "--l1-size-gb 20: /dev/shm has 30.0 GiB free, and 18.0 GiB of memory are available: "
        "pass --l1-size-gb 17 or less"
    )
    assert check_machine(dataclasses.replace(config, l1_size_gb=17)).l1_size_gb == 17
    monkeypatch.setattr(preflight, "free_bytes", lambda directory: 64 << 20)
    message = refused(dataclasses.replace(config, l1_size_gb=20))
    assert "/dev/shm has 0.062 GiB free, and" in message, "no less than may be passed"
    assert "pass --l1-size-gb 0.062 or less" in message and "--shm-size" in message
    assert check_machine(dataclasses.replace(config, l1_size_gb=0.062)).l1_size_gb == 0.062


@pytest.mark.parametrize("typed", ["1000000", "1e5", "0007e4", "123456.75", "+99999"])
def test_an_l1_that_is_too_large_is_shown_as_it_was_typed(
    typed: str, config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "memory_available_bytes", lambda: 18 * GIB)
    size = load({"l1_size_gb": typed}, {}).config.l1_size_gb
    assert refused(dataclasses.replace(config, l1_size_gb=size)).startswith(f"--l1-size-gb {typed}: ")
    assert json.loads(json.dumps(size)) == float(typed)


def test_auto_takes_a_quarter(config: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_bytes", lambda directory: 8 * GIB)
    monkeypatch.setattr(preflight, "memory_available_bytes", lambda: 18 * GIB)
    assert check_machine(dataclasses.replace(config, l1_size_gb=0)).l1_size_gb == 2
    monkeypatch.setattr(preflight, "free_bytes", lambda directory: 0)
    assert "--l1-size-gb auto" in refused(dataclasses.replace(config, l1_size_gb=0))
    with pytest.raises(ConfigError):
        _ = ServerConfig().l1_bytes


def test_memory_of_control_groups(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (groups / "pod/box").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 1 kB\nMemAvailable: 8388608 kB\n")
    (proc / "self/cgroup").write_text("0::/pod/box\n")
    assert memory_available_bytes(proc, groups) == 8 * GIB
    (groups / "pod/box/memory.max").write_text("max\n")
    (groups / "pod/memory.max").write_text(f"{4 * GIB}\n")
    (groups / "pod/memory.current").write_text(f"{3 * GIB}\n")
    (groups / "pod/memory.stat").write_text(f"anon 7\ninactive_file {GIB}\n")
    assert memory_available_bytes(proc, groups) == 2 * GIB
    (proc / "self/cgroup").write_text("3:cpu,memory:/box\n")
    (groups / "memory/box").mkdir(parents=True)
    (groups / "memory/box/memory.limit_in_bytes").write_text(f"{2 * GIB}\n")
    (groups / "memory/box/memory.usage_in_bytes").write_text(f"{GIB}\n")
    assert memory_available_bytes(proc, groups) == GIB


def test_folders(config: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not a directory" in refused(dataclasses.replace(config, arena_dir=tmp_path / "none"))
    file = tmp_path / "file"
    file.touch()
    assert "is not a directory" in refused(dataclasses.replace(config, socket_dir=file))
    assert "file" in refused(dataclasses.replace(config, socket_dir=file / "below"))
    loose = tmp_path / "loose"
    loose.mkdir()
    loose.chmod(0o777)
    assert f"chmod 700 {loose}" in refused(dataclasses.replace(config, socket_dir=loose))
    loose.chmod(0o700)
    check_machine(dataclasses.replace(config, socket_dir=loose))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert "belongs to uid" in refused(dataclasses.replace(config, socket_dir=loose))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "is not writable" in refused(dataclasses.replace(config, arena_dir=loose))


def test_parsers_refuse_what_is_out_of_bounds() -> None:
    assert number(0, 2)("1.5") == 1.5 and integer(1, 5)("5") == 5 and word("a", "b")("B") == "b"
    for parse, text in ((number(0, 2), "nan"), (number(0, 2), "3"), (integer(1, 5), "1.0"), (integer(1, 5), "6")):
        with pytest.raises(ValueError, match="must be"):
            parse(text)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_secret_of_root_may_be_read_by_a_group_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes mounts secrets as root's, mode 0440 with `fsGroup`; the server may neither own nor change them."""
    path = tmp_path / "token"
    path.write_text("0123456789abcdef")

    def accepted(owner: int, group: int, mode: int) -> bool:
        os.chown(path, owner, group)
        path.chmod(mode)
        try:
            check_secret_file(path, "it")
        except ConfigError as error:
            assert f"chmod 600 {path}" in str(error)
            return False
        return True

    assert not accepted(0, 4242, 0o440), "root itself can change it"
    for name, value in (("geteuid", 4242), ("getegid", 4242), ("getgroups", [4244])):
        monkeypatch.setattr(f"lmcache.config.given.os.{name}", lambda value=value: value)
    assert accepted(0, 4242, 0o440) and accepted(0, 4244, 0o640)
    assert not accepted(0, 4242, 0o460) and not accepted(0, 4242, 0o444) and not accepted(0, 4243, 0o440)
    assert not accepted(4242, 4242, 0o440) and accepted(4242, 4242, 0o400)
