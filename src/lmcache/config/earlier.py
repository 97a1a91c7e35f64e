"""Flags of the public LMCache project's server (0.5) that have no counterpart here: what each is answered with.

Charts, operators and scripts pass them. A flag without an effect is accepted with one line that says why and what to use instead.
A flag that is refused would otherwise make somebody believe in a protection or a store that there is not.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from lmcache.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class EarlierFlag:
    """One flag. said: why it has no effect or, if `refused`, what to do instead. accepted: the values that are no refusal."""

    flag: str
    said: str
    refused: bool = False
    accepted: tuple[str, ...] = ()

    @property
    def dest(self) -> str:
        """The name of the parsed value."""
        return "earlier_" + self.flag.strip("-").replace("-", "_")


def _no_effect(flags: str, why: str) -> tuple[EarlierFlag, ...]:
    return tuple(EarlierFlag(flag, why) for flag in flags.split())


def _refused(flags: str, remedy: str, accepted: tuple[str, ...] = ()) -> tuple[EarlierFlag, ...]:
    return tuple(EarlierFlag(flag, remedy, True, accepted) for flag in flags.split())


_NO_PLUGINS = "the server runs no code but its own: leave it out"
EARLIER_FLAGS: tuple[EarlierFlag, ...] = (
    *_refused("--transport", "engines connect over ZMQ: leave it out", ("zmq",)),
    *_no_effect("--null-block-id", "engines name the blocks that they copy themselves"),
    *_no_effect(
        "--max-gpu-workers --max-cpu-workers --grpc-server-workers",
        "the engines' own ranks copy; --max-workers is the number of threads for engines on other hosts",
    ),
    *_no_effect("--hash-algorithm", "chunks are named by BLAKE3, the same in every process"),
    *_no_effect(
        "--engine-type --enable-segmented-prefix --enable-dedup-content --enable-blend-reorder --enable "
        "--separate-object-groups",
        "the server needs no switch for these: blending is a setting of engines (docs/blending.md)",
    ),
    *_no_effect(
        "--supported-transfer-mode", "engines on this host copy by themselves, others get payload frames; each finds out"
    ),
    *_no_effect("--isolated-ipc --shm-name", "the memory file has a name of its own, and engines are given its descriptor"),
    *_refused("--run-script-api-enabled --script-allowed-imports", "the server runs no scripts: leave it out"),
    *_refused("--runtime-plugin-locations --server-module --l1-manager", _NO_PLUGINS),
    *_no_effect("--runtime-plugin-config", _NO_PLUGINS),
    *_no_effect(
        "--worker-reap-timeout-seconds --worker-registration-grace-seconds --session-ttl-seconds",
        "the kernel tells the server when an engine has ended",
    ),
    *_no_effect("--l1-write-ttl-seconds --l1-read-ttl-seconds", "use --lease-seconds, which holds for both"),
    *_no_effect("--l1-use-lazy --no-l1-use-lazy --l1-init-size-gb", "memory is always allocated in the background, step by step"),
    *_no_effect("--l1-align-bytes", "KV begins at a multiple of 4,096 bytes"),
    *_refused("--l1-devdax-path", "mount the device as a file system and use --arena-dir MOUNT, or --l2 disk:///MOUNT?max_gb=N"),
    *_refused("--gds-l1-path", "use --l2 disk:///PATH?max_gb=N, which is read through L1"),
    *_no_effect(
        "--gds-l1-use-direct-io --no-gds-l1-use-direct-io --gds-l1-backend", "there is no GPU Direct Storage: use --l2 disk:///PATH"
    ),
    *_no_effect(
        "--eviction-trigger-watermark --eviction-ratio", "a full L1 evicts what a store needs, at the moment of the store"
    ),
    *_no_effect("--l2-store-policy", "write=through|on-evict|none in a tier's URL says when it is written to"),
    *_no_effect(
        "--l2-prefetch-policy --l2-prefetch-max-in-flight", "--worth and the measured speed of a tier decide what is loaded"
    ),
    *_no_effect("--periodic-notifier-interval-ms --event-bus-queue-size", "nothing here polls for events"),
    *_no_effect(
        "--p2p-advertise-url --p2p-listen-url --p2p-lookup-timeout --p2p-load-timeout --p2p-transfer-engine",
        "--peers HOST:PORT,... names the servers to pull from, or a name with several addresses",
    ),
    *_no_effect(
        "--coordinator-url --coordinator-advertise-ip --coordinator-heartbeat-interval --coordinator-event-reporting"
        " --coordinator-event-flush-interval --coordinator-event-transport --coordinator-kafka-bootstrap-servers"
        " --coordinator-kafka-topic --coordinator-kafka-delivery-timeout --coordinator-blend-timeout"
        " --coordinator-blend-match-concurrency --coordinator-l2-event-reporting --coordinator-l2-event-flush-interval",
        "there is no coordinator: servers share KV by --peers, or through a tier that all of them name",
    ),
    *_no_effect("--kv-event-log-size", "vLLM publishes the KV events; the server keeps them for an engine until the engine asks"),
    *_no_effect(
        "--disable-observability --disable-metrics --disable-grpc-metrics --disable-prometheus",
        "counting costs nothing that could be switched off; /metrics is at --http-port",
    ),
    *_no_effect("--disable-logging --enable-extra-logging --extra-logging-interval", "--log-level says how much is logged"),
    *_no_effect("--enable-tracing", "--otlp-endpoint alone says whether spans are sent, and where"),
    *_no_effect("--metrics-sample-rate", "the metrics count everything"),
    *_no_effect(
        "--lookup-hash-log-dir --lookup-hash-log-rotation-interval --lookup-hash-log-rotation-max-size"
        " --lookup-hash-log-max-files --trace-level --trace-output",
        "use --record-trace FILE, which lmcache replay reads, as it reads the public project's lookup hashes",
    ),
    *_no_effect(
        "--enable-gc-monitor --gc-monitor-min-pause-ms --gc-monitor-top-objects",
        "Python's garbage collector is not watched",
    ),
)  # fmt: skip


def add_earlier_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser, each with any number of values. The help does not list them."""
    for one in EARLIER_FLAGS:
        parser.add_argument(one.flag, dest=one.dest, nargs="*", help=argparse.SUPPRESS)
    parser.add_argument(
        "--l1-use-hugepages", dest="huge_pages", action="store_const", const="always", help=argparse.SUPPRESS
    )


def answers(given: Mapping[str, Sequence[str] | None]) -> Iterable[str]:
    """Yield one line for each of the flags that was given and has no effect. given: parsed values by `EarlierFlag.dest`.

    Raises:
        ConfigError: a flag of these that is refused was given.
    """
    for one in EARLIER_FLAGS:
        values = given.get(one.dest)
        if values is None:
            continue
        typed = " ".join([one.flag, *values])
        if not one.refused:
            yield f"{typed}: has no effect: {one.said}"
        elif not one.accepted or any(value not in one.accepted for value in values):
            raise ConfigError(f"{typed}: is not supported: {one.said}")
