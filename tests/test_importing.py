"""`lmcache config import`: settings of the public project become a file that `lmcache server` reads."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from lmcache.cli.main import main
from lmcache.config.earlier import EARLIER_FLAGS
from lmcache.config.engine import ROWS
from lmcache.config.load import load
from lmcache.config.server import ServerConfig

Import = Callable[..., tuple[ServerConfig, str]]


@pytest.fixture
def imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Import:
    """What a server with the imported file would have, and the file's text."""

    def call(text: str) -> tuple[ServerConfig, str]:
        old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
        old.write_text(text)
        new.unlink(missing_ok=True)
        assert main(["config", "import", str(old), "--output", str(new)]) == 0
        assert stat.S_IMODE(new.stat().st_mode) == 0o600, "it may hold passwords"
        assert "Check it with" in capsys.readouterr().out
        return load({"config": str(new)}, {}).config, new.read_text()

    return call


def test_the_file_of_an_engine(imported: Import) -> None:
    config, text = imported(
        "chunk_size: 128\nlocal_cpu: true\nmax_local_cpu_size: 40\nlocal_disk: 'file:///data/x'\nmax_local_disk_size: 100\n"
        "remote_url: 'redis://:pw@h:6379'\nsave_decode_cache: true\nenable_blending: true\nremote_serde: cachegen\n"
        "numa_mode: auto\nfrobnicate: 3\ninternal_api_server_port_start: 7000\nuse_layerwise: true\n"
    )
    assert (config.chunk_size, config.l1_size_gb, config.http_port) == (128, 40.0, 7000)
    assert config.l2 == ("disk:///data/x?max_gb=100", "redis://:pw@h:6379?codec=cachegen")
    for name, why in (
        ("save_decode_cache: true", "an engine that shares a daemon has no such setting"),
        ("enable_blending: true", "no effect: blending is not there under this engine"),
        ("numa_mode: auto", "no effect"),
        ("frobnicate: 3", "not a setting"),
    ):
        assert f"# left out: {name}: {why}" in text
    assert "use_layerwise" not in text and "local_cpu: true" not in text, "they are what happens anyway"


def test_a_store_that_further_settings_complete(imported: Import) -> None:
    config, _ = imported(
        "max_local_cpu_size: 1\nremote_url: 'mooncakestore://10.0.0.1:50051/'\n"
        "extra_config: {local_hostname: host-a, global_segment_size: 1GB}\n"
    )
    assert config.l2 == ("mooncakestore://10.0.0.1:50051?hostname=host-a&segment_gb=1",)


def test_the_manifest_of_the_operator(imported: Import) -> None:
    config, text = imported(
        """
kind: LMCacheEngine
spec:
  l1: {sizeGB: 60}
  server: {chunkSize: 64, hashAlgorithm: sha256_cbor, port: 6000, httpPort: 9000}
  eviction: {policy: LRU, triggerWatermark: 0.7}
  prometheus: {port: 9091}
  logLevel: DEBUG
  l2Backend:
    raw: {type: fs, config: {base_path: /data, max_capacity_gb: 50}}
    encryption: {aesBits: 128}
  nodeSelector: {a: b}
  pd: {nixlSideChannelPort: 5558}
  extraArgs: ["--l1-use-lazy", "--run-script-api-enabled", "--max-workers=3"]
"""
    )
    assert (config.l1_size_gb, config.chunk_size, config.port, config.http_port) == (60.0, 64, 6000, 9000)
    assert (config.prometheus_port, config.log_level, config.max_workers) == (9091, "DEBUG", 3)
    assert config.l2 == ("disk:///data?max_gb=50",) and config.host == "127.0.0.1"
    for name in ("--hash-algorithm sha256_cbor: has no effect", "spec.l2Backend.encryption", "spec.nodeSelector", "spec.pd",
                 "--run-script-api-enabled: is not supported", "--l1-use-lazy: has no effect", "host: 0.0.0.0"):  # fmt: skip
        assert f"# left out: {name}" in text
    config, text = imported(
        "kind: LMCacheEngine\nspec:\n  l1: {sizeGB: 2}\n  l2Backend: {resp: {host: h, authSecretRef: {name: x}}}\n"
    )
    assert config.l2 == ("redis://h:6379/0",) and "authSecretRef: write ${REDIS_PASSWORD}" in text


def test_a_pod_that_runs_a_server(imported: Import) -> None:
    pod = """
apiVersion: v1
kind: ConfigMap
data: {a: b}
---
kind: DaemonSet
spec:
  template:
    spec:
      containers:
      - command: [%s]
        args: [%s]
"""
    for command, arguments in (
        (
            '"/opt/venv/bin/lmcache", "server"',
            '"--l1-size-gb", "7", "--l2-adapter", "{\\"type\\": \\"fs\\", \\"base_path\\": \\"/d\\"}"',
        ),
        ('"sh", "-c"', '"exec lmcache server --l1-size-gb 7 --l2 disk:///d"'),
    ):
        config, _ = imported(pod % (command, arguments))
        assert config.l1_size_gb == 7.0 and [one.partition("?")[0] for one in config.l2] == ["disk:///d"]


def test_flags_as_keys(imported: Import) -> None:
    config, text = imported(
        "l1_size_gb: 3\neviction-trigger-watermark: 0.8\nl1-use-lazy: true\nl2: ['disk:///a?max_gb=1']\n"
    )
    assert config.l1_size_gb == 3.0 and config.l2 == ("disk:///a?max_gb=1",)
    assert "# left out: --eviction-trigger-watermark 0.8: has no effect" in text and "--l1-use-lazy" in text


def test_every_reason_is_that_of_the_two_tables(imported: Import) -> None:
    """No flag and no setting of the public project is lost without its reason."""
    keys = "".join(f"{one.flag.lstrip('-')}: 1\n" for one in EARLIER_FLAGS if not one.accepted)
    _, text = imported(f"l1-size-gb: 1\n{keys}")
    assert all(f"# left out: {one.flag} 1: " in text and one.said in text for one in EARLIER_FLAGS if not one.accepted)
    numbers = ("blend_recompute_ratios", "blend_check_layers")
    ignored = [
        row for row in ROWS if row.effect.startswith("no effect") and row.default is None and row.name not in numbers
    ]
    _, text = imported("max_local_cpu_size: 1\n" + "".join(f"{row.name}: x\n" for row in ignored))
    assert all(f"# left out: {row.name}: x: {' '.join(row.effect.split())}" in text for row in ignored)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n", "must be lines of `key: value`"),
        ("a: [", "is not YAML"),
        ("kind: Service\nspec: {}\n", "none of its objects runs `lmcache server`"),
        ("l1-size-gb: many\n", "l1-size-gb: many: must be"),
        ("zzz: 1\n", "has no setting of LMCache"),
        pytest.param("[" * 100000, "is not YAML", id="deep"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    assert main(["config", "import", str(file)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_no_file_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("l1-size-gb: 1\n")
    assert main(["config", "import", str(file), "--output", str(file)]) == 2
    assert "name a new file" in capsys.readouterr().err and file.read_text() == "l1-size-gb: 1\n"
    assert main(["config", "import", str(tmp_path / "none")]) == 2
    assert "cannot be read: No such file or directory" in capsys.readouterr().err
