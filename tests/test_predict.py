"""The live estimate: what it says of a workload is what other sizes of L1 really find."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest

from lmcache.cli.main import main
from lmcache.compiled import native
from lmcache.sizing.curve import FACTORS, SAMPLED_CHUNKS, Curve, Estimate
from servers import Raw, Server, eventually
from test_replay import prompts, use


def conversations(seed: int, requests: int) -> list[bytes]:
    """Prompts that begin with one system prompt of three chunks, of conversations that go on for a while."""
    dice, system = random.Random(seed), random.Random(0).randbytes(48)
    going, made = list[bytes](), list[bytes]()
    for _ in range(requests):
        old = going.pop(dice.randrange(len(going))) if going and dice.random() < 0.6 else system
        made.append(old + dice.randbytes(16 * dice.randint(1, 30)))
        if dice.random() < 0.8:
            going.append(made[-1])
    return made


def keys_of(prompt: bytes) -> list[bytes]:
    return [prompt[at : at + 16] for at in range(0, len(prompt), 16)]


def found_by_lru(asked: list[bytes], capacity: int) -> list[int]:
    """How many chunks of each prompt an LRU of so many chunks finds, if all are stored at once."""
    order, found = OrderedDict[bytes, None](), []
    for prompt in asked:
        keys = keys_of(prompt)
        found.append(next((at for at, key in enumerate(keys) if key not in order), len(keys)))
        for key in reversed(keys):
            order[key] = None
            order.move_to_end(key)
        while len(order) > capacity:
            order.popitem(last=False)
    return found


def estimated(asked: list[bytes], capacity: int, by_found: bool = True) -> Estimate:
    curve = Curve(capacity, by_found)
    for prompt, found in zip(asked, found_by_lru(asked, capacity), strict=True):
        curve.looked_up(prompt, found, 1)
        curve.stored(prompt[16 * found :], 1)
    assert curve.memory_bytes() < 8 << 20
    estimate = curve.estimate()
    assert estimate is not None
    return estimate


def true_ratios(asked: list[bytes], capacity: int) -> list[float]:
    total = sum(len(one) // 16 for one in asked)
    return [sum(found_by_lru(asked, int(capacity * factor))) / total for factor in FACTORS]


def test_a_small_memory_is_counted_exactly() -> None:
    """Where all chunks fit into the sample, nothing is estimated."""
    asked = conversations(1, 300)
    estimate, truth = estimated(asked, 400), true_ratios(asked, 400)
    assert estimate.rate == 1.0 and truth[0] < truth[3] < truth[-1]
    assert [one.ratio for one in estimate.sizes] == pytest.approx(truth, abs=1e-9)
    assert [one.ratio for one in estimated(asked, 400, by_found=False).sizes] == pytest.approx(truth, abs=1e-9)
    assert estimate.unlimited.ratio == pytest.approx(true_ratios(asked, 1 << 30)[0], abs=0.01)


@pytest.mark.parametrize("by_found", [True, False])
def test_a_sample_tells_the_truth_within_its_interval(by_found: bool) -> None:
    asked, capacity = conversations(2, 6000), 8000
    estimate, truth = estimated(asked, capacity, by_found), true_ratios(asked, capacity)
    assert estimate.rate < 0.5 and SAMPLED_CHUNKS // 3 < estimate.sampled_chunks <= SAMPLED_CHUNKS
    assert truth[-1] - truth[0] > 0.2, "the sizes make a difference"
    for point, true in zip(estimate.sizes, truth, strict=True):
        assert point.low - 1e-9 <= true <= point.high + 1e-9
        assert abs(point.ratio - true) < (0.01 if by_found else 0.03)
    assert estimate.unlimited.low <= true_ratios(asked, 1 << 40)[0] <= estimate.unlimited.high


def test_what_is_looked_up_and_never_stored_is_not_found() -> None:
    curve, prompt = Curve(1000, by_found=False), random.Random(3).randbytes(16 * 10)
    for _ in range(3):
        curve.looked_up(prompt, 0, 1)
    estimate = curve.estimate()
    assert estimate is not None and all(one.ratio == 0 for one in estimate.sizes)
    curve.stored(prompt, 1)
    curve.looked_up(prompt, 10, 1)
    curve.clear()
    curve.looked_up(prompt, 0, 1)
    estimate = curve.estimate()
    assert estimate is not None and [one.ratio for one in estimate.sizes] == [10 / 50] * 7


def test_a_sample_takes_only_what_it_can_use() -> None:
    for wrong in ((1, [1.0]), (100, []), (100, [2.0, 1.0]), (100, [0.0])):
        with pytest.raises(ValueError):
            native.Sample(*wrong)
    sample = native.Sample(100, [1.0])
    with pytest.raises(ValueError):
        sample.looked_up(b"x", 0, 1.0)
    with pytest.raises(ValueError):
        sample.stored(bytes(16), 0.0)


def test_a_server_estimates_its_own_curve(server: Callable[..., Server], capsys: pytest.CaptureFixture[str]) -> None:
    cache = server(l1=4, chunk=16)
    url = f"http://127.0.0.1:{cache.http_port}"
    assert main(["predict", "--url", url]) == 0 and "no lookup yet" in capsys.readouterr().out
    chunks = (4 << 20) // (64 << 10)
    engine, asked = Raw(cache, shard_bytes=64 << 10), prompts(1, 300)
    found = [use(engine, one) for one in asked]
    assert found == found_by_lru(asked, chunks), "the server's order is LRU"
    total = sum(len(one) // 16 for one in asked)

    def told() -> Any:
        assert main(["predict", "--url", url, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        return answer if answer.get("asked_tokens") == 16 * total else None

    answer = eventually(told)
    ratios = [one["token_hit_ratio"] for one in answer["sizes"]]
    assert ratios == pytest.approx(true_ratios(asked, chunks), abs=1e-6)
    assert ratios[2] == pytest.approx(sum(found) / total, abs=1e-6)
    assert answer["sizes"][3]["l1_bytes"] == 8 << 20 and answer["lost_events"] == 0
    counters = cache.counters()
    assert counters['predicted_token_hit_ratio{times_l1="2"}'] == pytest.approx(ratios[3], abs=1e-6)
    assert main(["predict", "--url", url]) == 0 and f"{ratios[3]:.2%}" in capsys.readouterr().out
    engine.close()


def test_a_server_that_makes_no_estimate_says_so(
    server: Callable[..., Server], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = server(l1=4, chunk=16, flags=("--predict", "off"))
    assert main(["predict", "--url", f"http://127.0.0.1:{cache.http_port}"]) == 1
    assert "start it with --predict on" in capsys.readouterr().err
