"""What the scheduler's side asks of every rank for one step, and what ranks report. Plain data: the engine pickles it."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmcache.engine import plans


@dataclass
class StepPlan(plans.StepPlan):
    """closing: finished requests whose blocks the engine keeps until their stores are done.
    forward: the step computes something, so nobody waits for transfers alone.
    address: of the server, where the ranks cannot know it by themselves. known_failures: failed loads within a forward that the
    scheduler has come to know of, so that this step computes nothing from them any more.
    weights: how many changes of the weights the scheduler knows of. A rank that has seen another number neither loads nor stores.
    emptied: how often vLLM's own prefix cache has been emptied.
    """

    closing: list[str] = field(default_factory=list)
    forward: bool = False
    address: str = ""
    known_failures: list[str] = field(default_factory=list)
    weights: int = 0
    emptied: int = 0


@dataclass
class StepReport:
    """What ranks report to the scheduler's side: by how many of them each job was ended, and why one cannot serve.

    loaded: only loads that a forward waited for; vLLM itself reports the others.
    weights: how many changes of its weights a rank has seen, where the step's plan knew of another number.
    emptied: what the plan said of the last step before the change, -1 where it was before any.
    """

    stored: dict[str, int] = field(default_factory=dict)
    loaded: dict[str, int] = field(default_factory=dict)
    refusal: str = ""
    weights: int = 0
    emptied: int = -1

    def merge(self, other: StepReport) -> None:
        """Add the report of another rank."""
        for mine, theirs in ((self.stored, other.stored), (self.loaded, other.loaded)):
            for job_id, count in theirs.items():
                mine[job_id] = mine.get(job_id, 0) + count
        self.refusal = self.refusal or other.refusal
        self.weights, self.emptied = max(self.weights, other.weights), max(self.emptied, other.emptied)

    def __bool__(self) -> bool:
        return bool(self.stored or self.loaded or self.refusal or self.weights)
