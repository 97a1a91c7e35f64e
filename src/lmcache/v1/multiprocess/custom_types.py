"""Types in which vLLM's own connector reports block allocations. LMCache ignores the reports, but vLLM imports the types."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RequestAllocationRecord:
    """Blocks newly allocated to a request, and the ids of the tokens that they will hold."""

    req_id: str
    new_block_ids: list[int]
    new_token_ids: list[int]


BlockAllocationRecord = RequestAllocationRecord
