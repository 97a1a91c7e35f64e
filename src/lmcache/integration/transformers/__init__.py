"""LMCache for Hugging Face Transformers: `attach(model)`, and `model.generate` keeps its KV in LMCache and finds it there.

`attach.py` contains all calls to the cache, and is the shortest example of an integration; `pool.py` is the memory that KV is
loaded into and computed in, behind the Cache interface of Transformers; `model.py` says what a model's KV looks like and which
models are refused. May import `lmcache.engine` and the floors below, and torch and transformers.
"""

from lmcache.integration.transformers.attach import Attached, attach

__all__ = ["Attached", "attach"]
