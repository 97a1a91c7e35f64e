"""The scheduler's half for TensorRT-LLM, without a server. What it does with one is in tests/tensorrt_llm."""

from __future__ import annotations

import enum
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import engine_process
from lmcache.chunks import TokenChain
from lmcache.errors import LayoutError
from lmcache.integration.tensorrt_llm.model import MODEL_ID_VARIABLE, describe_pool
from lmcache.integration.tensorrt_llm.scheduler import SchedulerSide, Tracker
from lmcache.integration.tensorrt_llm.worker import WorkerSide
from servers import eventually


class Session:
    """Knows nothing of any prompt, and keeps what it was asked."""

    epoch = b"epoch"

    chunk_tokens = 16

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.now = 0.0
        self.runtime = SimpleNamespace(now=lambda: self.now)

    def new_chain(self, *salts: Any, **more: Any) -> TokenChain:
        return TokenChain(bytes(16), 16)

    def lookup(self, chain: TokenChain, skip_tokens: int, prefill_rate: float, **more: Any) -> None:
        self.rates.append(prefill_rate)


class Request(SimpleNamespace):
    def get_tokens(self, beam: int) -> list[int]:
        return list(range(100))


def test_how_fast_prompts_were_computed_is_told() -> None:
    """A load from a tier is judged by it."""
    session = Session()
    watch = SimpleNamespace(all_have=lambda epoch: True)
    half = SchedulerSide(session, watch, 16)  # type: ignore[arg-type]
    half.match(Request(request_id=1), 0)
    for seconds, new, cached in ((0.0, 600, 400), (0.5, 0, 8), (9.0, 0, 400), (0.8, 1, 0)):
        session.now += seconds
        step = [[SimpleNamespace(request_id=9, num_scheduled_tokens=tokens)] * bool(tokens) for tokens in (new, cached)]
        half.plan_step(SimpleNamespace(new_requests=step[0], cached_requests=step[1]))
    half.match(Request(request_id=2), 0)
    assert session.rates == [0.0, pytest.approx(2000 - 0.05 * (2000 - 500))], "decodes and pauses count little"


class Engine:
    """The scheduler and one rank of the engine, whose steps run one request after the other."""

    def __init__(self, one: engine_process.Engine) -> None:
        self.one, self.told = one, list[bytes]()
        assert one.scheduler is not None
        watch = SimpleNamespace(all_have=lambda arena: bool(arena))
        self.half = SchedulerSide(one.scheduler, watch, one.block_tokens)  # type: ignore[arg-type]
        reporter = SimpleNamespace(tell=self.told.append)
        self.worker = WorkerSide(one.worker, reporter, 0)  # type: ignore[arg-type]

    def run(self, number: int, tokens: list[int], position: int, blocks: list[int] | None = None) -> bool:
        """A step that computes the tokens from `position` on, behind what is loaded; whether all loads worked."""
        data = SimpleNamespace(
            request_id=number,
            new_tokens=tokens,
            new_block_ids=blocks or self.one.table(len(tokens)),
            computed_position=position,
            num_scheduled_tokens=len(tokens) - position,
        )
        plan = pickle.loads(pickle.dumps(self.half.plan_step(SimpleNamespace(new_requests=[data], cached_requests=[]))))
        ok = self.worker.load(plan, None)
        self.half.loaded()
        self.loaded = [(load.start_token, load.end_token) for load in plan.loads]
        if not plan.loads:
            self.one.fill(tokens)
        self.worker.start_stores(plan, None)
        return ok


def test_what_a_request_computed_the_next_one_loads_up_to_a_block(server: Any, engine: Any) -> None:
    one = engine(server(chunk=20))
    drive, tokens = Engine(one), [number % 500 for number in range(100)]
    first, second = (Request(request_id=number, get_tokens=lambda beam: tokens) for number in (1, 2))
    assert drive.half.match(first, 0) == 0 and drive.run(1, tokens, 0)
    ended = [1] if drive.half.finished(first) else []
    assert ended, "the engine keeps the blocks until its ranks have stored them"
    eventually(lambda: drive.worker.finished(ended) == [1])
    one.poison()
    assert drive.half.match(second, 16) == 96 - 16, "all is there, the last token is computed, and blocks are of 16"
    assert drive.half.owes and one.scheduler._held
    drive.half.cancelled(second, 64)
    assert drive.run(2, tokens, 64) and drive.loaded == [(16, 64)] and one.right(tokens, 16, 64)
    assert not one.scheduler._held and not drive.half.owes and drive.told[-1] == one.worker.mapped_epoch
    assert not drive.half.finished(second), "all that it computed was there"


