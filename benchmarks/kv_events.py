"""What KV events cost vLLM's scheduler, by vLLM's own structs: run it with vLLM's interpreter.

Prints microseconds of CPU time: of a step with nothing to tell, of a lookup of a prompt of 131,072 tokens that finds nothing, of
a step that publishes its first 64 chunks as stored, and of one that publishes them as removed. Blocks have 16 tokens.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from lmcache.chunks import TokenChain, chunk_root
from lmcache.integration.vllm.kv_event_structs import Structs
from lmcache.integration.vllm.kv_events import CHUNKS_OF_STEP, KVEvents

TOKENS, CHUNK, BLOCK, ROUNDS = 131_072, 256, 16, 15


def structs() -> Structs:
    """Those of a model with one kind of KV."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    kv_cache = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=BLOCK, prefix_match_unit=None, enable_prefix_caching=True),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        kv_transfer_config=None,
    )
    return Structs(config, kv_cache, 0, BLOCK)


def microseconds(call: Callable[[], Any]) -> float:
    began = time.process_time()
    call()
    return (time.process_time() - began) * 1e6


def main() -> None:
    made, rounds = structs(), dict[str, list[float]]()
    chain = TokenChain(chunk_root(b"f" * 16), CHUNK)
    tokens = list(range(TOKENS))
    chain.extend(tokens)
    request = SimpleNamespace(
        all_token_ids=tokens,
        block_hashes=[at.to_bytes(32, "big") for at in range(TOKENS // BLOCK)],
        cache_salt=None,
    )
    asked = SimpleNamespace(id="r", chain=chain, hit=None, request=request)
    gc.freeze()
    for _ in range(ROUNDS):
        session: Any = SimpleNamespace(is_told=True, news=deque(), restarts=0, ask_news=lambda: None)
        events = KVEvents(SimpleNamespace(session=session, resets=0), BLOCK, made)  # type: ignore[arg-type]
        found = {"lookup of 512 chunks": microseconds(lambda events=events: events.looked_up(asked))}
        found["step with nothing to tell"] = (
            microseconds(lambda events=events: [events.take() for _ in range(100)]) / 100
        )
        for change in "stored", "removed":
            session.news.append((change, chain.hashes[: 16 * CHUNKS_OF_STEP]))
            found[f"step with {CHUNKS_OF_STEP} chunks {change}"] = microseconds(events.take)
        for name, value in found.items():
            rounds.setdefault(name, []).append(value)
    for name, values in rounds.items():
        print(f"{name}: {statistics.median(values):.1f} us, best {min(values):.1f}")


if __name__ == "__main__":
    main()
