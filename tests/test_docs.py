"""The code of docs/write-your-own-integration.md and docs/api.md as it stands there, with a real server; what is exported."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

import lmcache
from engine_process import set_deadline
from lmcache.cache.reasons import REASONS
from lmcache.server.metrics import HELP
from lmcache.server.refused import EXPLAINED, Reason
from servers import PATIENCE, Server, eventually

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, API = DOCS / "write-your-own-integration.md", DOCS / "api.md"
PROMPT = "Steps for a prompt"
"""The section of what is done again and again; before it stands what is done once."""
BLOCK_TOKENS, BLOCKS, LAYERS, KV_HEADS, HEAD_SIZE, CHUNK = 8, 20, 2, 3, 4, 16


def snippets(page: Path = PAGE) -> Iterator[tuple[str, str]]:
    """(its section, code) of each indented block."""
    for section in page.read_text().split("\n## "):
        for found in re.finditer(r"(?:^    .*\n|^\n(?=    ))+", section, re.MULTILINE):
            yield section.partition("\n")[0], re.sub(r"^    ", "", found[0], flags=re.MULTILINE)


class Tensor:
    """An ndarray with the part of a tensor's face that the page uses."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array, self.shape = array, array.shape

    def __iter__(self) -> Iterator[Tensor]:
        return (Tensor(one) for one in self.array)

    def element_size(self) -> int:
        return self.array.itemsize

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def data_ptr(self) -> int:
        return self.array.ctypes.data


def kv_of(ids: list[int]) -> np.ndarray[Any, Any]:
    """[layer][K, V][head][token][dim]; what a token has depends on all before it."""
    sums = np.cumsum(ids).astype(np.uint16)
    rest = np.arange(LAYERS * 2 * KV_HEADS * HEAD_SIZE, dtype=np.uint16).reshape(LAYERS, 2, KV_HEADS, 1, HEAD_SIZE)
    return sums[None, None, None, :, None] * np.uint16(7) + rest


class Reader:
    """Who has copied the page: what it leaves to the engine, and its code one snippet after the other."""

    def __init__(self, address: str) -> None:
        self.kv = np.zeros((LAYERS, 2, KV_HEADS, BLOCKS * BLOCK_TOKENS, HEAD_SIZE), np.uint16)
        self.names: dict[str, Any] = {
            "memory": Tensor(self.kv),
            "BLOCK_TOKENS": BLOCK_TOKENS,
            "num_blocks": BLOCKS,
            "blocks": list(range(BLOCKS)),
            "model_id": "a model",
            "layers": LAYERS,
            "kv_heads": KV_HEADS,
            "head_size": HEAD_SIZE,
            "digest": "d",
            "salt": "",
            "have": 0,
            "seconds": PATIENCE,
            "event": None,
            "name": "request 1",
        }
        code = list(snippets())
        said = [one.replace("tcp://localhost:5555", address) for section, one in code if section != PROMPT]
        assert sum(address in one for one in said) == 1
        for one in said:
            exec(one, self.names)
        self.look_up, self.load, self.wait, self.store, self.end_of_it = (
            one for section, one in code if section == PROMPT
        )
        assert self.rank.wait_connected(PATIENCE)
        set_deadline(PATIENCE, self.rank.scheduler, self.rank.worker)

    def __getattr__(self, name: str) -> Any:
        return self.names[name]

    def run(self, code: str, **changes: Any) -> None:
        self.names |= changes
        exec(code, self.names)

    def stored(self) -> int:
        """Tokens that the stores of the prompt came to."""
        running = self.rank.copies.running()
        assert self.rank.copies.wait(running, PATIENCE)
        return sum(copy.done.tokens for copy in running)

    def close(self) -> None:
        self.rank.close()


