"""What users write for a tier: URLs, the JSON spelling, tiers of third parties; and what nobody may see of it."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lmcache.config.options import integer
from lmcache.errors import ConfigError
from lmcache.tiers import Shard, ShardKey, Tier, Usage
from lmcache.tiers.adapters import url_of_adapter
from lmcache.tiers.registry import make_tier, make_tiers, schemes
from lmcache.tiers.url import parse_url, read_secret
from servers import Server

GIB = 1 << 30


class Tape(Tier):
    """A third party's tier, which keeps nothing."""

    scheme = "tape"

    def __init__(self, reels: int) -> None:
        self.reels = reels

    @classmethod
    def from_url(cls, url: object) -> Tape:
        return cls(url.take("reels", integer(1, 9), 1))  # type: ignore[attr-defined]

    def open(self) -> None: ...

    def contains(self, keys: Sequence[ShardKey]) -> list[bool]:
        return [False] * len(keys)

    def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
        return ["absent"] * len(keys)

    def store(self, shards: Sequence[Shard]) -> list[str]:
        return ["full"] * len(shards)

    def remove(self, keys: Sequence[ShardKey]) -> None: ...

    def clear(self) -> None: ...

    def usage(self) -> Usage:
        return Usage(0, 0, None)

    def close(self) -> None: ...


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if packages were installed that bring tiers, one of which is good."""
    for name, scheme, value in (
        ("tape", "tape", f"{__name__}:Tape"),
        ("rope", "rope", f"{__name__}:GIB"),
        ("wire", "wire", f"{__name__}:Tape"),
        ("lost", "lost", "no_such_module:Tier"),
        ("less", "less", f"{__name__}:Less"),
    ):
        folder = tmp_path / f"{name}-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (folder / "entry_points.txt").write_text(f"[lmcache.tiers]\n{scheme} = {value}\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_url_and_its_parts() -> None:
    url = parse_url("redis://us%65r:${PASS}@host:6379/0?max_gb=1.5&name=a", {"PASS": "p@ss/word"})
    assert (url.scheme, url.username, url.password, url.host, url.port, url.path) == (
        "redis", "user", "p@ss/word", "host", 6379, "/0"
    )  # fmt: skip
    assert not url.inline_secret and url.take_max_bytes() == int(1.5 * GIB)
    assert parse_url("disk:///a%20b/c").path == "/a b/c" and parse_url("disk:///a").take_max_bytes() is None
    assert parse_url("redis://[::1]:7/0").redacted == "redis://[::1]:7/0"


def test_nobody_sees_a_secret() -> None:
    url = parse_url("redis://user:hunter2@host/0?token=hunter3&key_file=/etc/key&max_gb=3")
    assert url.inline_secret
    for shown in (url.redacted, repr(url), str(url)):
        assert "hunter" not in shown
    assert url.redacted == "redis://user:***@host/0?token=***&key_file=/etc/key&max_gb=3"
    with pytest.raises(ConfigError) as caught:
        make_tier("redis://user:hunter2@host/0?tokn=hunter3")
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no url", "write a URL such as disk:"),
        ("user:hunter2@host", "write a URL such as disk:"),
        ("Disk:///a", "write a URL such as disk:"),
        ("redis://h:port/0", "the port must be a number up to 65535"),
        ("redis://h:99999/0", "the port must be a number up to 65535"),
        ("redis://[::1:6379/0", "an IPv6 address in brackets"),
        ("redis://:hunter/2@h:6379/0", "in a password write / as %2F"),
        ("redis://:12/hunter@h:6379/0", "in a password write / as %2F"),
        ("redis://user:hunter#2@h:6379/0", "# as %23"),
        ("redis://user:12#hunter@h:6379/0", "# as %23"),
        ("disk:///a?max_gb=1&max_gb=2", "given twice"),
        ("redis://:${NOPE_NOT_SET}@h", r"\$\{NOPE_NOT_SET\} is not set: export NOPE_NOT_SET"),
        ("disk:///a?max_gb=many", "max_gb=many: max_gb: must be a number from 0.001"),
        ("disk:///a?write=never", "write: unknown; known: through, on-evict, none"),
        ("disk:///a?read=perhaps", "read: unknown; known: yes, no"),
        ("disk:///a?max_bg=1", "unknown option 'max_bg'; did you mean max_gb?"),
        (
            "tape://reel",
            "unknown tier 'tape'; known: az, dir, disk, gs, infinistore, mooncake, mooncakestore, peer, redis, rediss, s3",
        ),
    ],
)
def test_what_cannot_be_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        make_tier(text)
    assert "hunter" not in str(caught.value)


def test_how_the_server_uses_a_tier_is_in_its_url() -> None:
    plain = make_tier("dir:///a")
    assert (plain.name, plain.write, plain.read, plain.warning) == ("dir", "through", True, "")
    told = make_tier("disk:///a?write=on-evict&read=no&name=ssd&max_gb=1")
    assert (told.name, told.write, told.read) == ("ssd", "on-evict", False)
    assert "can be read by every user" in make_tier("redis://:pass@h").warning


def test_names_are_unique() -> None:
    made = make_tiers(["dir:///a", "dir:///b", "dir:///c?name=far", "dir:///d"])
    assert [one.name for one in made] == ["dir", "dir2", "far", "dir3"]
    with pytest.raises(ConfigError, match="name=far is taken by another tier"):
        make_tiers(["dir:///a?name=far", "dir:///b?name=far"])


def test_a_third_partys_tier(installed: None) -> None:
    assert {"tape", "rope", "disk"} <= set(schemes())
    made = make_tier("tape://?reels=3&write=none")
    assert made.tier.reels == 3 and made.write == "none"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"unknown option 'reel'; did you mean reels\?"):
        make_tier("tape://?reel=3")
    for url, said in (
        ("rope://", "entry point .*:GIB is not a class derived from Tier or AsyncTier"),
        ("wire://", ":Tape must have scheme = 'wire'"),
        ("lost://", "cannot load no_such_module:Tier: ModuleNotFoundError: No module named 'no_such_module'"),
        ("less://", "cannot load .*:Less: AttributeError"),
    ):
        with pytest.raises(ConfigError, match=f"^{url}: .*{said}"):
            make_tier(url)


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("lmcache.tiers.object_store")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"^s3://bucket/x: obstore is not installed; pip install 'lmcache\[s3\]'$"):
        make_tier("s3://bucket/x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"^mooncake://h: mooncake is not installed; pip install 'lmcache\[mooncake\]'$"
    ):
        make_tier("mooncake://h")
    make_tiers(["disk:///a", "dir:///a", "redis://h"])  # the others do without


@pytest.mark.parametrize(
    ("url", "page"),
    [
        ("disk:///a", "disk"),
        ("dir:///a", "dir"),
        ("redis://h", "redis"),
        ("rediss://h", "redis"),
        ("s3://bucket/x", "s3"),
        ("az://bucket/x", "azure-and-gcs"),
        ("gs://bucket/x", "README"),
        ("mooncake://h", "mooncake"),
        ("mooncakestore://h:1/", "mooncake"),
        ("infinistore://h", "infinistore"),
        ("disk:///a", "README"),
    ],
)
def test_the_pages_have_every_option_and_no_other(url: str, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # libraries need not be here
    pages = Path(__file__).resolve().parents[1] / "docs" / "tiers"
    told, everywhere = (options_on(pages / f"{name}.md") for name in (page, "README"))
    with pytest.raises(ConfigError) as caught:
        make_tier(f"{url}?zzzzzz=1")
    known = set(str(caught.value).partition("known: ")[2].split(", "))
    assert {"max_gb", "read", "write", "name"} <= known
    if page in ("mooncake", "infinistore"):
        everywhere.remove("codec")  # they take KV as it is
    assert known == told | everywhere if page != "README" else known >= told


def options_on(page: Path) -> set[str]:
    """The first cells of the table that begins with `| option |`."""
    table = page.read_text().partition("\n| option |")[2].partition("\n\n")[0]
    return {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])}


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ('{"type": "fs", "base_path": "/data/kv"}', "disk:///data/kv"),
        ('{"type": "fs_native", "base_path": "/d", "max_capacity_gb": 20}', "disk:///d?max_gb=20"),
        ('{"type": "resp", "host": "h"}', "redis://h:6379/0"),
        ('{"type": "resp", "host": "::1"}', "redis://[::1]:6379/0"),
        (
            '{"type": "redis", "host": "h", "port": 7, "username": "u", "password": "${PW}", "max_capacity_gb": 2}',
            "redis://u:${PW}@h:7/0?max_gb=2",
        ),
        (
            '{"type": "s3", "bucket": "kvs", "prefix": "p", "endpoint": "http://h:1", "region": "r"}',
            "s3://kvs/p?endpoint=http%3A%2F%2Fh%3A1&region=r",
        ),
        (
            '{"type": "mooncake_store", "num_workers": 3, "replica_num": 2, "local_hostname": "10.0.0.7", "protocol": "tcp",'
            ' "metadata_server": "http://m:8080/metadata", "master_server_addr": "m:50051", "rdma_devices": "",'
            ' "global_segment_size": "4GB", "local_buffer_size": 1073741824, "storage_root_dir": "", "transfer_timeout": 5}',
            "mooncake://m:50051?hostname=10.0.0.7&metadata=http%3A%2F%2Fm%3A8080%2Fmetadata&protocol=tcp&timeout=5&workers=3"
            "&replicas=2&segment_gb=4",
        ),
        (
            '{"type": "mooncake_store", "master_server_address": "h:1", "global_segment_size": 536870912}',
            "mooncake://h:1?segment_gb=0.5",
        ),
    ],
)
def test_the_json_spelling(text: str, url: str) -> None:
    assert url_of_adapter(text).url == url
    parse_url(url, {"PW": "x"})


@pytest.mark.parametrize(
    ("rest", "names"),
    [
        ('"num_workers": 16', "num_workers"),
        ('"eviction": {"eviction_policy": "LRU", "trigger_watermark": 0.8, "eviction_ratio": 0.2}', "eviction"),
        ('"num_workers": 16, "eviction": {"eviction_policy": "LRU"}', "num_workers, eviction"),
    ],
)
def test_what_a_tier_decides_by_itself_is_taken_and_a_line_says_so(rest: str, names: str) -> None:
    for kind, place, url in (
        ("fs_native", '"base_path": "/d"', "disk:///d?max_gb=4000"),
        ("resp", '"host": "h"', "redis://h:6379/0?max_gb=4000"),
        ("s3", '"bucket": "b"', "s3://b/?max_gb=4000"),
    ):
        found = url_of_adapter(f'{{"type": "{kind}", {place}, "max_capacity_gb": 4000, {rest}}}')
        assert found.url == url
        (line,) = found.said
        assert line.startswith(f"--l2-adapter {kind}: {names}: no effect: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", 'write {"type": "fs"'),
        ('{"type": "tape"}', "type 'tape' is not supported; known: fs, fs_native, resp, redis, s3, mooncake_store"),
        ('{"type": "mooncake_store", "num_workers": 2}', "mooncake_store needs 'master_server_address'"),
        (
            '{"type": "mooncake_store", "master_server_address": "h:1", "max_capacity_gb": 3}',
            "max_capacity_gb is not enforced by this store",
        ),
        (
            '{"type": "mooncake_store", "master_server_address": "h:1", "global_segment_size": "much"}',
            "'much' is neither a number of bytes nor a size such as 4GB",
        ),
        ('{"type": "mooncake_store", "master_server_address": "h:1", "storage_root_dir": "/d"}', "storage_root_dir: "),
        ('{"type": "fs"}', "fs needs 'base_path'"),
        (
            '{"type": "fs", "base_path": "/d", "eviction": {"eviction_policy": "noop"}}',
            "eviction_policy 'noop' is not supported: a tier that has reached max_capacity_gb evicts",
        ),
        (
            '{"type": "fs", "base_path": "/d", "shards": 3}',
            r"fs does not support 'shards'; write it as --l2 disk:///d\?",
        ),
        (
            '{"type": "redis", "host": "h", "username": "u", "password": "hunter/2", "shards": 3}',
            r"redis does not support 'shards'; write it as --l2 redis://\.\.\.@h:6379/0\?",
        ),
    ],
)
def test_json_that_cannot_be_understood(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        url_of_adapter(text)
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        (
            '{"type": "nixl_store", "backend": "POSIX", "backend_params": {"file_path": "/d/kv"}, "pool_size": 64}',
            "disk:///d/kv",
        ),
        (
            '{"type": "nixl_store_dynamic", "backend": "POSIX", "max_capacity_gb": 9, "persist_enabled": true,'
            ' "backend_params": {"file_path": "/d", "use_direct_io": "false"}}',
            "disk:///d?max_gb=9&io=buffered",
        ),
        (
            '{"type": "nixl_native", "backend": "OBJ", "num_workers": 4, "backend_params":'
            ' {"bucket": "kvs", "endpoint_override": "h:9000", "scheme": "http", "region": "r"}}',
            "s3://kvs/?endpoint=http%3A%2F%2Fh%3A9000&region=r",
        ),
        (
            '{"type": "nixl_store", "backend": "AZURE_BLOB", "backend_params":'
            ' {"container_name": "kvs", "account_url": "https://acc.blob.core.windows.net"}}',
            "az://kvs/?account=acc&endpoint=https%3A%2F%2Facc.blob.core.windows.net",
        ),
    ],
)
def test_nixls_stores_are_served_by_ours_and_a_line_says_so(text: str, url: str) -> None:
    found = url_of_adapter(text)
    assert found.url == url
    (line,) = found.said
    assert f"is served by {url.partition('?')[0]}, which" in line and "finds damaged data" in line
    assert ("no effect" in line) == any(name in text for name in ("pool_size", "persist_enabled", "num_workers"))


def test_the_server_logs_the_line_of_a_translated_adapter(server: Callable[..., Server], tmp_path: Path) -> None:
    text = f'{{"type": "nixl_store", "backend_params": {{"file_path": "{tmp_path}"}}, "max_capacity_gb": 1}}'
    server(flags=("--l2-adapter", text)).said_once("nixl_store with POSIX is served by disk://")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"type": "nixl_store", "backend": "GDS"}',
            "GDS is not supported: there is no GPU Direct Storage: write --l2 disk",
        ),
        ('{"type": "nixl_native", "backend": "HF3FS"}', "mount 3FS and write --l2 dir:///MOUNT"),
        ('{"type": "nixl_store", "backend": "TAPE"}', "known: POSIX, OBJ, AZURE_BLOB"),
        ('{"type": "nixl_store"}', "an/absolute/path"),
        ('{"type": "nixl_store", "backend_params": 3}', "backend_params must be a mapping"),
        ('{"type": "nixl_store", "backend_params": {"file_path": "/d", "x": 1}}', r"does not support 'x' with POSIX"),
        (
            '{"type": "nixl_store", "backend": "OBJ", "backend_params": {"bucket": "b", "secret_key": "s"}}',
            "export AWS_ACCESS",
        ),
        ('{"type": "raw_block", "device": "/dev/x"}', "make a file system on the device"),
        ('{"type": "dax"}', "--arena-dir MOUNT"),
        ('{"type": "plugin"}', "docs/tiers/plugins.md"),
        ('{"type": "aerospike"}', "write --l2 redis://"),
    ],
)
def test_stores_that_there_are_not_are_refused_with_what_to_write(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        url_of_adapter(text)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("valkey://h:1", "valkey:// is not supported: write redis://"),
        ("fs:///d", "write dir:///PATH"),
        ("lm://h:1", "name it with --peers"),
        ("external://h", "plugins.md"),
    ],
)
def test_schemes_of_the_public_project_are_answered(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_tier(url)


def test_secrets_in_files(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"geheim\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=f"other users may read it: chmod 600 {path}"):
        read_secret(str(path), "tier")
    path.chmod(0o600)
    assert parse_url(f"redis://h?password_file={path}").take_password() == "geheim"
    with pytest.raises(ConfigError, match="must hold 32 bytes, or 64 hexadecimal digits"):
        parse_url(f"disk:///a?key_file={path}").take_frame_key()
    path.write_text("ab" * 32)
    assert parse_url(f"disk:///a?key_file={path}").take_frame_key() == b"\xab" * 32
    path.write_bytes(bytes(range(32)))
    assert parse_url(f"disk:///a?key_file={path}").take_frame_key() == bytes(range(32))
    with pytest.raises(ConfigError, match="cannot read"):
        read_secret(str(tmp_path / "nowhere"), "tier")


@pytest.mark.parametrize(
    ("given", "codec", "said"),
    [
        ("", "auto", ""),
        ("?codec=auto", "auto", ""),
        ("?codec=none", "none", ""),
        ("?codec=pack12", "pack12", ""),
        ("?codec=naive", "none", ""),
        ("?codec=int8", "int8", ""),
        (
            "?codec=cachegen",
            "int8",
            "codec=cachegen is served by int8, which is more exact: it rounds the KV of engines",
        ),
        ("?codec=fp8", "int8", "lossy_kv=int8 only"),
    ],
)
def test_the_codec_of_a_tier(given: str, codec: str, said: str) -> None:
    spec = make_tier(f"redis://host:6379/0{given}")
    assert spec.tier.codec == codec and said in spec.warning and bool(said) == bool(spec.warning)
    assert spec.url == f"redis://host:6379/0{given}"  # it is no secret


def test_a_codec_that_is_unknown_or_of_no_use_is_an_error(installed: None) -> None:
    with pytest.raises(ConfigError, match=r"codec: .*pack12"):
        make_tier("redis://host:6379/0?codec=zip")
    assert make_tier("tape://?codec=none").tier.codec == "none"
    with pytest.raises(ConfigError, match="unknown option 'codec'"):
        make_tier("tape://?codec=pack12")


@pytest.mark.parametrize("serde", ['"cachegen"', '{"type": "cachegen", "bits": 4}'])
def test_a_serde_of_an_adapter_is_a_codec(serde: str) -> None:
    assert url_of_adapter(f'{{"type": "fs", "base_path": "/d", "serde": {serde}}}').url == "disk:///d?codec=cachegen"
    with pytest.raises(ConfigError, match="serde 'zip'"):
        url_of_adapter('{"type": "fs", "base_path": "/d", "serde": "zip"}')


def test_a_url_is_shown_in_one_line() -> None:
    assert parse_url("dir:///tmp/a%0AERROR:%20all%20is%20lost").redacted == "dir:///tmp/a?ERROR: all is lost"
