"""Why tokens were not found: every reason, what it means, and what to do about it.

The same texts stand in /requests and in `lmcache why`, and docs/observability.md explains each reason.
"""

from __future__ import annotations

from typing import NamedTuple


class Reason(NamedTuple):
    """What a reason means, and what to do about it. Both are complete sentences for people."""

    meaning: str
    remedy: str


REASONS: dict[str, Reason] = {
    "never_seen": Reason(
        "No prompt that begins like this has been stored since the server started.",
        "Nothing is wrong if the prompts are new. If you sent the same prompt before, compare the first tokens: a time, a name "
        "or an id at the start of a prompt makes each prompt a new one.",
    ),
    "differs": Reason(
        "Another prompt with the same beginning was stored, and this one differs from it in the named tokens.",
        "Move what changes from prompt to prompt (times, ids, the order of documents or tools) behind what they share.",
    ),
    "longer": Reason(
        "The prompt goes on where every prompt with the same beginning that was stored had ended.",
        "Nothing: this is the new part of a conversation.",
    ),
    "evicted": Reason(
        "The chunks were stored, and evicted from L1 when others needed memory. No tier gave them back.",
        "Give L1 more memory (--l1-size-gb), or add a tier behind it (--l2 disk:///var/lib/lmcache?max_gb=200).",
    ),
    "cleared": Reason(
        "The chunks were stored, and removed when the cache was cleared.",
        "Find out who calls `lmcache clear` or POST /clear-cache, or resets the prefix caches of an engine.",
    ),
    "not_stored": Reason(
        "The chunks were computed before, but the copy into L1 got no memory, came too late or failed.",
        "Look at lmcache_refused_chunks_by_reason_total and lmcache_dropped_chunks_by_reason_total: `no room` and `quarantine` "
        "need a larger --l1-size-gb, `too late` a longer --lease-seconds; `copy failed` is explained in the engine's log.",
    ),
    "being_written": Reason(
        "Another request was computing or storing the same chunks, and they were not complete yet.",
        "Nothing, if prompts with one beginning arrive together once in a while. Otherwise send the first one a little earlier.",
    ),
    "incomplete": Reason(
        "Some ranks of the engine had not stored their parts of the chunks.",
        "Look in the logs of all ranks for stores that failed; lmcache_failed_stores_total counts them.",
    ),
    "other_groups": Reason(
        "The chunks are there for some kinds of the model's layers only (windows or states are missing).",
        "Give L1 more memory (--l1-size-gb). Of windows and states only those at the ends of prompts are kept for long.",
    ),
    "no_lease": Reason(
        "The engine holds too many hits that it has not loaded or given back, or too much memory in quarantine.",
        "Look at lmcache_leases and lmcache_quarantined_bytes; restart an engine whose copies hang.",
    ),
    "tier_not_worth": Reason(
        "A tier has the chunks, but loading them was expected to take longer than computing them.",
        "Nothing, if both times are right. `--worth always` loads all the same; a faster store or a nearer one makes loads pay.",
    ),
    "tier_slow": Reason(
        "A tier did not answer or deliver in the time in which the engine computes the chunks.",
        "Look at the tier with `lmcache describe tiers`; --l2-patience-seconds is the longest wait.",
    ),
    "tier_down": Reason(
        "The chunks were evicted from L1, and a tier that may have them did not serve or failed.",
        "`lmcache describe tiers` and `lmcache doctor` say what is wrong with the tier.",
    ),
    "tier_removed": Reason(
        "The chunks were evicted from L1, and a tier that may have them was removed while the lookup waited for it.",
        "Nothing: an operator has removed the tier (`lmcache tier remove`, or SIGHUP with another configuration).",
    ),
    "tier_paused": Reason(
        "The chunks were evicted from L1, and a tier that may have them is paused.",
        "`lmcache tier resume NAME`, once the work on the store is done.",
    ),
    "tier_busy": Reason(
        "Too many lookups were waiting for tiers at the same time.",
        "Use fewer requests at a time, or a faster tier.",
    ),
    "damaged": Reason(
        "A tier delivered chunks whose checksum, size, name or codec was wrong. They were not used, and removed from the tier.",
        "Check the disk or the network of the tier, and whether something else writes into its folder or bucket.",
    ),
    "awaited_in_vain": Reason(
        "Another engine was expected to store the chunks, and did not do so in time.",
        "Look at the log of the other engine: it has failed, has been stopped, or is slower than this one.",
    ),
    "other_identity": Reason(
        "The same tokens are stored, but under another model, KV layout, cache_salt or LoRA adapter.",
        "Compare the engines in `lmcache describe status`. Requests share KV only if all of these are equal.",
    ),
    "below_chunk": Reason(
        "The tokens are the rest of a prompt that does not fill a chunk.",
        "Nothing, unless prompts are short: a smaller --chunk-size stores more of them.",
    ),
    "not_asked": Reason(
        "The engine did not ask for these chunks: one lookup names only so many, and models with windows compute the last chunk.",
        "Nothing.",
    ),
    "not_found": Reason(
        "The chunks were not in L1. With --records-mb 0 the server does not remember why.",
        "Start the server with --records-mb 64 to learn the reason.",
    ),
}
"""Reason, as in `lmcache_missed_tokens_total{reason=...}` -> what it means, and what to do."""

SOURCES = "engine", "l1", "other_engine"
"""Where tokens that were found came from, beside the names of tiers: what the engine had itself, L1, or another engine that was
waited for."""
