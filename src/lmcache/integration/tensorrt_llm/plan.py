"""What the scheduler tells every rank for one step. Plain data: the engine pickles it and broadcasts it."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmcache.engine import Hit


@dataclass(frozen=True)
class LoadPlan:
    """Write tokens [start_token, end_token) of a request from the hit's slots into its blocks, before the forward."""

    job_id: str
    hit: Hit
    chunk_tokens: int
    start_token: int
    end_token: int
    blocks: list[int]


@dataclass(frozen=True)
class StorePlan:
    """Keep the full chunks from `first_chunk` on, once the forward has ended; `parent` is the hash before theirs."""

    job_id: str
    request_id: int
    chunk_tokens: int
    parent: bytes
    hashes: bytes
    first_chunk: int
    blocks: list[int]


@dataclass
class StepPlan:
    """settle: store jobs whose blocks were taken away, to be settled before the step writes to any block. broken: loads that
    the engine counts on could not be planned."""

    loads: list[LoadPlan] = field(default_factory=list)
    stores: list[StorePlan] = field(default_factory=list)
    settle: list[str] = field(default_factory=list)
    broken: bool = False
