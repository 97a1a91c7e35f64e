"""Floor 7: what all engine integrations share, free of any engine's types.

`Requests` serves a scheduler's requests and `Copies` a rank's copies; both rest on sessions with the server, jobs and deadlines.
No error reaches the engine, and no call exceeds its deadline: a failure becomes a miss, counted and logged once. This package may
import every floor below."""

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
