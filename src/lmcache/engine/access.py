"""A rank's access to the arena of one server, until another server takes over or this one has ended for good."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from lmcache.engine.runtime import Runtime
from lmcache.memory.arena import Mapping, populate_all
from lmcache.transfer.copier import Copier
from lmcache.wire import messages as m


class ArenaAccess:
    """The copiers of a rank's groups, and the mapping of the arena, which is None with payload frames: the server then gave no
    descriptor."""

    def __init__(self, copiers: Sequence[Copier], welcome: m.Welcome, descriptor: int, runtime: Runtime) -> None:
        self.copiers = copiers
        self.mapping = Mapping(descriptor, welcome.arena_bytes) if descriptor >= 0 else None
        if self.mapping is None:
            return
        # Fill this process's page table ahead of use: a store into populated memory runs at twice the speed.
        mapping, self._stop = self.mapping, threading.Event()
        self._populating = runtime.start(lambda: populate_all(mapping, self._stop), "lmcache-map")
        copiers[0].adopt(self.mapping.address, self.mapping.size_bytes)

    def close(self) -> None:
        """Unmap the arena. The caller ensures that no copy runs any more."""
        for copier in self.copiers:
            copier.close()
        if self.mapping is not None:
            self._stop.set()
            self._populating.join()
            self.mapping.close()
