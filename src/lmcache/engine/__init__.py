"""Floor 7: the engine's side, free of any engine's types: what all engines do alike for their requests (`Requests`) and on their
ranks (`Copies`), and below that the sessions with the server, their jobs and deadlines.

Nothing here raises into an engine's path and nothing takes longer than its deadline: trouble becomes a miss, counted and logged
once. May import every floor below.
"""

from lmcache.engine.copies import Copies, Copy
from lmcache.engine.jobs import Done, Load, Store
from lmcache.engine.plans import LoadPlan, StorePlan
from lmcache.engine.requests import Request, Requests
from lmcache.engine.scheduler import Hit, Loading, SchedulerSession
from lmcache.engine.worker import WorkerSession

__all__ = [
    "Copies",
    "Copy",
    "Done",
    "Hit",
    "Load",
    "LoadPlan",
    "Loading",
    "Request",
    "Requests",
    "SchedulerSession",
    "Store",
    "StorePlan",
    "WorkerSession",
]
