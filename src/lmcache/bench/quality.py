"""What a codec does to the answers of a model: the exact KV of prompts is encoded and decoded, and the model goes on from it.

It runs in Transformers, with the codecs themselves (`lmcache.tiers.coding`, of `k8v4` the copies) and without a server.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from lmcache.chunks import Layout
from lmcache.chunks.forms import Form
from lmcache.errors import LMCacheError
from lmcache.tiers import coding
from lmcache.transfer.cpu import CpuCopier
from lmcache.transfer.paged import PagedKV, Plane
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

CODECS = ("none", "pack12", "int8", "k8v4")
_RESAMPLES = 2000


class QualityError(LMCacheError):
    """This model or these prompts cannot be measured; the message says why."""


class Measured(NamedTuple):
    """One prompt with one codec. divergence: KL of the exact distribution of the next token from the codec's, in nats, the mean
    over the answer. next_same, answer_same: whether the first token of the greedy answer is the exact one, and whether all are.
    """

    divergence: float
    next_same: bool
    answer_same: bool


class Row(NamedTuple):
    """What one codec did: bytes of KV before and after, whether all KV came back bit by bit, and each prompt."""

    codec: str
    raw_bytes: int
    stored_bytes: int
    exact: bool
    prompts: list[Measured]

    def told(self) -> dict[str, Any]:
        """Return everything as JSON types, with intervals of 95 %."""
        count, apart = len(self.prompts), [one.divergence for one in self.prompts]
        next_same, answer_same = (sum(column) for column in list(zip(*self.prompts, strict=True))[1:])
        return {
            "codec": self.codec,
            "bit_exact": self.exact,
            "ratio": round(self.raw_bytes / self.stored_bytes, 4),
            "prompts": count,
            "kl": statistics.fmean(apart),
            "kl_interval": resampled(apart),
            "kl_worst": max(apart),
            "next_token_same": next_same / count,
            "next_token_same_interval": wilson(next_same, count),
            "answer_same": answer_same / count,
            "answer_same_interval": wilson(answer_same, count),
        }


class Subject:
    """A model in Transformers whose KV is measured. kv_dtype: of the KV that the codecs get; None for the model's.

    Raises:
        QualityError: none of the model's KV can be rounded.
    """

    def __init__(self, model: Any, tokenizer: Any, kv_dtype: Any = None) -> None:
        if getattr(model.config, "kv_lora_rank", None):
            raise QualityError("this model has latents (MLA), which no lossy codec rounds: there is nothing to measure")
        self.model, self.tokenizer, self.kv_dtype = model.eval(), tokenizer, kv_dtype or model.dtype

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text))

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the tokens of messages, by the model's own template.

        Raises:
            QualityError: the model has none, or the template refuses the messages.
        """
        try:
            return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        except Exception as error:  # the template is a program of the model's, and messages are whatever the file has
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise QualityError(
                f"the model's chat template cannot turn {messages!r:.200} into a prompt: {why}"
            ) from None

    def measure(
        self,
        prompts: Sequence[Sequence[int]],
        codecs: Sequence[str],
        tokens: int,
        progress: Callable[[int], None] = lambda done: None,
        seconds: float = 1e9,
    ) -> list[Row]:
        """Measure prompts of token ids with each codec. tokens: how many tokens an answer has. progress: called after each prompt
        with their number. seconds: begin no further prompt after so long.

        Raises:
            QualityError: a prompt is too short, or the model's cache is none of keys and values.
        """
        with torch.no_grad():
            return self._measure(prompts, codecs, tokens, progress, seconds)

    def _measure(
        self,
        prompts: Sequence[Sequence[int]],
        codecs: Sequence[str],
        tokens: int,
        progress: Callable[[int], None],
        seconds: float,
    ) -> list[Row]:
        rows = [Row(name, 0, 0, True, []) for name in codecs]
        ends = time.monotonic() + seconds
        for number, prompt in enumerate(prompts):
            if number and time.monotonic() > ends:
                break
            if len(prompt) < 2:
                raise QualityError(f"prompt {number + 1} has {len(prompt)} tokens: a prompt needs 2 or more")
            ids = torch.tensor([list(prompt)], device=self.model.device)
            exact = self.model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
            brought_back(exact, "none", self.kv_dtype)
            said = self._answer(ids[:, -1:], copy.deepcopy(exact), tokens)
            wanted = self._logits(said, copy.deepcopy(exact))
            rows = [self._measured(one, exact, said, wanted) for one in rows]
            progress(number + 1)
        return rows

    def _answer(self, last: Any, cache: Any, tokens: int) -> Any:
        """Return the last token of the prompt and the greedy answer but for its last token, [1, tokens]."""
        said = [last]
        for _ in range(tokens - 1):
            logits = self.model(said[-1], past_key_values=cache, use_cache=True).logits
            said.append(logits[:, -1:].argmax(-1))
        return torch.cat(said, 1)

    def _logits(self, said: Any, cache: Any) -> Any:
        return self.model(said, past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)

    def _measured(self, row: Row, exact: Any, said: Any, wanted: Any) -> Row:
        """Add what the codec of a row does to a prompt. The forced tokens are the exact answer, so a greedy answer is the same
        exactly if each of its tokens is the most probable one."""
        cache = copy.deepcopy(exact)
        raw, stored, same = brought_back(cache, row.codec, self.kv_dtype)
        one = Measured(0.0, True, True)
        if not same:
            found = self._logits(said, cache)
            apart = float((wanted.exp() * (wanted - found)).sum(-1).mean())
            equal = wanted.argmax(-1) == found.argmax(-1)
            one = Measured(apart, bool(equal[0]), bool(equal.all()))
        prompts = [*row.prompts, one]
        return Row(row.codec, row.raw_bytes + raw, row.stored_bytes + stored, row.exact and same, prompts)


