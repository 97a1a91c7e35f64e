"""Block tables from slots that SGLang has on a GPU. Skips where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

from lmcache.engine.points import Both  # noqa: E402
from lmcache.integration.sglang.ranks import block_table  # noqa: E402


def test_a_table_is_filled_behind_what_the_gpu_computes_and_nobody_waits_for_that() -> None:
    pages = np.random.default_rng(1).permutation(500)
    slots = torch.from_numpy((pages[:, None] * 64 + np.arange(64)).reshape(-1)).cuda()
    block_table(slots, 64, 192)  # pinned memory that is new has to wait for the GPU; after that it is used again
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(1 << 30)  # half a second or more
        table, filled = block_table(slots, 64, 192)
        assert filled is not None and not filled.query()
        other = torch.cuda.Event()
        other.record()
        both = Both(filled, other)
        assert not both.query()
        both.synchronize()
    assert both.query()
    assert table.dtype == np.int32 and (table[3:] == pages).all() and len(table) == 503
