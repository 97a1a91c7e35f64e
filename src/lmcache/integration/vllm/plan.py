"""The scheduler side's plan of one step for every rank, and the ranks' reports. Plain data: the engine pickles them."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmcache.engine import plans

NOT_ASKED = -1
"""`StepPlan.asked` of a scheduler whose loads may all fail."""


@dataclass
class StepPlan(plans.StepPlan):
    """The plan of one step. closing: finished requests whose blocks the engine keeps until their stores have ended.
    forward: whether the step computes anything; if not, ranks may wait for transfers.
    address: the server's address if the ranks cannot know it, else "". known_failures: jobs of failed loads within a forward that
    the scheduler knows of, so that this step computes nothing from them any more.
    weights: number of weight changes that the scheduler knows of. A rank that has seen another number neither loads nor stores.
    emptied: how often vLLM's own prefix cache has been emptied. asked: number of the scheduler's question which arena each rank
    has mapped, and keeps mapped until another number comes. fails_by_request: as for `WorkerSide`, for ranks without one, which
    fail every load.
    """

    closing: list[str] = field(default_factory=list)
    forward: bool = False
    address: str = ""
    known_failures: list[str] = field(default_factory=list)
    weights: int = 0
    emptied: int = 0
    asked: int = NOT_ASKED
    fails_by_request: bool = False


@dataclass
class StepReport:
    """The ranks' report to the scheduler's side: how many ranks have ended each job, and why a rank cannot serve.

    loaded: only loads that a forward waited for; vLLM itself reports the others.
    seconds: how long the copies of loads took on the slowest rank, by job.
    mapped: by rank, `StepPlan.asked` and the epoch whose arena the rank has mapped (b"" for none), if either has changed.
    outdated: by rank, whether its encoder cache may hold what older weights have made of images, if that has changed.
    weights: number of weight changes that a rank has seen, if it differs from the plan's, else 0.
    emptied: the value in the plan of the last step before the change, -1 if the change came before any step.
    """

    stored: dict[str, int] = field(default_factory=dict)
    loaded: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    mapped: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    outdated: dict[int, bool] = field(default_factory=dict)
    refusal: str = ""
    weights: int = 0
    emptied: int = -1

    def merge(self, other: StepReport) -> None:
        """Add the report of another rank."""
        for mine, theirs in ((self.stored, other.stored), (self.loaded, other.loaded)):
            for job_id, count in theirs.items():
                mine[job_id] = mine.get(job_id, 0) + count
        for job_id, seconds in other.seconds.items():
            self.seconds[job_id] = max(seconds, self.seconds.get(job_id, 0.0))
        self.mapped |= other.mapped
        self.outdated |= other.outdated
        self.refusal = self.refusal or other.refusal
        self.weights, self.emptied = max(self.weights, other.weights), max(self.emptied, other.emptied)

    def __bool__(self) -> bool:
        jobs = self.stored or self.loaded or self.seconds
        return bool(jobs or self.mapped or self.outdated or self.refusal or self.weights)
