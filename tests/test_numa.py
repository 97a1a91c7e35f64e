"""Where the arena's pages lie: what the kernel says of the mapping afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lmcache.errors import ConfigError
from lmcache.memory.arena import Arena
from lmcache.memory.numa import nodes_of, online_nodes, place


def policy_of(address: int) -> str:
    """From /proc/self/numa_maps: `default`, `interleave:0`, `bind:0` ..."""
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    return next(line.split()[1] for line in lines if int(line.split()[0], 16) == address)


needs_numa = pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="this kernel has no memory policies")


@needs_numa
@pytest.mark.parametrize(
    ("numa", "said"), [("spread", r"interleave:"), ("0", r"bind.*:0$"), ("auto", "default|interleave")]
)
def test_the_kernel_was_told(folders: Callable[[str], Path], numa: str, said: str) -> None:
    arena = Arena(folders("/dev/shm"), 4 << 20, numa)
    try:
        assert re.match(said, policy_of(arena.mapping.address))
        assert arena.nodes == {"spread": online_nodes(), "0": [0]}.get(numa, arena.nodes)
        if numa == "auto" and len(online_nodes()) == 1:
            assert arena.nodes == [] and policy_of(arena.mapping.address) == "default", "one node: nothing changes"
    finally:
        arena.close()


def test_nodes_that_are_not_there_are_an_error_and_leave_nothing(folders: Callable[[str], Path]) -> None:
    folder = folders("/dev/shm")
    with pytest.raises(ConfigError, match=r"--numa 0,999: there is no node 999 with memory; there are 0"):
        Arena(folder, 4 << 20, "0,999")
    assert not list(folder.iterdir())


def test_auto_spreads_over_several_nodes_only() -> None:
    assert place(0, 0, "auto", [0]) == []
    with pytest.raises(ConfigError, match="no node 3 with memory; there are 0, 1"):
        place(0, 0, "3", [0, 1])


def test_lists_of_nodes(tmp_path: Path) -> None:
    assert nodes_of("0,2-4\n") == [0, 2, 3, 4]
    for wrong in ("", "a", "3-1", "0,,1", "99999", "-1"):
        with pytest.raises(ValueError, match="must be auto, spread, or nodes"):
            nodes_of(wrong)
    assert online_nodes(tmp_path) == [0]
    (tmp_path / "has_memory").write_text("0-1\n")
    assert online_nodes(tmp_path) == [0, 1]
