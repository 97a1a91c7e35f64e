"""`lmcache bench engine`: measure a real engine with an OpenAI-compatible API, with prompts as applications send them.

Requests are streaming completions whose prompts are token ids. What of a prompt was found, and where, is asked of the LMCache
server afterwards; without one, the engine's own usage report has to do.
"""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import anyio

from lmcache.bench.reaching import headers_of, model_of, why_failed, without
from lmcache.bench.samples import quantile
from lmcache.bench.workloads import Shape, Workload
from lmcache.errors import ConfigError, ServerRefused, ServerUnavailable
from lmcache.proxy.upstream import FAILURES, Engine, call, parse_engines
from lmcache.runtime import RUNTIME
from lmcache.wire.http_client import ask

MOST_REQUESTS, MOST_TOKENS, MOST_CONCURRENT = 100_000, 1_000_000, 1024
_MOST_EVENT_BYTES = 4 << 20
_STRANGE = ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError
"""The errors that an answer raises when it is read as an engine's and is not one."""
_MOST_ERROR_BYTES = 2000
_PAGE = 500
_SETTLE_SECONDS = 10.0
"""The benchmark waits so long for the server's records of the last requests."""


@dataclass(frozen=True)
class Plan:
    """What to do. rate: conversations that begin in a second; 0: the next one begins when one ends. output_tokens: of an
    answer. model: "" for the first one that the engine serves."""

    engine: Engine
    model: str
    workloads: Sequence[Workload]
    shape: Shape
    requests: int
    concurrency: int
    rate: float
    output_tokens: int
    silence_seconds: float
    server_url: str = ""
    token: str = ""
    key: str = ""
    """The engine's API key."""


@dataclass
class Sample:
    """One request. found: tokens by source, as far as they are known; None: not known."""

    prompt_tokens: int
    name: str = ""
    first_seconds: float = 0.0
    whole_seconds: float = 0.0
    answer_tokens: int = 0
    failure: str = ""
    found: dict[str, int] | None = None
    missed: dict[str, int] = field(default_factory=dict)


