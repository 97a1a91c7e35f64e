"""Say how vLLM's own configurations are digested: `python digests.py '[{"model": ..., ...}, ...]'`, in vLLM's environment.

Each one is the keyword arguments of `EngineArgs`. The answer, on the last line, is the list of digests, and the names of those
methods of a worker that have to do with weights and are not watched.
"""

from __future__ import annotations

import json
import sys

from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker.gpu_worker import Worker

from lmcache.integration.vllm.identity import config_digest
from lmcache.integration.vllm.weights import watch_weights

configs = [EngineArgs(**arguments).create_engine_config() for arguments in json.loads(sys.argv[1])]
watch_weights(configs[0])
names = [name for name in dir(Worker) if "weight" in name and not name.startswith("_")]
unwatched = [name for name in names if not hasattr(getattr(Worker, name), "tells_lmcache")]
print(json.dumps({"digests": [config_digest(config) for config in configs], "unwatched": unwatched}))
