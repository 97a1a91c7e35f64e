"""Floor 0: how LMCache tells what it does. Logging here; metrics are read from the server's counters by its HTTP face.

May import nothing else of ours.
"""
