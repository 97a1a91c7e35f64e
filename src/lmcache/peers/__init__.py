"""Floor 8: other servers as a tier. This server pulls from their L1 what its own engines look up.

To the other server, this one is an engine with payload frames that only reads. May import: `engine` (the hello), `wire`, `tiers`
and what is below them.
"""
