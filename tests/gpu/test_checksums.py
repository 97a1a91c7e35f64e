"""The checksum of weights on a GPU: that of the same bytes on a CPU, and another one in every other order of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

from lmcache.engine.tensors import checksum  # noqa: E402

MIB = 1 << 20


def random_bytes(count: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(count)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device="cuda", generator=generator)


@pytest.mark.parametrize("count", [0, 1, 4 * 4096 - 1, 4 * 4096, 3 * MIB + 5, 100 * MIB + 12345])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_the_same_bytes_have_the_same_checksum(count: int, offset: int) -> None:
    data = random_bytes(count + offset)[offset:]
    assert int(checksum(data)) == int(checksum(data.cpu()))


def swap(first: int, second: int, size: int) -> Callable[[torch.Tensor], None]:
    def exchange(data: torch.Tensor) -> None:
        kept = data[first : first + size].clone()
        data[first : first + size] = data[second : second + size]
        data[second : second + size] = kept

    return exchange


def flip_sign(data: torch.Tensor) -> None:
    data[4 * 12345 + 3] ^= 128


@pytest.mark.parametrize(
    "change",
    [
        *(swap(0, size, size) for size in (1, 2, 4, 8, 512, 4096, 16384, MIB, 32 * MIB)),
        swap(8, 96 * MIB, 8),
        swap(100 * MIB, 100 * MIB + 1, 1),
        flip_sign,
    ],
)
def test_another_order_has_another_checksum(change: Callable[[torch.Tensor], None]) -> None:
    data = random_bytes(100 * MIB + 12345)
    data[:8] = torch.arange(8, dtype=torch.uint8)
    data[-12345:] = torch.arange(12345, device="cuda").to(torch.uint8)
    before = int(checksum(data))
    change(data)
    assert int(checksum(data)) != before


def test_two_words_that_differ_only_in_their_signs_change_places() -> None:
    data = random_bytes(64 * MIB)
    for at in range(0, 4096, 64):
        data[at : at + 8] = torch.tensor([0, 0, 64, 64, 0, 0, 64, 192], dtype=torch.uint8)
        before = int(checksum(data))
        swap(at, at + 4, 4)(data)
        assert int(checksum(data)) != before


def test_weights_are_weighed_in_pieces() -> None:
    """So that a large tensor needs no other of its size."""
    data = random_bytes(1024 * MIB)
    checksum(data)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    checksum(data)
    assert torch.cuda.max_memory_allocated() - before < 200 * MIB
