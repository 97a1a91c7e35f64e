"""Settings of an engine's own server: the public names, where each comes from, and what is said of those that do not work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lmcache.cli.main import main
from lmcache.config.engine import ROWS, EngineConfig, ignored_by_daemons_engines, load_blending, load_engine
from lmcache.engine.settings import ServerSettings
from lmcache.errors import ConfigError
from lmcache.tiers.adapters import url_of_adapter


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lmcache.yaml"


def error_of(environ: dict[str, str] | None = None, file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_engine(environ or {}, file=file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults() -> None:
    settings = load_engine({})
    assert settings.config == EngineConfig()
    config = settings.config
    assert (config.chunk_size, config.max_local_cpu_size, config.cache_policy) == (256, 5.0, "LRU")
    assert config.save_unfull_chunk and not config.save_decode_cache
    assert set(settings.sources.values()) == {"default"} and not settings.warnings
    assert config.server_flags == ("--eviction-policy", "LRU", "--huge-pages", "auto")


def test_what_vllm_was_told_beats_the_environment_which_beats_the_file(file: Path) -> None:
    file.write_text("# a comment\nchunk_size: 8\nmax_local_cpu_size: 1.5\nsave_decode_cache: true\n")
    environ = {"LMCACHE_CONFIG_FILE": str(file), "LMCACHE_CHUNK_SIZE": "16", "LMCACHE_MAX_LOCAL_CPU_SIZE": "2"}
    settings = load_engine(environ, {"lmcache.chunk_size": 32, "lmcache.mp.port": 5555})
    assert settings.config == EngineConfig(chunk_size=32, max_local_cpu_size=2.0, save_decode_cache=True)
    assert settings.sources["chunk_size"] == "kv_connector_extra_config lmcache.chunk_size"
    assert settings.sources["max_local_cpu_size"] == "LMCACHE_MAX_LOCAL_CPU_SIZE"
    assert settings.sources["save_decode_cache"] == f"{file}:4"


def test_what_vllm_was_told_under_no_known_name_is_named() -> None:
    told = {"lmcache.chunk_siz": 8, "lmcache.mp.port": 5555, "cpu_bytes_to_use": 1}
    settings = load_engine({}, told)
    assert settings.config == EngineConfig()
    why = "is not a setting and is ignored: did you mean chunk_size?"
    assert settings.warnings == (f"kv_connector_extra_config lmcache.chunk_siz {why}",)


def test_json_is_a_file_too(file: Path) -> None:
    file.write_text('{"chunk_size": 8, "local_cpu": true, "extra_config": {"a": [1]}}')
    config = load_engine({}, file=file).config
    assert config.chunk_size == 8 and config.extra_config == {"a": [1]}


@pytest.mark.parametrize(
    ("serde", "url", "tier"),
    [
        (None, "redis://host:6379", "redis://host:6379"),
        ("naive", "redis://host:6379", "redis://host:6379?codec=naive"),
        ("cachegen", "s3://bucket/x?region=r", "s3://bucket/x?region=r&codec=cachegen"),
        ("KIVI", "redis://host:6379", "redis://host:6379?codec=kivi"),
        ("fp8", "redis://host:6379?codec=none", "redis://host:6379?codec=none"),
    ],
)
def test_the_serde_is_the_codec_of_the_remote_tier(file: Path, serde: str | None, url: str, tier: str) -> None:
    file.write_text(f"remote_url: {url}\n")
    environ = {} if serde is None else {"LMCACHE_REMOTE_SERDE": serde}
    assert load_engine(environ, file=file).config.tiers == (tier,)


@pytest.mark.parametrize(
    ("text", "in_process", "with_a_daemon"),
    [
        ("remote_url: redis://host:6379\n", "none", "none"),
        ("remote_url: redis://host:6379\nremote_serde: naive\n", "none", "none"),
        ("remote_url: redis://host:6379\nremote_serde: cachegen\n", "int8", "none"),
        ("remote_url: redis://host:6379?codec=pack12\nremote_serde: cachegen\n", "none", "none"),
        ("remote_url: redis://host:6379?codec=int8\n", "int8", "none"),
        ("remote_url: redis://host:6379?codec=int8\nlossy_kv: none\n", "none", "none"),
        ("remote_serde: fp8\n", "none", "none"),
        ("lossy_kv: int8\n", "int8", "int8"),
    ],
)
def test_kv_is_exact_unless_the_engines_own_settings_say_otherwise(
    file: Path, text: str, in_process: str, with_a_daemon: str
) -> None:
    """A daemon's tiers are not the engine's own, so only the engine's setting counts there."""
    file.write_text(text)
    config = load_engine({}, file=file).config
    assert ServerSettings("", config).lossy_kv == in_process
    assert ServerSettings("tcp://host:5555", config).lossy_kv == with_a_daemon
    assert ServerSettings().lossy_kv == "none"


