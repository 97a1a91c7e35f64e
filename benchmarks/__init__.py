"""Benchmarks of the project: every figure beside the machine's own limit and, where asked, beside LMCache 0.5.6, in one run.

`run` is the command; `scenarios` holds the timed loops, which see a cache only through the few calls that `worker` makes
of ours (`lmcache.bench.engine`) or of the peer's classes (`peer`), each in a process of its own. `limits` measures what the
machine can do at all. What a user runs against his own server is `lmcache bench`, in the package.

Files that run under the peer's Python (`worker`, `scenarios`, `peer`) import the standard library and NumPy only.
"""