class _Run:
    """Everything that one call of `measure` keeps."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.has_ids = True
        """Whether the engine returns the ids of its answers."""
        self.tells_cached = False
        self.headers = headers_of(plan.key)

    async def complete(self, prompt: list[int]) -> tuple[Sample, list[int]]:
        """Send a prompt. Return what was measured, and the ids of the answer."""
        plan, sample, answer = self.plan, Sample(len(prompt)), list[int]()
        body = {
            "model": plan.model,
            "prompt": prompt,
            "max_tokens": plan.output_tokens,
            "min_tokens": plan.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        began = RUNTIME.now()
        try:
            raw = json.dumps(body).encode()
            async with call(plan.engine, "POST", "/v1/completions", self.headers, raw, plan.silence_seconds) as said:
                if said.status != 200:
                    text = b"".join([part async for part in said.parts()])[:_MOST_ERROR_BYTES].decode(
                        "utf-8", "replace"
                    )
                    sample.failure = without(plan.key, f"HTTP {said.status}: {text}")
                    return sample, answer
                rest = b""
                async for part in said.parts():
                    *events, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
                    if len(rest) > _MOST_EVENT_BYTES:
                        raise ValueError("an event of more than 4 MiB")
                    for event in events:
                        self._take(event, sample, answer, began)
        except FAILURES as error:
            sample.failure = without(plan.key, why_failed(plan.engine, error))
        except _STRANGE as error:
            sample.failure = without(plan.key, f"not the answer of an OpenAI-compatible engine: {error}")
        sample.whole_seconds = RUNTIME.now() - began
        if not sample.failure and not sample.first_seconds:
            sample.failure = "the answer ended before a token"
        return sample, answer

    def _take(self, event: bytes, sample: Sample, answer: list[int], began: float) -> None:
        data = event.removeprefix(b"data:").strip()
        if not event.startswith(b"data:") or data == b"[DONE]":
            return
        told = json.loads(data)
        if not isinstance(told, dict):
            raise ValueError("an event that is no JSON object")
        if told.get("error"):
            sample.failure = without(self.plan.key, str(told["error"]))[:_MOST_ERROR_BYTES]
            return
        sample.name = str(told.get("id") or sample.name)
        choices = told.get("choices") or [{}]
        if told.get("choices"):
            sample.first_seconds = sample.first_seconds or RUNTIME.now() - began
            answer += [one for one in choices[0].get("token_ids") or () if isinstance(one, int)]
        usage = told.get("usage") or {}
        sample.answer_tokens = int(usage.get("completion_tokens") or sample.answer_tokens)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if cached is not None:
            self.tells_cached = True
            sample.found = {"engine, or what it loaded": int(cached)} if cached else {}

    async def workload(self, workload: Workload) -> tuple[list[Sample], float]:
        """Run the conversations of a workload. Return the samples, and the seconds that all took."""
        plan, samples = self.plan, list[Sample]()
        dice = random.Random(plan.shape.seed)
        room = anyio.CapacityLimiter(plan.concurrency)
        began = RUNTIME.now()

        async def hold(number: int) -> None:
            async with room:
                conversation, answer = workload.conversation(plan.shape, number), list[int]()
                while (prompt := conversation(answer)) is not None:
                    sample, answer = await self.complete(prompt)
                    samples.append(sample)
                    if sample.failure:
                        return
                    if len(answer) != plan.output_tokens:
                        self.has_ids = False
                        answer = prompt[: plan.output_tokens]  # as long as the answer was, and the same each time

        async with anyio.create_task_group() as group:
            for number in range(max(1, plan.requests // workload.prompts)):
                if plan.rate:
                    await anyio.sleep(dice.expovariate(plan.rate))
                while room.statistics().tasks_waiting >= plan.concurrency:  # no more tasks than that wait
                    await anyio.sleep(0.01)
                group.start_soon(hold, number)
        return samples, RUNTIME.now() - began


async def measured(url: str, prompts: Sequence[list[int]], output_tokens: int) -> list[tuple[Sample, list[int]]]:
    """Send prompts one after the other to the first model of an engine. Return what was measured, and the ids of each answer."""
    (engine,) = parse_engines("--url", url)
    run = _Run(Plan(engine, await model_of(engine, ""), (), Shape(0, 0, 0), 1, 1, 0.0, output_tokens, 600.0))
    return [await run.complete(prompt) for prompt in prompts]


async def measure(plan: Plan) -> dict[str, Any]:
    """Measure all workloads. Return JSON types.

    Raises:
        ServerUnavailable, ServerRefused: the engine does not answer the first request.
    """
    if not plan.model:
        plan = replace(plan, model=await model_of(plan.engine, plan.key))
    run, unknown = _Run(plan), list[str]()
    first, _ = await run.complete([*range(64)] if plan.shape.vocabulary > 64 else [1] * 8)
    if first.failure:
        raise ServerUnavailable(f"{plan.engine}: the first completion failed: {first.failure}")
    before, rows = await _memory(plan), list[dict[str, Any]]()
    for workload in plan.workloads:
        since = RUNTIME.wall()
        samples, seconds = await run.workload(workload)
        if plan.server_url:
            await _look_up(plan, samples, since - 1.0)
        rows.append(_row(workload, samples, seconds))
    after = await _memory(plan)
    if not plan.server_url:
        unknown.append("where hits came from: pass --lmcache-url")
        if not run.tells_cached:
            unknown.append(
                "which requests had hits: pass --lmcache-url, or start vLLM with --enable-prompt-tokens-details"
            )
    elif any(row["without_record"] for row in rows):
        unknown.append(
            "the hits of some requests: the server has no record of them (--records-mb, or the engine is not connected to it)"
        )
    if not run.has_ids and any(one.prompts > 1 for one in plan.workloads):
        unknown.append(
            "the ids of answers, which the engine does not return: later turns contain other tokens in their place"
        )
    if "server_rss_bytes" not in after:
        unknown.append("the server's own memory: its process is on another host, or --lmcache-url is not given")
    unknown.append("memory of GPUs, which neither of the two tells: compare nvidia-smi before and after")
    return {
        "engine": str(plan.engine),
        "model": plan.model,
        "prompt_tokens": plan.shape.tokens,
        "output_tokens": plan.output_tokens,
        "concurrency": plan.concurrency,
        "rate": plan.rate,
        "seed": plan.shape.seed,
        "workloads": rows,
        "memory_before": before,
        "memory_after": after,
        "unknown": unknown,
    }


async def _look_up(plan: Plan, samples: Sequence[Sample], since: float) -> None:
    """Find the server's records of these requests, and note what they say. The engine adds to the ids that it has told."""
    wanted = {one.name: one for one in samples if one.name and not one.failure}
    deadline = RUNTIME.now() + _SETTLE_SECONDS
    while wanted:
        records = await anyio.to_thread.run_sync(lambda: list(_records(plan, since, 4 * len(samples) + _PAGE)))
        for record in records:
            request = str(record.get("request"))
            name = next((one for one in _beginnings(request) if one in wanted), "")
            sample = wanted.pop(name, None)
            if sample is not None:
                sample.found = {str(source): int(count) for source, count in record.get("sources", {}).items()}
                sample.missed = {str(reason): int(count) for reason, count in record.get("missed", {}).items()}
        if not wanted or RUNTIME.now() > deadline:
            break
        await anyio.sleep(0.2)
    for sample in wanted.values():
        sample.found = None


def _beginnings(request: str) -> Iterator[str]:
    """Yield the id and what it begins with, as far as that ends before a hyphen."""
    while request:
        yield request
        request = request.rpartition("-")[0]


