"""Servers and engines of different users: who is let in, who is not, and what both sides say."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache.config import options
from lmcache.config.load import load
from lmcache.errors import ConfigError
from servers import PATIENCE, EngineProcess, Server, eventually

TOKENS = list(range(160))
UID, GID, OTHER_GID = 54321, 54322, 54323
ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can start processes of two users")


@pytest.fixture
def way() -> Iterator[Path]:
    """A folder that other users can reach, for a socket folder."""
    folder = Path(tempfile.mkdtemp(prefix="lmtest-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def cache(server: Callable[..., Server], way: Path) -> Callable[..., Server]:
    """A server whose socket folder others can reach, if it lets them."""

    def start(*flags: str) -> Server:
        one = server(flags=("--socket-dir", str(way / "run"), *flags))
        one.socket_dir = way / "run"
        return one

    return start


@pytest.fixture
def stranger() -> Iterator[Callable[..., EngineProcess]]:
    """An engine process of another user, which may not get in."""
    made: list[EngineProcess] = []

    def make(cache: Server, uid: int, *gids: int, trusts: str = "0", **more: Any) -> EngineProcess:
        os.environ["LMCACHE_ALLOW_SERVER_UID"] = trusts
        try:
            made.append(EngineProcess(address=cache.address, instance=f"of {uid}", user=[uid, *gids], **more))
        finally:
            del os.environ["LMCACHE_ALLOW_SERVER_UID"]
        return made[-1]

    yield make
    for one in made:
        one.kill()


def modes(cache: Server) -> tuple[int, int]:
    return stat.S_IMODE(cache.socket_dir.stat().st_mode), stat.S_IMODE(os.stat(cache.socket_path()).st_mode)


@ROOT
@pytest.mark.parametrize("how", ["user", "group", "further group", "user and group"])
def test_an_engine_of_a_user_who_is_let_in_maps_the_arena(
    cache: Callable[..., Server], stranger: Callable[..., EngineProcess], how: str
) -> None:
    flags = {"user": ["--allow-uid", f"1,{UID}"], "user and group": ["--allow-uid", "1", "--allow-gid", str(GID)]}
    one = cache(*flags.get(how, ["--allow-gid", str(GID)]))
    gids = {"user": [OTHER_GID], "further group": [OTHER_GID, GID]}.get(how, [GID])
    assert modes(one) == ((0o710, 0o660) if how in ("group", "further group") else (0o711, 0o666))
    engine = stranger(one, UID, *gids)
    assert engine.hear() == "ready"
    assert engine.ask("store", ids=TOKENS) == len(TOKENS) == engine.ask("load", ids=TOKENS)
    processes = one.status()["engines"]
    assert {row["pid"] for row in processes} == {engine.pid} and not any(row["payload_frames"] for row in processes)
    (arena,) = one.arena_dir.glob("*.arena")
    assert stat.S_IMODE(arena.stat().st_mode) == 0o600, "they get its descriptor, not the file"
    (cookie,) = one.socket_dir.glob("*.cookie")
    assert stat.S_IMODE(cookie.stat().st_mode) == 0o600, "and no way in over TCP"
    assert "may map L1, too" in "".join(one.log)


@ROOT
@pytest.mark.parametrize("case", ["not let in", "other user let in", "not trusted"])
def test_who_is_not_let_in_gets_nothing_and_both_sides_name_both_users(
    cache: Callable[..., Server], stranger: Callable[..., EngineProcess], case: str
) -> None:
    flags = {"other user let in": ["--allow-uid", str(UID + 1)], "not trusted": ["--allow-uid", str(UID)]}
    one = cache(*flags.get(case, []))
    engine = stranger(one, UID, OTHER_GID, trusts="" if case == "not trusted" else "0")
    said = engine.line_with("is of no use to this engine")
    assert str(UID) in said and "user 0" in said, said
    assert f"--allow-uid {UID}" in said, said
    told = eventually(lambda: one.status()["refused_engines"])[0]
    assert str(UID) in told["remedy"] and "user 0" in told["remedy"]
    assert told["reason"] == ("other user" if case == "other user let in" else "no proof")
    assert not one.status()["engines"]
    mine = EngineProcess(address=one.address, instance="mine")
    try:
        assert mine.hear() == "ready" and mine.ask("store", ids=TOKENS) == len(TOKENS), (
            "the server's own user is served"
        )
    finally:
        mine.kill()


@ROOT
def test_a_socket_of_another_user_is_judged_by_the_kernel_and_not_by_its_file(
    cache: Callable[..., Server], stranger: Callable[..., EngineProcess]
) -> None:
    """The engine trusts user 1, to whom the file belongs, but the process that listens is root's."""
    one = cache("--allow-uid", str(UID))
    os.chown(one.socket_path(), 1, 1)
    engine = stranger(one, UID, OTHER_GID, trusts="1")
    said = engine.line_with("the server there runs as user 0")
    assert str(UID) in said and not one.status()["engines"]


@ROOT
def test_other_users_need_a_way_to_the_folder(way: Path) -> None:
    way.chmod(0o700)
    command = [
        sys.executable,
        "-m",
        "lmcache.cli.main",
        "server",
        "--port",
        "0",
        "--http-port",
        "0",
        "--l1-size-gb",
        "0.1",
    ]
    command += ["--socket-dir", str(way / "run"), "--allow-uid", str(UID)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2 and f"have no way through {way}" in done.stderr


@pytest.mark.parametrize("text", ["root", "-1", "65534", "4294967295", "1,x", "1.5", "٣"])
def test_only_numbers_of_users_who_can_be_told_apart_are_taken(text: str) -> None:
    """65534 is what the kernel shows for everybody from another user namespace."""
    with pytest.raises(ValueError):
        options.ids(text)
    with pytest.raises(ConfigError, match="--allow-uid"):
        load({"allow_uid": [text]}, {})


def test_the_numbers_come_from_flags_variables_and_files(tmp_path: Path) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_text("allow-uid: [1000, 1001]\nallow-gid: 7\n")
    config = load({"config": str(file)}, {}).config
    assert config.allow_uid == (1000, 1001) and config.allow_gid == (7,)
    assert load({"allow_uid": ["5,6", "6"]}, {}).config.allow_uid == (5, 6)
    assert load({}, {"LMCACHE_SERVER_ALLOW_GID": "9"}).config.allow_gid == (9,)
    assert config.redacted()["allow-uid"] == [1000, 1001]
