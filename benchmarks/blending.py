"""How near blended answers are to exact ones.

    .cache/vllm/bin/python -m benchmarks.blending --model FOLDER         (an environment with transformers)

Each prompt has instructions, documents and a question. Its documents were stored before, when another prompt with the same
documents in another order was computed. For each plan the prompt is then blended, and the expected answer is forced upon it:

KL     of the exact distribution from the blended one, in nats, the mean over the answer's tokens.
match  the share of prompts in which the most probable token is the expected one, at each token of the answer.
share  of the documents' tokens that was computed again.

Both have an interval of 95 %: KL by resampling the prompts, match by Wilson's formula. There are four tasks: a text goes on
(*text*), a code in one document (*needle*), a sentence that begins in one document and ends in the next one (*split*), and two
facts in two documents that have to be put together (*two facts*).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lmcache.engine.blending import Blending
from lmcache.integration.transformers import attach
from lmcache.integration.transformers.blend import Blender
from transformers import AutoModelForCausalLM, AutoTokenizer

INSTRUCTIONS = "Below are several documents. Read all of them, then answer the question at the end.\n\n"
SEPARATOR = " # # "
PEOPLE = [
    "Agnes",
    "Bruno",
    "Carla",
    "Dmitri",
    "Elena",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Leo",
    "Mona",
]
CITIES = ["Aarhus", "Bergen", "Cadiz", "Dresden", "Exeter", "Faro", "Graz", "Jena", "Kassel", "Leeds", "Murcia", "Pisa"]
PLANS = {
    "nothing again": {"choose": "none", "links": 0},
    "4 links": {"choose": "none", "links": 4},
    "16 links": {"choose": "none", "links": 16},
    "4 links + query 13 %": {"choose": "query", "links": 4, "recompute_ratio": 0.13},
    "the same, single tokens": {"choose": "query", "links": 4, "recompute_ratio": 0.13, "run": 1},
    "deviation 15 %": {"choose": "deviation", "links": 0, "recompute_ratio": 0.15},
}
Encode = Callable[[str], list[int]]


@dataclasses.dataclass
class Case:
    """A prompt in token ids. answer: what is expected after the question."""

    documents: list[list[int]]
    question: list[int]
    answer: list[int]


def make(task: str, encode: Encode, text: list[int], chance: random.Random, documents: int, tokens: int) -> Case:
    """Make a case of a task. text: token ids to fill documents of `tokens` tokens with."""

    def filled(said: list[int], at: float) -> list[int]:
        left = tokens - len(said)
        start = chance.randrange(len(text) - left)
        middle = int(at * left)
        return text[start : start + middle] + said + text[start + middle : start + left]

    def code() -> str:
        return "".join(chance.choices("123456789", k=4))

    people, cities = chance.sample(PEOPLE, documents), chance.sample(CITIES, documents)
    codes, one = [code() for _ in range(documents)], chance.randrange(documents - 1)
    if task == "text":
        start = chance.randrange(len(text) - (documents + 1) * tokens)
        parts = [text[start + number * tokens :][:tokens] for number in range(documents)]
        end = text[start + documents * tokens :]
        return Case(parts, end[:16], end[16:24])
    if task == "needle":
        facts = [f"\nThe password of {who} is {what}.\n" for who, what in zip(people, codes, strict=True)]
        parts = [filled(encode(fact), chance.uniform(0.1, 0.9)) for fact in facts]
        asked = f"\nQuestion: What is the password of {people[one]}?\nAnswer: The password of {people[one]} is"
        return Case(parts, encode(asked), encode(f" {codes[one]}"))
    if task == "split":
        ends, begins = (
            [encode(f" {what}.\n") for what in codes],
            [encode(f"\nThe password of {who} is") for who in people],
        )
        parts = []
        for number in range(documents):
            before = ends[number - 1] if number else []
            parts.append(
                before + filled(begins[number], 1.0)[: tokens - len(before) - len(begins[number])] + begins[number]
            )
        asked = f"\nQuestion: What is the password of {people[one]}?\nAnswer: The password of {people[one]} is"
        return Case(parts, encode(asked), ends[one][:-1])
    half = documents // 2
    one = chance.randrange(half)
    facts = [f"\n{people[number]} lives in {cities[number]}.\n" for number in range(half)]
    facts += [f"\nThe password of the person in {cities[number]} is {codes[number]}.\n" for number in range(half)]
    parts = [filled(encode(fact), chance.uniform(0.1, 0.9)) for fact in facts]
    asked = f"\nQuestion: {people[one]} lives in {cities[one]}. What is the password of the person in {cities[one]}?"
    asked += "\nAnswer: It is"
    return Case(parts, encode(asked), encode(f" {codes[one]}"))


class Forced:
    """A logits processor that lets `generate` say the answer, whatever it would say."""

    def __init__(self, prompt: int, answer: list[int]) -> None:
        self._prompt, self._answer = prompt, answer

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._answer[ids.shape[1] - self._prompt]] = 0.0
        return forced


def logits_of(generate: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Return the logits at each token of the answer, [tokens, vocabulary]."""
    ids = torch.tensor([prompt])
    said = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=len(answer),
        min_new_tokens=len(answer),
        do_sample=False,
        logits_processor=[Forced(len(prompt), answer)],
        return_dict_in_generate=True,
        output_logits=True,
        eos_token_id=-1,
    )
    return torch.stack(said.logits)[:, 0].float()


def divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    p, q = exact.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def resampled(values: list[float]) -> tuple[float, float]:
    """Return the interval of 95 % of the mean."""
    chance = random.Random(0)
    means = sorted(statistics.fmean(chance.choices(values, k=len(values))) for _ in range(2000))
    return means[50], means[1949]


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the interval of 95 % of a share."""
    z, share = 1.96, hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    width = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return max(0.0, middle - width), min(1.0, middle + width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name")
    parser.add_argument("--texts", nargs="+", type=Path, default=sorted(Path("docs").glob("*.md")))
    parser.add_argument("--samples", type=int, default=20, help="prompts of each task")
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256, help="of each document")
    parser.add_argument("--tasks", nargs="+", default=["text", "needle", "split", "two facts"])
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further prompt after so long")
    parser.add_argument("--out", type=Path, help="also write all values there, as JSON")
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    text = encode("\n".join(path.read_text() for path in given.texts)[:400_000])
    separator, plain = encode(SEPARATOR), model.generate
    begin = encode(INSTRUCTIONS)
    blending = Blending(separator=tuple(separator), min_tokens=min(256, given.tokens))
    attached = attach(model, embedded_gb=1, model_id=given.model, blending=blending, deadline_seconds=60)
    assert attached.wait_connected(120) and attached._blender is not None, attached.refusal + attached.blending_refusal
    shape, ends = attached._shape, time.monotonic() + given.seconds
    blenders = {name: Blender(model, shape, dataclasses.replace(blending, **PLANS[name])) for name in given.plans}
    found: dict[str, dict[str, list[tuple[float, bool, float]]]] = {}

    def prompt(documents: list[list[int]], question: list[int]) -> list[int]:
        parts = [begin, *documents]
        return [token for part in parts for token in (*part, *separator)] + question

    for number in range(given.samples):
        for task in given.tasks:
            if time.monotonic() > ends:
                break
            chance = random.Random(f"{task} {number}")
            case = make(task, encode, text, chance, given.documents, given.tokens)
            order = chance.sample(case.documents, len(case.documents))
            while order == case.documents or order[0] == case.documents[0]:
                order = chance.sample(case.documents, len(case.documents))
            attached._blender = next(iter(blenders.values()))
            logits_of(model.generate, prompt(order, encode("\nSummary:")), encode(" The"))
            attached.flush()
            asked = prompt(case.documents, case.question)
            exact = logits_of(plain, asked, case.answer)
            rows = found.setdefault(task, {})
            wanted = torch.tensor(case.answer)
            rows.setdefault("exact", []).append((0.0, bool((exact.argmax(-1) == wanted).all()), 1.0))
            for name, blender in blenders.items():
                attached._blender = blender
                before = attached.blended_tokens, attached.recomputed_tokens
                logits = logits_of(model.generate, asked, case.answer)
                blended, again = attached.blended_tokens - before[0], attached.recomputed_tokens - before[1]
                assert blended == given.documents * given.tokens, (blended, attached.blending_refusal)
                match = bool((logits.argmax(-1) == wanted).all())
                rows.setdefault(name, []).append((divergence(exact, logits), match, again / blended))
        print(f"{number + 1} of {given.samples}", flush=True)
        if given.out is not None:
            given.out.write_text(json.dumps(found))
    attached.close()
    report(found)


def report(found: dict[str, dict[str, list[tuple[float, bool, float]]]]) -> None:
    for task, rows in found.items():
        print(f"\n{task}, {len(rows['exact'])} prompts")
        print(f"  {'plan':26} {'share':>6}  {'KL':>6}  {'95 %':15}  {'match':>5}  95 %")
        for name, values in rows.items():
            apart, hits, shares = (list(column) for column in zip(*values, strict=True))
            low, high = resampled(apart)
            least, most = wilson(sum(hits), len(hits))
            print(
                f"  {name:26} {statistics.fmean(shares):6.3f}  {statistics.fmean(apart):6.3f}  "
                f"[{low:.3f}, {high:.3f}]   {sum(hits) / len(hits):5.2f}  [{least:.2f}, {most:.2f}]"
            )


if __name__ == "__main__":
    main()
