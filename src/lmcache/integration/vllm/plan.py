"""The scheduler side's plan of one step for every rank, and the ranks' reports. Plain data: the engine pickles them."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmcache.chunks.passages import Passage
from lmcache.engine import LoadPlan, StorePlan, plans
from lmcache.engine.blending import Blend

NOT_ASKED = -1
"""`StepPlan.asked` of a scheduler whose loads may all fail."""


@dataclass
class BlendPlan:
    """Blend passages into a prompt that waits for it, unscheduled.

    tokens: the prompt. blend: what is blended. local: so many first tokens are in vLLM's own prefix cache. blocks: of the
    request. prefix: the load of what is exact behind these; None for nothing. passages: for each blended passage the complete one
    in the prompt, and the load of its blended tokens, counted from the passage's start; a rank finds a place for them."""

    request_id: str
    tokens: list[int]
    blend: Blend
    local: int
    prefix: LoadPlan | None
    passages: list[tuple[Passage, LoadPlan]]
    blocks: list[int] = field(default_factory=list)

    def filled(self, block_tokens: int) -> list[int]:
        """Return the blocks, of so many tokens each, that are written."""
        return self.blocks[self.local // block_tokens : -(-self.blend.end // block_tokens)]


@dataclass
class PassageStore:
    """Store a passage of a prompt that was computed exactly. plan: counted from the passage's start. blocks: of the request, up
    to the passage's end."""

    plan: StorePlan
    passage: Passage
    blocks: list[int]


@dataclass
class StepPlan(plans.StepPlan):
    """The plan of one step. closing: finished requests whose blocks the engine keeps until their stores have ended.
    forward: whether the step computes anything; if not, ranks may wait for transfers.
    address: the server's address if the ranks cannot know it, else "". known_failures: jobs of failed loads within a forward that
    the scheduler knows of, so that this step computes nothing from them any more.
    weights: number of weight changes that the scheduler knows of. A rank that has seen another number neither loads nor stores.
    emptied: how often vLLM's own prefix cache has been emptied. asked: number of the scheduler's question which arena each rank
    has mapped, and keeps mapped until another number comes. fails_by_request: as for `WorkerSide`, for ranks without one, which
    fail every load. blends, passages: what is blended, and which passages are stored, for one rank that does all of it. given_up:
    requests that have ended while they waited to be blended.
    """

    closing: list[str] = field(default_factory=list)
    forward: bool = False
    address: str = ""
    known_failures: list[str] = field(default_factory=list)
    weights: int = 0
    emptied: int = 0
    asked: int = NOT_ASKED
    fails_by_request: bool = False
    blends: list[BlendPlan] = field(default_factory=list)
    passages: list[PassageStore] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)

    @property
    def filling(self) -> list[LoadPlan | BlendPlan]:
        """The plans of this step that fill blocks."""
        return [*self.loads, *self.blends]


@dataclass
class StepReport:
    """The ranks' report to the scheduler's side: how many ranks have ended each job, and why a rank cannot serve.

    loaded: only loads that a forward waited for; vLLM itself reports the others.
    seconds: how long the copies of loads took on the slowest rank, by job.
    mapped: by rank, `StepPlan.asked` and the epoch whose arena the rank has mapped (b"" for none), if either has changed.
    outdated: by rank, whether its encoder cache may hold what older weights have made of images, if that has changed.
    weights: number of weight changes that a rank has seen, if it differs from the plan's, else 0.
    emptied: the value in the plan of the last step before the change, -1 if the change came before any step.
    blended: by request, how many passages were blended, with how many tokens, and how many of these were computed again.
    no_blending: why this rank blends nothing any more, else "".
    """

    stored: dict[str, int] = field(default_factory=dict)
    loaded: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    mapped: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    outdated: dict[int, bool] = field(default_factory=dict)
    refusal: str = ""
    weights: int = 0
    emptied: int = -1
    blended: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    no_blending: str = ""

    def merge(self, other: StepReport) -> None:
        """Add the report of another rank."""
        for mine, theirs in ((self.stored, other.stored), (self.loaded, other.loaded)):
            for job_id, count in theirs.items():
                mine[job_id] = mine.get(job_id, 0) + count
        for job_id, seconds in other.seconds.items():
            self.seconds[job_id] = max(seconds, self.seconds.get(job_id, 0.0))
        self.mapped |= other.mapped
        self.outdated |= other.outdated
        self.blended |= other.blended
        self.no_blending = self.no_blending or other.no_blending
        self.refusal = self.refusal or other.refusal
        self.weights, self.emptied = max(self.weights, other.weights), max(self.emptied, other.emptied)

    def __bool__(self) -> bool:
        jobs = self.stored or self.loaded or self.seconds
        blending = self.blended or self.no_blending
        return bool(jobs or self.mapped or self.outdated or self.refusal or self.weights or blending)
