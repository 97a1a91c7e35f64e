"""What vLLM's own connector reports about the blocks it gave out. We need none of it, so these only have to exist."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RequestAllocationRecord:
    """Blocks newly given to a request, and the tokens they will hold."""

    req_id: str
    new_block_ids: list[int]
    new_token_ids: list[int]


BlockAllocationRecord = RequestAllocationRecord