def test_nothing_is_nothing(file: Path) -> None:
    file.write_text("local_disk: null\nremote_url:\nremote_storage_plugins: []\nenable_p2p: False\nextra_config: {}\n")
    settings = load_engine({}, file=file)
    assert settings.config.tiers == () and not settings.warnings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("chunk_size: 8\nlocal_dsk: /x\n", [":2: unknown key 'local_dsk'", "did you mean local_disk?"]),
        ("chunk_size: none\n", [":1: chunk_size: none", "whole number from 1"]),
        ("chunk_size: 8\nchunk_size: 9\n", [":2: chunk_size is given twice", ":1"]),
        ("cache_policy: MRU\n", ["cache_policy: MRU", "known: LRU"]),
        ("blend_recompute_ratios: [0.1, 0.2]\n", ["blend_recompute_ratios", "a list of one"]),
        ("enable_p2p: true\n", ["enable_p2p: true", "`lmcache server`"]),
        ("enable_pd: true\n", ["enable_pd", "disaggregated prefill", "kv_producer"]),
        ("remote_serde: zip\n", ["remote_serde: zip", "naive, cachegen", "lossless"]),
        ("remote_url: lm://localhost:65432\n", ["lm://localhost:65432", "LMCacheMPConnector"]),
        ("remote_url: localhost\n", ["must be a URL"]),
        ("local_disk: relative\n", ["local_disk: relative", "absolute path"]),
        ("local_disk: file:///x\n", ["local_disk: /x", "max_local_disk_size"]),
        ("gds_path: /x\n", ["gds_path: /x", "use local_disk"]),
        ("extra_config: [1]\n", ["extra_config", "must be a mapping"]),
        ("- a\n", ["key: value"]),
        ("a: [\n", ["is not YAML", ":2"]),
    ],
)
def test_mistakes_are_one_line_with_the_place_the_value_and_the_remedy(file: Path, text: str, words: list[str]) -> None:
    file.write_text(text)
    message = error_of(file=file)
    assert str(file) in message
    for word in words:
        assert word in message, message


def test_blending_is_said_to_be_for_some_engines_only(file: Path) -> None:
    file.write_text("enable_blending: true\nblend_recompute_ratios: [0.2]\nblend_min_tokens: 100\n")
    settings = load_engine({}, file=file)
    assert any("enable_blending has no effect" in one and "not there" in one for one in settings.warnings)
    assert not load_engine({}, file=file, blends=True).warnings
    environ = {"LMCACHE_CONFIG_FILE": str(file), "LMCACHE_BLEND_CHECK_LAYERS": "2"}
    expected = {
        "enable_blending": True,
        "blend_min_tokens": 100,
        "blend_recompute_ratios": 0.2,
        "blend_check_layers": 2,
    }
    assert load_blending(environ) == expected and load_blending({}) == {}
    extra = {"lmcache.blend_min_tokens": 50, "lmcache.mp.port": 7, "lmcache.blend_special_str": "--"}
    assert load_blending(environ, extra) == expected | {"blend_min_tokens": 50, "blend_special_str": "--"}
    with pytest.raises(ConfigError, match="blend_min_tokens: none"):
        load_blending({"LMCACHE_BLEND_MIN_TOKENS": "none"})


def test_a_file_that_is_not_there(file: Path) -> None:
    assert f"{file}: cannot be read" in error_of({"LMCACHE_CONFIG_FILE": str(file)})


def test_names_of_others_in_the_environment_are_warned_about_or_left_alone() -> None:
    environ = {
        "LMCACHE_CHUNK_SISE": "8",
        "LMCACHE_LOG_LEVEL": "DEBUG",
        "LMCACHE_SERVER_PORT": "1",
        "LMCACHE_ENABLE_KV_EVENTS": "true",
        "LMCACHE_USE_LAYERWISE": "false",
        "LMCACHE_LOCAL_DISK": "",
    }
    settings = load_engine(environ)
    assert settings.config == EngineConfig(use_layerwise=False)
    first, second = settings.warnings
    assert "LMCACHE_CHUNK_SISE" in first and "LMCACHE_CHUNK_SIZE" in first
    assert "LMCACHE_ENABLE_KV_EVENTS: enable_kv_events has no effect" in second


def test_an_engine_with_a_daemon_is_told_that_settings_of_another_way_to_hand_over_have_no_effect() -> None:
    environ = {"LMCACHE_ENABLE_PD": "True", "LMCACHE_PD_ROLE": "sender", "LMCACHE_PD_BUFFER_SIZE": "", "PD_ROLE": "x"}
    environ |= {"LMCACHE_CHUNK_SIZE": "8", "LMCACHE_PD_NONSENSE": "1", "LMCACHE_PD_BIDIRECTIONAL": "false"}
    first, second = ignored_by_daemons_engines(environ)
    assert first.startswith("LMCACHE_ENABLE_PD has no effect") and second.startswith("LMCACHE_PD_ROLE has no effect")
    assert "kv_role" in first
    (line,) = load_engine({"LMCACHE_PD_PEER_HOST": "h"}).warnings
    assert "pd_peer_host has no effect" in line and "`lmcache server`" in line


