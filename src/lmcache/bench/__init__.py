"""Floor 9: `lmcache bench`, what a cache server gives an engine of this host, measured from the engine's side.

`engine` is a NumPy stand-in for an engine over the real sessions, `samples` turns times into figures, `main` is the command.
May import: every floor below. No torch. The comparison with other systems is in the project's `benchmarks/`, built on this.
"""