def test_nothing_is_stored_from_a_block_on_that_does_not_exist(server: Any, engine: Any) -> None:
    one = engine(server(chunk=20))
    drive, tokens = Engine(one), [number % 500 for number in range(100)]
    first, second = (Request(request_id=number, get_tokens=lambda beam: tokens) for number in (1, 2))
    blocks = one.table(100)
    blocks[3] = -1
    assert drive.half.match(first, 0) == 0 and drive.run(1, tokens, 0, blocks)
    assert drive.half.requests.open[1].stored == 2, "the blocks of 48 tokens are there, which are two chunks and a part"
    ended = [1] if drive.half.finished(first) else []
    eventually(lambda: drive.worker.finished(ended) == ended)
    assert drive.half.match(second, 0) == 32 and not one.worker.counters["failed_stores"]


def test_a_plan_that_goes_wrong_forgets_neither_loads_nor_stores_to_be_settled(server: Any, engine: Any) -> None:
    """The engine takes the blocks of a load that no rank was told of for filled, and gives away those of a paused request."""
    one = engine(server(chunk=20))
    drive, tokens = Engine(one), [number % 500 for number in range(100)]
    paused, loads = (Request(request_id=number, get_tokens=lambda beam: tokens) for number in (1, 2))
    assert drive.half.match(paused, 0) == 0 and drive.run(1, tokens, 0)
    assert drive.worker.copies.wait(drive.worker.copies.running(), engine_process.PATIENCE)
    jobs = drive.half.reset(paused)
    assert jobs and drive.half.match(loads, 0) == 96
    drive.half.requests.open[3] = Tracker(3)
    new = {"new_block_ids": one.table(100), "computed_position": 0, "num_scheduled_tokens": 100}
    step = [SimpleNamespace(request_id=number, new_tokens=ids, **new) for number, ids in ((2, tokens), (3, [-1] * 100))]
    with pytest.raises(OverflowError):
        drive.half.plan_step(SimpleNamespace(new_requests=step, cached_requests=[]))
    assert drive.half.owes and drive.half.settle == jobs
    drive.half.loaded()
    assert not drive.half.owes and not one.scheduler._held


class LoadFormat(enum.Enum):
    AUTO = 0
    DUMMY = 1


class Pool:
    """Of 5 blocks, 2 layers, K and V, 4 heads of 8 tokens of 16 elements, with the part of torch's face that we use."""

    dtype, device = "torch.bfloat16", "cuda:0"

    def __init__(self, array: np.ndarray[Any, Any] | None = None) -> None:
        self.array = np.zeros((5, 2, 2, 4 * 8 * 16), dtype=np.uint16) if array is None else array
        self.shape = self.array.shape

    def element_size(self) -> int:
        return self.array.itemsize

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)

    def unflatten(self, axis: int, sizes: tuple[int, ...]) -> Pool:
        return Pool(self.array.reshape(*self.shape[:axis], *sizes))

    def __getitem__(self, index: Any) -> Pool:
        return Pool(self.array[index])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    text = {"num_attention_heads": 4, "hidden_size": 64, "rope_theta": 1e6}
    (tmp_path / "config.json").write_text(json.dumps(text))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def fingerprint(model: Path, **arguments: Any) -> bytes:
    return describe_pool(SimpleNamespace(model=str(model), **arguments), Pool(), 0).layout(16).fingerprint


def test_kv_that_may_be_rounded_has_a_name_of_its_own(model: Path) -> None:
    lossy = describe_pool(SimpleNamespace(model=str(model)), Pool(), 0, "int8").layout(16)
    assert lossy.fingerprint != fingerprint(model) and lossy.lossy_kv == "int8"


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": "float16"},
        {"quant_config": {"quant_algo": "FP8"}},
        {"model_kwargs": {"rope_theta": 1e4}},
        {"speculative_config": {"decoding_type": "Eagle"}},
        {"sparse_attention_config": {"algorithm": "rocket"}},
        {"checkpoint_format": "mistral"},
    ],
)
def test_whatever_changes_the_numbers_changes_the_layout(model: Path, arguments: dict[str, Any]) -> None:
    plain = fingerprint(model)
    assert fingerprint(model, load_format=LoadFormat.AUTO, tokenizer="any", max_batch_size=3) == plain
    assert fingerprint(model, **arguments) != plain
    (model / "model.safetensors").write_bytes(b"others")
    assert fingerprint(model) != plain


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"load_format": LoadFormat.DUMMY}, "load_format LoadFormat.DUMMY"),
        ({"load_format": "dummy"}, "load_format dummy"),
        ({"checkpoint_loader": object()}, "checkpoint_loader"),
    ],
)
def test_weights_that_are_not_the_files_need_a_name(
    model: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], why: str
) -> None:
    with pytest.raises(LayoutError, match=rf"{why} .*set {MODEL_ID_VARIABLE} to a name of yours"):
        fingerprint(model, **arguments)
    monkeypatch.setenv(MODEL_ID_VARIABLE, "mine")
    assert fingerprint(model, **arguments)