def test_tiers_are_flags_of_the_server(file: Path) -> None:
    config = EngineConfig(local_disk="/var/lib/a b", max_local_disk_size=20.0, remote_url="redis://host:6379")
    assert config.tiers == ("disk:///var/lib/a%20b?max_gb=20", "redis://host:6379")
    assert config.server_flags[4:] == ("--l2", config.tiers[0], "--l2", config.tiers[1])
    file.write_text("local_disk: file:///var/lib/x\nmax_local_disk_size: 1\n")
    assert load_engine({}, file=file).config.tiers == ("disk:///var/lib/x?max_gb=1",)


def test_the_keys_of_a_mooncake_store_complete_its_url(file: Path) -> None:
    extra = {"local_hostname": "10.0.0.7", "metadata_server": "P2PHANDSHAKE", "global_segment_size": 1 << 30, "mine": 1}
    config = EngineConfig(remote_url="mooncakestore://h:50051/", extra_config=extra)
    assert config.tiers == ("mooncakestore://h:50051?hostname=10.0.0.7&metadata=P2PHANDSHAKE&segment_gb=1",)
    assert EngineConfig(remote_url="redis://h", extra_config=extra).tiers == ("redis://h",)
    elsewhere = {"master_server_address": "m:7", "local_buffer_size": 9, "transfer_timeout": 3}
    config = EngineConfig(remote_url="mooncakestore://h:50051/?prefix=a", extra_config=elsewhere)
    assert config.tiers == ("mooncakestore://m:7?prefix=a&timeout=3",)
    assert EngineConfig(remote_url="mooncakestore://h:1/").tiers == ("mooncakestore://h:1",)


def test_passwords_are_not_shown(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("remote_url: redis://user:geheim@host:6379\n")
    assert main(["config", "check", str(file)]) == 0
    out = capsys.readouterr().out
    assert "redis://user:***@host:6379" in out and "geheim" not in out


def test_http_is_off_unless_the_api_server_is_on() -> None:
    on = {"LMCACHE_INTERNAL_API_SERVER_ENABLED": "true", "LMCACHE_INTERNAL_API_SERVER_PORT_START": "7000"}
    flags = load_engine(on).config.server_flags
    assert flags[4:] == ("--http-host", "127.0.0.1", "--http-port", "7000")


def test_every_row_is_reachable_and_says_what_it_does() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names)) > 60
    for row in ROWS:
        known = hasattr(EngineConfig(), row.name)
        assert known or row.effect or row.refusal, f"{row.name} does nothing and does not say so"
        if not row.refusal and not known:
            assert load_engine({row.variable: "1"}).warnings, row.name


def test_config_check_tells_an_engines_file_from_the_daemons(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("chunk_size: 8\nenable_kv_events: true\nmax_local_cpu_size: 10\n")
    assert main(["config", "check", str(file)]) == 0
    out = capsys.readouterr().out
    assert ["max_local_cpu_size", "10", f"{file}:3"] in [line.split() for line in out.splitlines()]
    assert "warning:" in out and "no effect" in out
    file.write_text("chunk_size: 8\n")
    assert main(["config", "check", str(file)]) == 0
    assert "l1-size-gb" in capsys.readouterr().out
    assert main(["config", "check", "--in-process", str(file)]) == 0
    assert "max_local_cpu_size" in capsys.readouterr().out
    file.write_text("chunk_size: 8\nmax_local_cpu_siz: 10\n")
    for told in ([], ["--in-process"]):
        assert main(["config", "check", *told, str(file)]) == 2
        assert "did you mean max_local_cpu_size?" in capsys.readouterr().err
    file.write_text("chunk-size: 8\nl1-size-g: 10\n")
    assert main(["config", "check", str(file)]) == 2
    assert "did you mean l1-size-gb?" in capsys.readouterr().err


def test_the_page_for_users_has_every_setting_and_the_right_defaults() -> None:
    page = (Path(__file__).parents[1] / "docs/in-process.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    said = set(re.findall(r"`([a-z0-9_*]+)`", " ".join(line.split("|")[1] for line in lines)))
    wild = tuple(name[:-1] for name in said if name.endswith("*"))
    for row in ROWS:
        others = "other settings of disabled features" in page and row.effect.startswith("no effect: it belongs")
        assert row.name in said or row.name.startswith(wild) or others, row.name
        if row.refusal:
            assert any(f"`{row.name}`" in line and "refused" in line for line in lines), row.name
    assert "| `chunk_size` | 256 |" in page and "| `max_local_cpu_size` | 5.0 |" in page


def test_nixls_storage_in_extra_config_is_an_adapter_of_the_server(tmp_path: Path) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_text(
        f"extra_config: {{enable_nixl_storage: true, nixl_backend: POSIX, nixl_path: {tmp_path}, nixl_pool_size: 4}}\n"
    )
    flags = load_engine({"LMCACHE_CONFIG_FILE": str(file)}).config.server_flags
    served = url_of_adapter(flags[flags.index("--l2-adapter") + 1])
    assert served.url == f"disk://{tmp_path}" and "pool_size: no effect" in served.said[0]
    file.write_text(f"extra_config: {{enable_nixl_storage: false, nixl_path: {tmp_path}}}\n")
    assert "--l2-adapter" not in load_engine({"LMCACHE_CONFIG_FILE": str(file)}).config.server_flags
