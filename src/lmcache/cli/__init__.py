"""Floor 9: the command line, `lmcache VERB`. One file a verb; each imports what it needs only when it runs.

May import every floor below its own.
"""
