"""Floor 7: the engine's side, free of any engine's types. Sessions with the server, lookups, load and store jobs, deadlines.

Nothing here raises into an engine's path and nothing takes longer than its deadline: trouble becomes a miss, counted and logged
once. May import every floor below.
"""

from lmcache.engine.jobs import Done, Load, Store
from lmcache.engine.scheduler import Hit, Loading, SchedulerSession
from lmcache.engine.worker import WorkerSession

__all__ = ["Done", "Hit", "Load", "Loading", "SchedulerSession", "Store", "WorkerSession"]
