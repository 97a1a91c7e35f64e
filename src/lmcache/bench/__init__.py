"""Floor 10: `lmcache bench`, which measures from the engine's side what a cache server gives an engine of this host.

`engine` is a NumPy stand-in for an engine over the real sessions, `samples` summarizes measured times, `main` is the command.
May import: every floor below. No torch. The comparison with other systems is in the project's `benchmarks/`, built on this.
"""