def opened(name: str, dtype: str = "auto", kv_dtype: str = "", device: str = "") -> Subject:
    """Read a model. dtype, kv_dtype: names of dtypes of PyTorch; "auto" and "" for the model's own. device: "" for a GPU if there
    is one, else the CPU.

    Raises:
        QualityError: the model cannot be read, or none of its KV can be rounded.
    """
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=kind)
    except (OSError, ValueError, ImportError) as error:
        raise QualityError(f"the model {name!r} cannot be read: {str(error).splitlines()[0]}") from None
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Subject(model, tokenizer, getattr(torch, kv_dtype) if kv_dtype else None)


def brought_back(cache: DynamicCache, codec: str, dtype: Any) -> tuple[int, int, bool]:
    """Encode and decode all keys and values of a cache, in place, as KV of this dtype. Return the bytes of that, those of the
    encoded KV, and whether all of it came back bit by bit.

    Raises:
        QualityError: the cache has no keys and values.
    """
    raw = stored = 0
    same = True
    for layer in getattr(cache, "layers", ()):
        for name in ("keys", "values"):
            plane = getattr(layer, name, None)
            if not isinstance(plane, torch.Tensor) or not plane.numel():
                continue  # a state, or a layer that shares the KV of another one
            rows = plane.detach()[0].transpose(0, 1).to("cpu", dtype).contiguous()  # [tokens, heads, elements]
            form = Form.INT4 if name == "values" else Form.INT8
            back, size = two_ways(rows, form) if codec == "k8v4" else one_way(rows, codec)
            raw, stored = raw + rows.nbytes, stored + size
            same = same and torch.equal(back.view(torch.uint8), rows.view(torch.uint8))
            setattr(layer, name, back.transpose(0, 1)[None].to(plane.device, plane.dtype).contiguous())
    if not raw:
        raise QualityError("the model's cache has no keys and values: there is nothing to measure")
    return raw, stored, same


def two_ways(rows: torch.Tensor, form: Form) -> tuple[torch.Tensor, int]:
    """Return values [tokens, heads, elements] as an engine that stores them in this form loads them, and the bytes stored.

    Raises:
        LayoutError: they cannot have this form.
        Unroundable: a value is not finite.
    """
    tokens, dtype = rows.shape[0], str(rows.dtype).removeprefix("torch.")
    back = torch.empty_like(rows)
    stored: Any = None
    for tensor, way in ((rows, "gather"), (back, "scatter")):
        plane = Plane.of(tensor, "thd", tokens)
        paged = PagedKV((plane,), tokens, 1, rows.element_size(), tensor).rounded((form,), dtype)
        stored = np.empty(paged.shard_bytes(tokens), np.uint8) if stored is None else stored
        run = np.array([(0, 0, tokens, 0)], dtype=np.int64)
        getattr(CpuCopier(paged, tokens), way)(stored.ctypes.data, np.zeros(1, dtype=np.int32), run)
    return back, stored.nbytes


def one_way(rows: torch.Tensor, codec: str) -> tuple[torch.Tensor, int]:
    """Return values [tokens, heads, elements] as a tier with this codec gives them back, and the bytes that it stores."""
    dtype, size = str(rows.dtype).removeprefix("torch."), rows.nbytes
    payload = memoryview(rows.view(torch.uint8).numpy().reshape(-1))
    place: Any = np.empty(size, np.uint8)
    into, row = memoryview(place), Layout("", dtype, 1, 1, rows.shape[-1], 1, codec=1).rounded_row
    stored, coded = 0, coding.AS_IT_IS
    if codec == "int8" and coding.rounds(dtype, row):
        stored = coding.encode_rounded(payload, dtype, row, into)
        coded = coding.coding_of_rounded(into[:stored], size) if stored else coded
    if codec != "none" and not stored and dtype in coding.PACKABLE:
        stored = coding.encode(payload, into)
        coded = coding.coding_of(payload) if stored else coded
    if not stored:
        return rows, size
    if not coding.decode(coded, stored, into):
        raise QualityError(f"{codec} did not bring back what it had encoded; please report it")
    return torch.from_numpy(place).view(rows.dtype).reshape(rows.shape), stored


def resampled(values: Sequence[float]) -> tuple[float, float]:
    """Return the interval of 95 % of the mean, by resampling."""
    chance = random.Random(0)
    means = sorted(statistics.fmean(chance.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return means[_RESAMPLES // 40], means[-_RESAMPLES // 40 - 1]


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the interval of 95 % of a share, by Wilson's formula."""
    z, share = 1.96, hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    width = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return max(0.0, middle - width), min(1.0, middle + width)
