"""What the scheduler tells every rank for one step. Plain data: the engine pickles it and broadcasts it."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmcache.engine import LoadPlan, StorePlan


@dataclass
class StepPlan:
    """settle: store jobs whose blocks were taken away, to be settled before the step writes to any block. broken: loads that
    the engine counts on could not be planned."""

    loads: list[LoadPlan] = field(default_factory=list)
    stores: list[StorePlan] = field(default_factory=list)
    settle: list[str] = field(default_factory=list)
    broken: bool = False
