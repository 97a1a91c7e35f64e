"""Why something was not stored, not loaded or not waited for: every value of the label `reason` but those of lookups.

`cache.reasons` explains the reasons of lookups, `server.refused` those of refused engines. The reference of the documentation is
made from these tables, and tests/test_reference.py looks in the code for reasons that they lack.
"""

from __future__ import annotations

from lmcache.cache.reasons import Reason

_NO_ROOM = "Give L1 more memory (--l1-size-gb), or run fewer requests at a time."
_RANK_LOG = "Look in the log of the engine's rank: it names the error of the copy."

DROPPED: dict[str, Reason] = {
    "too late": Reason(
        "The copy had not ended --lease-seconds after the memory was granted.",
        "Find out what holds up the engine's copies (a stopped process, a busy GPU), or raise --lease-seconds.",
    ),
    "copy failed": Reason("The engine reported that it had not filled the memory.", _RANK_LOG),
    "cleared": Reason("The cache was cleared while the copy ran.", "Nothing."),
    "owner died": Reason("The process that was filling the memory has ended.", "Look in the log of that engine."),
    "connection lost": Reason(
        "The process connected again and reported that it no longer fills the memory.",
        "Nothing, if it is rare. Otherwise look in the logs of engine and server for what ends the connections.",
    ),
    "no memory": Reason(
        "The kernel had no memory for these bytes of L1.",
        "`lmcache doctor` compares L1 with what the machine or container has: lower --l1-size-gb or raise the limit.",
    ),
}
REFUSED: dict[str, Reason] = {
    "no room": Reason("Nothing could be evicted for the chunks: all memory was being read or filled.", _NO_ROOM),
    "quarantine": Reason(
        "Too much memory of this engine is in quarantine: its copies passed their deadline and may still run.",
        "Restart the engine whose copies hang; lmcache_quarantined_bytes shows when it is over.",
    ),
    "no parent": Reason(
        "The chunk before these is not in L1 any more, so nothing could find them.",
        "Nothing, if it is rare. " + _NO_ROOM,
    ),
    "no engine": Reason("A tier's load began for an engine that has gone since.", "Nothing."),
}
EXPIRED: dict[str, Reason] = {
    "lease": Reason(
        "An engine did not load or give back a hit within --lease-seconds, and did not renew it.",
        "Look whether the engine hangs or was stopped.",
    ),
    "reservation": Reason("A copy into L1 passed its deadline; its chunks are `too late`.", DROPPED["too late"].remedy),
}
MISSED_CHUNKS: dict[str, Reason] = {
    "absent": Reason("The chunk is not in L1.", "lmcache_missed_tokens_total says why."),
    "being filled": Reason("Another request is storing the chunk now.", "Nothing."),
    "incomplete": Reason(
        "Some ranks have not stored their part.", "Look in the logs of all ranks for stores that failed."
    ),
    "other groups": Reason("Some kinds of the model's layers lack the chunk.", _NO_ROOM),
    "quarantine": Reason("The engine has too much memory in quarantine to get a lease.", REFUSED["quarantine"].remedy),
    "too many leases": Reason(
        "The engine holds 4,096 hits that it has neither loaded nor given back.", "Restart an engine whose copies hang."
    ),
}
EVICTED: dict[str, Reason] = {
    "room": Reason("Newer chunks needed the memory.", "`lmcache predict` says what more memory would give."),
    "let go": Reason("An engine had read what was pulled from another server (--peer-keep no).", "Nothing."),
    "deleted": Reason("An operator deleted the prompt.", "Nothing."),
}
HIT_CHUNKS: dict[str, Reason] = {
    "other split": Reason("Ranks of another tensor or pipeline parallel split have stored the chunks.", "Nothing."),
}
ENGINE_DROPPED: dict[str, Reason] = {
    "queue full": Reason(
        "The rank's queue of stores was full: the engine computes faster than it copies.",
        "Nothing, if it is rare. Otherwise look at lmcache_store_seconds_total: a copy takes longer than it should.",
    ),
    "closed": Reason("The engine ended before the copy began.", "Nothing."),
    "preempted": Reason("The engine took the blocks away before they were copied.", "Give the engine more KV memory."),
    "not finite": Reason(
        "The engine rounds its KV (lossy_kv), and a value was an infinity or a NaN, which cannot be rounded.",
        "Nothing, if it is rare. Otherwise set lossy_kv to none, and look at what the model computes.",
    ),
    "another chunk size": Reason(
        "The server was replaced by one with another --chunk-size while the store was queued.",
        "Nothing, if it is rare.",
    ),
    "identity not known yet": Reason(
        "The engine was still hashing its weights.", "Wait, or name the weights (lmcache.mp.model_id)."
    ),
    "weights changed": Reason("The KV was computed with weights that were replaced meanwhile.", "Nothing."),
    "computed from a failed load": Reason(
        "A load failed, so what the forward pass computed from it is not kept.",
        "lmcache_failed_loads_total counts such loads, and the engine's log says why they failed.",
    ),
}
FETCH_ENDS: dict[str, Reason] = {
    "absent": Reason("No tier had the next chunk, and no other engine was computing it.", "Nothing."),
    "not worth it": Reason(
        "Loading or waiting was expected to take longer than computing.",
        "Nothing, if the speeds are right (`lmcache describe tiers`). `--worth always` loads all the same.",
    ),
    "late": Reason(
        "The wait fell behind its plan, so the engine computes the rest.",
        "Look at the tier with `lmcache describe tiers`, or at the engine that was waited for.",
    ),
    "patience": Reason("The wait lasted --l2-patience-seconds.", "Look at the tier with `lmcache describe tiers`."),
    "promise ended": Reason(
        "The engine that was computing the chunks ended, or its request was aborted.", "Look in that engine's log."
    ),
    "too many": Reason("4,096 lookups were waiting already.", "Use fewer requests at a time, or a faster tier."),
    "withdrawn": Reason("All requests that waited have ended.", "Nothing."),
    "arrived": Reason("All planned chunks have arrived.", "Nothing."),
    "failed": Reason("Some planned chunks did not arrive.", "lmcache_tier_missed_total says why."),
}
TIER_MISSED: dict[str, Reason] = {
    "absent": Reason(
        "The tier no longer has the shard.",
        "Nothing, if it is rare: it was evicted meanwhile.",
    ),
    "too late": Reason(
        "L1 took back the memory before the load began, because --lease-seconds had passed.",
        "Look why the tier is slow.",
    ),
    "tier failed": Reason("The call failed as a whole.", "lmcache_tier_failed_total and the log say why."),
    "not a frame": Reason("What was stored is not a frame of LMCache.", "Find out who else writes into the store."),
    "other version": Reason("The frame has another version of the format.", "Nothing: it is removed."),
    "other shard": Reason("The frame belongs to another chunk.", "Find out who else writes into the store."),
    "other size": Reason("The payload has another size than the shard.", "Find out who else writes into the store."),
    "checksum": Reason(
        "Bytes have changed, or the `key_file` is another one.",
        "Check disk, network and key file.",
    ),
    "written by a newer version": Reason(
        "The frame has a codec that this release does not know.",
        "Upgrade this server, or set `codec=none` on the other one.",
    ),
    "undecodable": Reason("The checksum of the frame is right, but its codec cannot decode it.", "Please report it."),
    "truncated": Reason("The end of the frame is missing.", "Check the disk and whether the store was full."),
    "unreadable": Reason(
        "The device failed to read this frame.", "Look in the kernel's log (`dmesg`), and replace the disk."
    ),
}
TIER_UNWRITTEN: dict[str, Reason] = {
    "full": Reason("The tier had no space and could evict nothing.", "Set its max_gb below the capacity of its store."),
    "too large": Reason("One shard is larger than the tier.", "Set a higher max_gb or a lower --chunk-size."),
    "not ready": Reason(
        "The tier does not know yet what the store holds.", "Nothing: it is written once the count has ended."
    ),
    "tier failed": TIER_MISSED["tier failed"],
    "cleared": Reason("The tier was cleared while the write ran.", "Nothing."),
}
TIER_LOST: dict[str, Reason] = {
    "queue full": Reason(
        "More chunks waited than --l2-queue-gb allows, so the ends of prompts were not queued.",
        "Raise --l2-queue-gb, or use a faster tier.",
    ),
    "evicted": Reason("L1 evicted the chunk before it was written.", "Raise --l1-size-gb, or use a faster tier."),
    "cleared": Reason("The cache or the tier was cleared first.", "Nothing."),
}
_REACH = "Check the network and the address in the tier's URL."
TIER_FAILED: dict[str, Reason] = {
    "open": Reason(
        "The tier could not be opened, at the start or later.", "The log says why; the server tries again by itself."
    ),
    "unreachable": Reason("The store did not accept a connection.", _REACH),
    "timeout": Reason("The store did not answer in time.", "Check the store, or raise `timeout=` in the tier's URL."),
    "late": Reason("A call had not ended at its deadline and was cancelled.", "Check the store."),
    "cancelled": Reason("The server cancelled the call, since nobody waits for it any more.", "Nothing."),
    "denied": Reason("The store refused the user, or others may write to its folder.", "The log says which right."),
    "read-only": Reason("The file system or the store accepts no writes.", "Mount it writable, or add `write=none`."),
    "full": Reason("The store has no space left.", "Free some, or set a smaller max_gb."),
    "io": Reason(
        "The device or the store reported an error.", "Look in the kernel's log (`dmesg`) or in the store's log."
    ),
    "gone": Reason(
        "A file or folder of the tier has been deleted or unmounted.", "Mount it again, or restart the server."
    ),
    "damaged": Reason("The index of the disk tier is damaged.", "Empty the directory to start anew."),
    "locked": Reason("Another server uses the directory.", "Give each server a directory of its own, or use dir://."),
    "direct": Reason("The file system has no O_DIRECT, and the URL asks for it.", "Use io=auto or io=buffered."),
    "holes": Reason("The file system cannot free parts of a file.", "Use another file system, or dir://."),
    "protocol": Reason("The answer was not one of this kind of store.", "Check that the URL names the right service."),
    "not ready": Reason("The store is starting or has no primary.", "Nothing: the server tries again."),
    "busy": Reason(
        "The store has no connection left.", "Lower `connections=` in the tier's URL, or raise the store's limit."
    ),
    "no client": Reason("The client process of Mooncake could not be started or has ended.", "The log says why."),
    "no bucket": Reason("The S3 bucket does not exist.", "Create it."),
    "slow down": Reason(
        "S3 asked for fewer requests.", "Nothing, if it is rare; a larger --chunk-size makes fewer objects."
    ),
    "refused": Reason("The store refused the request.", "The log has the store's own words."),
    "version": Reason(
        "The store is too old, or holds data of another version.", "The log says which version is needed."
    ),
    "closed": Reason("The tier was closed during the call.", "Nothing."),
    "no threads": Reason("No thread could be started.", "Raise the limit of threads (`ulimit -u`, pids.max)."),
    "internal": Reason("An unexpected exception; the log has its traceback.", "Please report it."),
    "other": Reason("The tier has reported more than 128 kinds of outcomes.", "Look in the log."),
}
LOSSES: dict[str, dict[str, Reason]] = {
    "evicted_chunks_by_reason_total": EVICTED,
    "hit_chunks_by_reason_total": HIT_CHUNKS,
    "missed_chunks_by_reason_total": MISSED_CHUNKS,
    "refused_chunks_by_reason_total": REFUSED,
    "dropped_chunks_by_reason_total": DROPPED,
    "expired_chunks_by_reason_total": EXPIRED,
    "engine_dropped_chunks_total": ENGINE_DROPPED,
    "fetches_by_end_total": FETCH_ENDS,
    "awaits_by_end_total": FETCH_ENDS,
    "tier_missed_total": TIER_MISSED,
    "tier_unwritten_total": TIER_UNWRITTEN,
    "tier_unwritten_bytes_total": TIER_UNWRITTEN,
    "tier_lost_total": TIER_LOST,
    "tier_lost_bytes_total": TIER_LOST,
    "tier_failed_total": TIER_FAILED,
}
"""Metric, without prefix -> its reasons. A tier of a third party may add others to those of tiers."""