@pytest.fixture
def reader() -> Iterator[Callable[[Server], Reader]]:
    made: list[Reader] = []

    def make(server: Server) -> Reader:
        made.append(Reader(server.address))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_the_page_is_an_integration(server: Callable[..., Server], reader: Callable[[Server], Reader]) -> None:
    cache, ids = server(chunk=CHUNK), list(range(1, 101))
    first = reader(cache)
    first.run(first.look_up, token_ids=ids)
    assert first.request.hit is None
    first.kv[..., :100, :] = kv_of(ids)
    first.run(first.store, computed=100)
    assert first.stored() == 96

    longer = [*ids, *range(500, 530)]
    for have in (0, 40):  # the second one finds what the first has stored as well
        other = reader(cache)
        other.kv[..., :have, :] = kv_of(longer)[..., :have, :]
        other.run(other.look_up, token_ids=longer, have=have)
        end = 96 if not have else 128
        assert other.request.found_tokens == end
        other.run(other.load)
        other.run(other.wait)
        assert other.end == end and other.copy.ok
        assert np.array_equal(other.kv[..., :end, :], kv_of(longer)[..., :end, :]), "wrong bytes"
        assert not other.kv[..., end:, :].any(), "what was not there stays as it was"
        other.kv[..., :130, :] = kv_of(longer)
        other.run(other.store, token_ids=longer, computed=130)
        assert other.stored() == (0 if have else 32), "what was there is not stored again"
        other.run(other.end_of_it)
    eventually(lambda: cache.counters()["leases"] == 0)


def test_a_prompt_that_is_there_in_full_leaves_its_last_token(
    server: Callable[..., Server], reader: Callable[[Server], Reader]
) -> None:
    cache, ids = server(chunk=CHUNK), list(range(1, 65))
    first, second = reader(cache), reader(cache)
    first.kv[..., :64, :] = kv_of(ids)
    first.run(first.look_up + first.store, token_ids=ids, computed=64)
    assert first.stored() == 64
    second.run(second.look_up + second.load, token_ids=ids)
    second.run(second.wait)
    assert second.copy.ok and second.end == 63
    assert np.array_equal(second.kv[..., :63, :], kv_of(ids)[..., :63, :]) and not second.kv[..., 63:, :].any()


def test_the_example_of_the_public_interface_works(server: Callable[..., Server]) -> None:
    address, names = server(chunk=CHUNK).address, dict[str, Any]()
    exec("\n".join(code for _, code in snippets(API)).replace("tcp://localhost:5555", address), names)
    first, stored = names["cache"], names["kv"]
    second = names["Cache"]("my-engine-2", loaded := np.zeros_like(stored))
    try:
        for cache in (first, second):
            assert cache.scheduler.wait_connected(PATIENCE) and cache.worker.wait_connected(PATIENCE)
            set_deadline(PATIENCE, cache.scheduler, cache.worker)
        tokens = list(range(100, 140))
        assert first.load(tokens, [0, 1, 2]) == 0
        stored[:] = np.arange(stored.size, dtype=np.uint16).reshape(stored.shape)
        first.store(tokens, [0, 1, 2])
        assert second.load(tokens, [5, 7, 9]) == 32
        assert np.array_equal(loaded[:, :, [5, 7]], stored[:, :, [0, 1]])
        assert not np.delete(loaded, [5, 7], axis=2).any()
    finally:
        for cache in (first, second):
            cache.close()


def test_the_page_of_the_public_interface_lists_every_name_that_is_exported() -> None:
    rows = re.findall(r"^\| `.*", API.read_text(), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(lmcache.__all__)


def test_every_exported_name_is_what_type_checkers_take_it_for() -> None:
    (block,) = (node for node in ast.parse(Path(lmcache.__file__).read_text()).body if isinstance(node, ast.If))
    declared = {
        name.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert sorted(declared) == sorted(lmcache.__all__)
    for name, module in declared.items():
        code = f"import lmcache, {module}; assert lmcache.{name} is {module}.{name}"
        exec(code, {})
        assert name in dir(lmcache)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        lmcache.Nonsense  # noqa: B018


def test_importing_the_package_imports_none_of_its_parts() -> None:
    code = "import sys; before = {*sys.modules}; import lmcache; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["lmcache"]


def test_the_page_names_every_reason_of_a_refusal() -> None:
    section = (DOCS.parent / "SECURITY.md").read_text().split("## Who was refused")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`([^`]+)`", " ".join(rows))) == sorted(get_args(Reason))
    assert [name for name, one in EXPLAINED.items() if f"| {one.remedy} |" not in section] == []


def test_every_metric_and_every_reason_is_explained() -> None:
    page = (DOCS / "observability.md").read_text()
    assert [name for name in HELP if f"`lmcache_{name}`" not in page] == []
    assert [name for name, one in REASONS.items() if f"| `{name}` | {one.meaning} | {one.remedy} |" not in page] == []
    assert set(re.findall(r"`lmcache_([a-z_0-9]+)`", page)) <= set(HELP), "no metric that does not exist"
