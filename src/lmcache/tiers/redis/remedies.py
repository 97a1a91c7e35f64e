"""What a user does about an error that Redis or Valkey answers: the tier's reason for each error, and what to type."""

from __future__ import annotations

import re

RIGHTS = (
    "+eval +evalsha +get +set +exists +unlink +scan +ping +select +time +hget +hset +hdel +hlen +hscan"
    " +hincrby +zadd +zrem +zscore +zcard +zcount +zrange +zrangebyscore +rename +persist +pexpire"
)
"""The commands that an ACL user needs."""

_ERRORS: dict[str, tuple[str, str]] = {
    "NOAUTH": ("denied", "give its password: redis://:${NAME}@host, or ?password_file=FILE"),
    "WRONGPASS": ("denied", "check user and password; `ACL GETUSER USER` says whether the user is on"),
    "DENIED": ("denied", "it is in protected mode: give it a password (`CONFIG SET requirepass ...`) and write it in the URL"),
    "READONLY": ("denied", "it is a replica: name the primary, or the Sentinels with ?sentinel=NAME"),
    "OOM": ("full", "its maxmemory is reached: `CONFIG SET maxmemory SIZE`, or a smaller ?max_gb="),
    "MISCONF": (
        "io",
        "it cannot write its snapshot: free space on its disk, or `CONFIG SET save \"\"` if it needs no snapshots",
    ),
    "LOADING": ("not ready", "it still reads its snapshot; the tier is tried again by itself"),
    "MASTERDOWN": ("not ready", "it is a replica that has lost its primary: name the primary"),
    "NOREPLICAS": ("not ready", "start its replicas, or `CONFIG SET min-replicas-to-write 0`"),
    "CLUSTERDOWN": ("not ready", "see `CLUSTER INFO`; `redis-cli --cluster check HOST:PORT` names the slots without a node"),
    "TRYAGAIN": ("not ready", "a hash slot is being moved; the tier is tried again by itself"),
    "ASK": ("not ready", "a hash slot is being moved; the tier is tried again by itself"),
    "BUSY": ("not ready", "somebody's script runs for too long: `SCRIPT KILL` ends it"),
}  # fmt: skip
"""Maps the first word of an error to the tier's reason and a remedy."""

_TEXTS: tuple[tuple[str, str, str], ...] = (
    (
        r"max number of clients",
        "busy",
        "lower ?connections= here, or `CONFIG SET maxclients N` there (`CLIENT LIST` says who is connected)",
    ),
    (r"DB index is out of range", "refused", "write /0, or raise `databases` in its configuration"),
    (r"SELECT is not allowed in cluster", "refused", "write /0?cluster=yes"),
    (r"cluster support disabled", "refused", "leave out ?cluster=yes"),
    (r"without any password configured", "denied", "leave the password out"),
    (r"'auth' command", "denied", "it is older than Redis 6 and has no users: write redis://:${NAME}@host"),
    (
        r"unknown command|unknown subcommand",
        "refused",
        "the tier needs Redis 6 or later, or Valkey, with this command neither renamed nor forbidden;"
        " of a Sentinel, write ?sentinel=NAME",
    ),
    (r"AUTH", "denied", _ERRORS["WRONGPASS"][1]),
)
"""Errors that begin with the word ERR, by their text."""


def remedy_of(code: str, text: str, username: str) -> tuple[str, str]:
    """Return the tier's reason for an error, and what to do, "" where nothing is known. code: its first word.

    username: the ACL user who was denied, "" for the default one.
    """
    if code == "NOPERM" or re.search(r"ACL failure in script|executing the script can't", text):
        return "denied", _grant(text, username or "default")
    if code in _ERRORS:
        return _ERRORS[code]
    for pattern, reason, remedy in _TEXTS:
        if re.search(pattern, text):
            return reason, remedy
    return "refused", ""


def _grant(text: str, username: str) -> str:
    command = re.search(r"'([a-z|]+)' command", text)
    if command:
        right = "+" + command[1]
    elif "key" in text:
        right = "'~{lmcache*' (?prefix= in place of lmcache)"
    else:  # before 7.2 Redis does not name the command of a script
        right = RIGHTS
    return f"type `ACL SETUSER {username} {right}`; docs/tiers/redis.md lists all rights that the user needs"
