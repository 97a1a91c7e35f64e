"""Floor 10: the command line, `lmcache VERB`. Each verb has one file, which imports what it needs only when it runs.

May import every floor below its own.
"""