def _records(plan: Plan, since: float, most: int) -> Iterator[dict[str, Any]]:
    before = 0
    while most > 0:
        query = urlencode({"since": since, "limit": _PAGE, **({"before": before} if before else {})})
        status, answer = ask(plan.server_url, f"/requests?{query}", token=plan.token)
        if status != 200:
            raise ServerRefused(f"{plan.server_url}: {answer.get('reason', f'HTTP {status}')}")
        found = [one for one in answer.get("requests", []) if isinstance(one, dict)]
        yield from found
        most, before = most - len(found), int(answer.get("next") or 0)
        if not before:
            return


async def _memory(plan: Plan) -> dict[str, float]:
    """Return what the server and the engine tell of their memory."""
    found: dict[str, float] = {}
    if plan.server_url:
        status, told = await anyio.to_thread.run_sync(lambda: ask(plan.server_url, "/status", token=plan.token))
        if status != 200:
            raise ServerRefused(f"{plan.server_url}: {told.get('reason', f'HTTP {status}')}")
        arena = told.get("arena")
        if isinstance(arena, dict):
            found |= {f"l1_{name}": arena.get(name, 0) for name in ("used_bytes", "bytes")}
        if rss := _rss(told.get("pid")):
            found["server_rss_bytes"] = rss
    try:
        async with call(plan.engine, "GET", "/metrics", {}, b"", plan.silence_seconds) as said:
            text = b"".join([part async for part in said.parts()]).decode("utf-8", "replace")
    except FAILURES:
        return found
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        for metric, ours in (
            ("process_resident_memory_bytes", "engine_api_rss_bytes"),
            ("vllm:kv_cache_usage_perc", "engine_kv_usage"),
        ):
            if name.partition("{")[0] == metric:
                with suppress(ValueError):
                    found[ours] = float(value)
    return found


def _rss(pid: object) -> int:
    """Return the resident memory of a process here, without shared memory; 0 if it is not an LMCache server here."""
    try:
        if b"lmcache" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return 0
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(int(one.split()[1]) << 10 for one in lines if one.startswith("RssAnon:"))
    except (OSError, ValueError, IndexError):
        return 0


def _row(workload: Workload, samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    good = [one for one in samples if not one.failure]
    known = [one for one in good if one.found is not None]
    hits = [one for one in known if any((one.found or {}).values())]
    others = [one for one in known if not any((one.found or {}).values())]
    found, missed, failures = Counter[str](), Counter[str](), Counter(one.failure for one in samples if one.failure)
    for one in known:
        found.update(one.found)
        missed.update(one.missed)
    return {
        "workload": workload.name,
        "summary": workload.summary,
        "requests": len(samples),
        "failures": dict(failures.most_common(5)),
        "seconds": round(seconds, 3),
        "prompt_tokens": sum(one.prompt_tokens for one in good),
        "answer_tokens": sum(one.answer_tokens for one in good),
        "ttft_ms": _figures([1e3 * one.first_seconds for one in good]),
        "ttft_ms_with_hits": _figures([1e3 * one.first_seconds for one in hits]),
        "ttft_ms_without_hits": _figures([1e3 * one.first_seconds for one in others]),
        "ms_per_answer_token": _figures(
            [
                1e3 * (one.whole_seconds - one.first_seconds) / (one.answer_tokens - 1)
                for one in good
                if one.answer_tokens > 1
            ]
        ),
        "known_tokens": sum(one.prompt_tokens for one in known),
        "found_tokens": dict(found),
        "missed_tokens": dict(missed.most_common(8)),
        "without_record": len(good) - len(known),
    }


def _figures(samples: Sequence[float]) -> dict[str, float] | None:
    if not samples:
        return None
    parts = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {
        "samples": len(samples),
        **{name: round(quantile(samples, part), 3) for name, part in parts.items()},
        "least": round(min(samples), 3),
        "most": round(max(samples), 3),
        "spread": round(statistics.pstdev(samples), 3),
    }


def checked(requests: int, tokens: int, output_tokens: int, concurrency: int, rate: float, vocabulary: int) -> None:
    """Check the numbers of a plan. Raises ConfigError for one that is out of range."""
    for flag, value, least, most in (
        ("--requests", requests, 1, MOST_REQUESTS),
        ("--tokens", tokens, 16, MOST_TOKENS),
        ("--output-tokens", output_tokens, 1, 65536),
        ("--concurrency", concurrency, 1, MOST_CONCURRENT),
        ("--rate", rate, 0, 1e6),
        ("--vocabulary", vocabulary, 16, 1 << 20),
    ):
        if not least <= value <= most:
            raise ConfigError(f"{flag} {value:g}: must be from {least:g} to {most:g}")


def run(plan: Plan) -> dict[str, Any]:
    """Measure, in an event loop of its own. Raises LMCacheError as `measure`."""
    return anyio.run(measure, plan)
