"""The result of `lmcache bench engine` as a checklist for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lmcache.bench.samples import align
from lmcache.config.options import size_text

_SOURCES = {"engine": "the engine itself", "l1": "L1", "other_engine": "another engine"}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the checklist."""
    pace = f"{found['rate']:g} conversations a second" if found["rate"] else f"{found['concurrency']} at a time"
    yield (
        f"{found['model']} at {found['engine']}: prompts of up to {found['prompt_tokens']:,} tokens, answers of "
        f"{found['output_tokens']}, {pace}"
    )
    yield ""
    rows = [["workload", "requests", "hits", "TTFT p50", "p90", "p99", "least", "most", "+-", "ms a token"]]
    for one in found["workloads"]:
        pairs = [("with", one["ttft_ms_with_hits"]), ("without", one["ttft_ms_without_hits"])]
        told = [(name, figures) for name, figures in pairs if figures] or [("unknown", one["ttft_ms"])]
        for place, (name, figures) in enumerate(told):
            each = one["ms_per_answer_token"]
            keys = "p50", "p90", "p99", "least", "most", "spread"
            numbers = [f"{figures[key]:.1f}" if figures else "-" for key in keys]
            rows.append(
                [
                    one["workload"] if not place else "",
                    f"{figures['samples']:.0f}" if figures else "0",
                    name,
                    *numbers,
                    f"{each['p50']:.2f}" if each and not place else "",
                ]
            )
    yield align(rows)
    yield ""
    for one in found["workloads"]:
        yield from _details(one)
    before, after = found["memory_before"], found["memory_after"]
    for name in after:
        what, pair = name.replace("_", " ").removesuffix(" bytes"), (before.get(name, 0.0), after[name])
        first, last = (size_text(one) if name.endswith("bytes") else f"{one:.1%}" for one in pair)
        yield f"memory: {what}: {first} before, {last} after"
    for text in found["unknown"]:
        yield f"not known: {text}"


def _details(one: dict[str, Any]) -> Iterator[str]:
    known, found = one["known_tokens"], one["found_tokens"]
    text = f"{one['workload']} ({one['summary']}): {one['prompt_tokens'] / max(1e-9, one['seconds']):,.0f} prompt tokens a second"
    if known:
        parts = [f"{count / known:.0%} in {_SOURCES.get(source, source)}" for source, count in found.items() if count]
        text += f"; of {known:,} tokens {', '.join(parts) or 'none'} found"
    with_hits, without = one["ttft_ms_with_hits"], one["ttft_ms_without_hits"]
    if with_hits and without:
        text += f"; TTFT with hits is {with_hits['p50'] / max(1e-9, without['p50']):.0%} of that without"
    yield text
    for reason, count in one["failures"].items():
        yield f"  FAILED: {count} requests: {reason}"
