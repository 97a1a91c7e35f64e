"""Blending in vLLM's own model: tokens in the middle of a request are computed again, over its blocks, in a forward of their own.

vLLM computes a request from some token on, to its end. To compute other tokens, each run of them becomes a request of its own for
the attention kernels: its queries are the run, its sequence ends with the run, and its block table is that of the request. What
tokens are chosen by is seen at vLLM's `Attention` modules, which all models share; no model's code is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from lmcache.chunks.passages import Passage
from lmcache.engine.attended import paid, rows_at_once
from lmcache.engine.blending import QUESTION_TOKENS, Blend, Tokens, consecutive
from lmcache.engine.rope import Turn, found_turns, tried_positions
from lmcache.errors import LayoutError
from lmcache.integration.vllm.paged import Registered
from lmcache.integration.vllm.runner import noted_runner
from lmcache.transfer.copier import make_copiers

_MOST_AT_ONCE = 1024
"""Tokens of one forward, and of what is computed between two steps. More are computed in several forwards, of which a later one
sees what an earlier one has computed."""
_ROPE = ("RotaryEmbedding", "Llama3RotaryEmbedding", "YaRNScalingRotaryEmbedding")
"""vLLM's modules whose angles depend on the position alone."""


class Blender:
    """Computes tokens of requests with the model of this process.

    Args:
        layer_names: of the layers with KV, in the order of an extent.
        spec: vLLM's spec of their KV.
        registered: where their KV lies, on a CPU.

    Raises:
        LayoutError: tokens in the middle of a prompt cannot be computed with this model; the message says why.
    """

    def __init__(self, vllm_config: Any, layer_names: Sequence[str], spec: Any, registered: Registered) -> None:
        if (runner := noted_runner()) is None:
            raise LayoutError("blending does not find the model runner of this release of vLLM")
        self._config, self._model = vllm_config, runner.get_model()
        self._names, self._registered = list(layer_names), registered
        self._most_tokens = int(vllm_config.model_config.max_model_len)
        self.at_once = min(_MOST_AT_ONCE, int(vllm_config.scheduler_config.max_num_batched_tokens))
        """Tokens of one forward: no more than vLLM computes in a step."""
        layers = vllm_config.compilation_config.static_forward_context
        if sorted(layers) != sorted(layer_names):
            raise LayoutError("blending needs a model whose layers all are attention with KV of their own")
        self._layers = [layers[name] for name in layer_names]
        for name, layer in zip(layer_names, self._layers, strict=True):
            _refuse_layer(name, layer)
        builder = self._layers[0].get_attn_backend().get_builder_cls()
        self._metadata = builder(spec, self._names, vllm_config, torch.device("cpu"))
        paged, size = registered.paged, registered.paged.planes[0]
        pairs = [(paged.part(2 * at, 2 * at + 2, 0, size.heads), self._most_tokens) for at in range(len(self._layers))]
        self._copiers = make_copiers(pairs)
        self._kv = torch.empty((2, self._most_tokens, size.heads, size.dims), dtype=vllm_config.model_config.dtype)
        """The keys and values of one layer's first tokens, while a layer looks at them."""
        self.turns = self._found_turns()

    def compute(self, tokens: Sequence[int], blocks: Sequence[int], blend: Blend) -> Generator[int, None, Tokens]:
        """Compute what has no KV before the question, and some of the blended tokens again. Return the latter. Before each
        forward its number of tokens is yielded, so that the engine's steps can go on between them.

        tokens: the prompt. blocks: its blocks, which hold exact KV of the first `blend.have` tokens, and that of the blended
        ones."""
        settings, again = blend.settings, blend.links
        ids, table = torch.tensor(tokens), torch.tensor(blocks, dtype=torch.int32)
        yield from self._compute(ids, table, blend.first())
        if settings.choose == "none" or not settings.recompute_ratio:
            return again
        score = self._attended if settings.choose == "query" else self._deviation
        chosen = blend.chosen((yield from score(ids, table, blend)))
        yield from self._compute(ids, table, blend.then(chosen))
        return np.union1d(again, chosen)

    # Forwards

    def _compute(self, ids: torch.Tensor, table: torch.Tensor, tokens: Tokens) -> Iterator[int]:
        """Compute these tokens over the KV of those before them, and put theirs into the blocks."""
        for part in self._parts(tokens):
            yield len(part)
            self._forward(ids, table, part)

    def _forward(self, ids: torch.Tensor, table: torch.Tensor, tokens: Tokens) -> None:
        places, size = torch.from_numpy(tokens), self._block_tokens
        slots = table.long()[places // size] * size + places % size
        metadata = self._metadata.build(0, _as_requests(consecutive(tokens), places, table, slots))
        with set_forward_context(
            *(dict.fromkeys(self._names, metadata), self._config),
            num_tokens=len(places),
            slot_mapping=dict.fromkeys(self._names, slots),
            skip_compiled=True,
        ):
            self._model(input_ids=ids[places], positions=places)

    def _apart(self, ids: torch.Tensor, places: torch.Tensor) -> None:
        """Run the model on tokens that have no blocks. Hooks give what its attention answers."""
        with set_forward_context(None, self._config, num_tokens=len(ids), slot_mapping={}, skip_compiled=True):
            self._model(input_ids=ids, positions=places)

    def _parts(self, tokens: Tokens) -> list[Tokens]:
        return [tokens[at : at + self.at_once] for at in range(0, len(tokens), self.at_once)]

    @property
    def _block_tokens(self) -> int:
        return self._registered.paged.block_tokens * self._registered.blocks_per_block

    # Which tokens matter

    def _attended(
        self, ids: torch.Tensor, table: torch.Tensor, blend: Blend
    ) -> Generator[int, None, npt.NDArray[np.float32]]:
        """Return the attention that the question pays to each token before it. The question's own KV is put nowhere."""
        begin = max(blend.end, len(ids) - QUESTION_TOKENS)
        yield len(ids) - begin
        scores = torch.zeros(blend.end)

        def answer(number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            layer = self._layers[number]
            before = self._read(number, table, blend.end)
            keys, values = (
                torch.cat([old, new.view(-1, *old.shape[1:])]).transpose(0, 1).float()
                for old, new in zip(before, (key, value), strict=True)
            )
            queries = query.view(len(query), layer.num_heads, layer.head_size).transpose(0, 1)
            seen = torch.arange(keys.shape[1])[None] <= blend.end + torch.arange(len(query))[:, None]
            answers = []
            for rows in torch.arange(len(query)).split(rows_at_once(layer.num_heads, keys.shape[1])):
                weights = paid(queries[:, rows], keys, layer.impl.scale, seen[rows])
                scores.add_(weights[..., : blend.end].sum(dim=(0, 1)))
                of_kv_heads = weights.view(layer.num_kv_heads, -1, weights.shape[-1])
                answers.append((of_kv_heads @ values).view(*weights.shape[:2], -1))
            return torch.cat(answers, dim=1).transpose(0, 1).flatten(1).to(query.dtype)

        with self._answered(answer):
            self._apart(ids[begin:], torch.arange(begin, len(ids)))
        found: npt.NDArray[np.float32] = scores.numpy()
        return found

    def _deviation(
        self, ids: torch.Tensor, table: torch.Tensor, blend: Blend
    ) -> Generator[int, None, npt.NDArray[np.float32]]:
        """Return how far the keys of each token at the layer that is looked at are from the blended ones. The KV of the layers
        before it is computed anew for all tokens."""
        check, scores = blend.settings.check_layer, np.zeros(blend.end, dtype=np.float32)
        if check >= len(self._layers):
            raise LayoutError(f"check_layer is {check}, and the model has {len(self._layers)} layers")
        keys = self._read(check, table, blend.end)[0].float()
        for part in self._parts(np.arange(blend.exact, blend.end, dtype=np.int64)):
            yield len(part)

            def look(_: Any, given: Any, part: Tokens = part) -> None:
                apart = given[1].view(len(part), *keys.shape[1:]).float() - keys[torch.from_numpy(part)]
                scores[part] = apart.square().sum(dim=(1, 2)).numpy()
                raise _Looked

            hook = self._layers[check].register_forward_pre_hook(look)
            try:
                with suppress(_Looked):
                    self._forward(ids, table, part)
            finally:
                hook.remove()
        return scores

    def _read(self, number: int, table: torch.Tensor, tokens: int) -> torch.Tensor:
        """Return the keys and values of the first tokens in one layer, [2, tokens, heads, size], until the next call."""
        blocks = np.asarray(self._registered.blocks(table.tolist()), dtype=np.int32)
        self._copiers[number].gather(self._kv.data_ptr(), blocks, np.array([[0, 0, tokens, 0]], dtype=np.int64))
        return self._kv[:, :tokens]

    @contextmanager
    def _answered(
        self, answer: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> Iterator[None]:
        """Let attention answer what this function makes of the layer's number, queries, keys and values, [tokens, ...]."""

        def after(number: int) -> Callable[..., torch.Tensor]:
            return lambda _, given, __: answer(number, *given[:3])

        hooks = [layer.register_forward_hook(after(number)) for number, layer in enumerate(self._layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    # RoPE

    def _found_turns(self) -> tuple[Turn, ...]:
        """Return how the keys of each layer turn: one token is computed at several positions, with nothing before it."""
        rates = _frequencies(self._model)
        places = tried_positions(self._most_tokens)
        found: list[torch.Tensor] = []

        def nothing(_: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            found.append(key.clone())
            return torch.zeros_like(query)

        # The first tokens may be padding, whose embedding is zero.
        token = int(self._config.model_config.get_vocab_size()) // 2
        with torch.inference_mode(), self._answered(nothing):
            self._apart(torch.full((len(places),), token), torch.tensor(places))
        if len(found) != len(self._layers):
            raise LayoutError("blending needs a model that calls each layer's attention once")
        keys = [
            layer_keys.view(len(places), layer.num_kv_heads, 1, layer.head_size)
            for layer, layer_keys in zip(self._layers, found, strict=True)
        ]
        return found_turns(keys, places, rates, self._names)


class _Looked(Exception):
    """Ends a forward at the layer that was looked at."""


def _as_requests(
    runs: Sequence[Passage], places: torch.Tensor, table: torch.Tensor, slots: torch.Tensor
) -> CommonAttentionMetadata:
    """Return what attention kernels are told of these runs: each is a request whose sequence ends with the run."""
    lengths = torch.tensor([run.tokens for run in runs], dtype=torch.int32)
    ends = torch.tensor([run.end for run in runs], dtype=torch.int32)
    starts = torch.zeros(len(runs) + 1, dtype=torch.int32)
    starts[1:] = lengths.cumsum(0)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=ends,
        num_reqs=len(runs),
        num_actual_tokens=len(places),
        max_query_len=int(lengths.max()),
        max_seq_len=int(ends.max()),
        block_table_tensor=table[None].repeat(len(runs), 1).contiguous(),
        slot_mapping=slots,
        causal=True,
        positions=places,
    )


def _refuse_layer(name: str, layer: Any) -> None:
    """Return if this layer's attention is what `Blender` computes by itself for the question.

    Raises:
        LayoutError: it is not.
    """
    impl = getattr(layer, "impl", None)
    odd = {
        "sinks": getattr(impl, "sinks", None) is not None,
        "a window": getattr(layer, "sliding_window", None) is not None,
        "a soft cap": bool(getattr(impl, "logits_soft_cap", None)),
        "ALiBi": getattr(impl, "alibi_slopes", None) is not None,
        "another layer's KV": getattr(layer, "kv_sharing_target_layer_name", None) is not None,
        "values of another size": getattr(layer, "head_size", 0) != getattr(layer, "head_size_v", 0),
    }
    found = [what for what, is_so in odd.items() if is_so]
    if found or not hasattr(impl, "scale"):
        raise LayoutError(f"blending is not there for attention with {found[0] if found else 'no scale'} ({name})")


def _frequencies(model: Any) -> list[torch.Tensor]:
    """Return the different inverse frequencies of the model's rotary modules, in float32.

    Raises:
        LayoutError: there is none, or one whose angles may depend on more than the position.
    """
    found: list[torch.Tensor] = []
    for module in model.modules():
        kind = type(module).__name__
        if "RotaryEmbedding" not in kind:
            continue
        if kind not in _ROPE:
            raise LayoutError(f"blending is not there for RoPE of vLLM's kind {kind}; known are {', '.join(_ROPE)}")
        rates = module._compute_inv_freq(module.scaling_factor if kind.startswith("YaRN") else module.base).float()
        if not any(rates.shape == one.shape and torch.equal(rates, one) for one in found):
            found.append(rates)
    if not found:
        raise LayoutError("blending needs a model with RoPE, and this one has no rotary module that vLLM knows")
    return found
