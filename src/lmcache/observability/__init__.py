"""Floor 0: logging. Metrics are not here; the server's HTTP endpoint reads them from the server's counters.

May import nothing else of this package.
"""
