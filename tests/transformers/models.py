"""A user's script for Transformers that does what it is told on stdin, as `commands.serve` says.

Run by the tests: `python models.py FOLDER`. Commands: the functions `do_*`. Prompts are named by (tokens, seed). Models are on
the device that LMCACHE_TEST_DEVICE names, by default a CPU.
"""

from __future__ import annotations

import copy
import hashlib
import os
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import torch
from commands import PATIENCE, serve, set_deadline
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from lmcache.bench import quality
from lmcache.engine import connection
from lmcache.engine.blending import Blending
from lmcache.integration.transformers import Attached, attach
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

VOCABULARY = 8192
MODULE = sys.modules[attach.__module__]
DEVICE = os.environ.get("LMCACHE_TEST_DEVICE", "cpu")


class State:
    """The model as it came, and what LMCache is attached to."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
        self.plain = self.model.generate
        self.attached: Attached | None = None
        self.kept: Any = None
        self.make_cache: Any = None
        self.gone_on = threading.Event()
        self.stamps: Mock | None = None


def prompt(tokens: int, seed: int, shared: int = 0) -> torch.Tensor:
    """[1, tokens] token ids; the first `shared` are the same for all seeds."""
    first = torch.randint(1, VOCABULARY, (1, shared), generator=torch.Generator().manual_seed(1))
    rest = torch.randint(1, VOCABULARY, (1, tokens - shared), generator=torch.Generator().manual_seed(1000 + seed))
    return torch.cat([first, rest], dim=1).to(DEVICE)


def do_attach(state: State, connected: bool = True, **options: Any) -> dict[str, Any]:
    """connected: there is a server, and it is waited for."""
    if state.attached is not None:
        state.attached.close()
    state.attached = _attach(state.model, connected, **options)
    return {"refusal": state.attached.refusal}


def _attach(model: Any, connected: bool = True, **options: Any) -> Attached:
    """With patience, so that a busy machine makes no miss of a hit."""
    connection.START_SECONDS = PATIENCE if connected else 0.0
    return attach(model, **{"deadline_seconds": PATIENCE} | options)


def do_deadline(state: State, seconds: float) -> dict[str, Any]:
    """Of all calls to the server from now on."""
    assert set_deadline(seconds)
    return {}


def do_wait_connected(state: State, seconds: float) -> bool:
    assert state.attached is not None
    return state.attached.wait_connected(seconds)


def do_hold_hashing(state: State) -> dict[str, Any]:
    """From now on weights of 1,000 bytes count as large, and hashing them waits until `go_on`."""
    from lmcache.engine import identity
    from lmcache.engine import tensors as module

    digest_of, gone_on = module._digest_of, threading.Event()

    def held(tensors: Any, unwanted: threading.Event) -> str:
        while not (gone_on.wait(0.01) or unwanted.is_set()):
            pass
        return digest_of(tensors, unwanted)

    identity._AT_ONCE_BYTES, module._digest_of, state.gone_on = 1000, held, gone_on
    return {}


def do_count_stamps(state: State) -> int:
    """How often all weights have been read to see whether they changed, since this was asked first."""
    if state.stamps is None:
        stamp = MODULE.weights_stamp  # type: ignore[attr-defined]
        state.stamps = Mock(side_effect=stamp)
        MODULE.weights_stamp = state.stamps  # type: ignore[attr-defined]
    return int(state.stamps.call_count)


def do_hashing_threads(state: State) -> int:
    return sum(thread.name == "lmcache-identity" for thread in threading.enumerate())


def do_go_on(state: State) -> dict[str, Any]:
    state.gone_on.set()
    return {}


def do_foresee(state: State, tokens: int) -> dict[str, Any]:
    """How much room there is for an answer, whatever was asked for."""
    MODULE._FORESEEN_TOKENS = tokens  # type: ignore[attr-defined]
    return {}


def do_close(state: State) -> dict[str, Any]:
    assert state.attached is not None
    state.attached.close()
    state.attached = None
    return {"own generate": state.model.generate.__func__ is type(state.model).generate}


def do_close_within(state: State, ids: list[int]) -> bool:
    """Call `close` while generate runs, as another thread may; whether the answer is right."""
    tokens, options = prompt(*ids), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = state.plain(tokens, **options)
    hook = state.model.register_forward_hook(lambda *_: state.attached.close())  # type: ignore[union-attr]
    answer = state.model.generate(tokens, **options)
    hook.remove()
    state.attached = None
    return bool(torch.equal(answer, expected))


def do_outlive(state: State, ids: list[int]) -> dict[str, Any]:
    """`generate` whose server ends once the prompt has been loaded; it goes on when there is another."""
    assert state.attached is not None and state.attached._rank is not None
    rank, waiting, hit = state.attached._rank, [True], state.attached.hit_tokens
    before = rank.scheduler.epoch

    def wait(*_: Any) -> None:
        if waiting:
            waiting.clear()
            print("it waits for another server", file=sys.stderr, flush=True)
            while before == rank.scheduler.epoch or rank.worker.mapped_epoch != rank.scheduler.epoch:
                threading.Event().wait(0.01)

    hook = state.model.register_forward_pre_hook(wait)
    answer = state.model.generate(prompt(*ids), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    hook.remove()
    return {"tokens": len(answer[0]), "hit": state.attached.hit_tokens - hit, "flushed": state.attached.flush()}


def do_generate(state: State, ids: list[int], new: int = 8, **more: Any) -> dict[str, Any]:
    """With LMCache and without, greedily: whether tokens and logits are the same, and what came from the cache."""
    assert state.attached is not None
    tokens = torch.tensor(prompt(*ids).tolist() * more.pop("batch", 1), device=DEVICE)
    if more.pop("padded", False):
        mask = torch.ones_like(tokens)
        mask[:, :3] = 0
    else:
        mask = torch.ones_like(tokens)
    masked = more.pop("masked", True)
    if (pad := more.get("pad_token_id")) is not None:
        tokens[:, :3] = pad
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, **more}
    if masked:
        options["attention_mask"] = mask
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = state.plain(tokens, **options)
    before = state.attached.hit_tokens, state.attached.stored_tokens
    if state.attached.flush() and state.attached._pool is not None:  # nothing that an earlier prompt has left is right
        for memory in (*state.attached._pool._memory, *state.attached._pool._states):
            memory.view(torch.float32).fill_(torch.nan)
    answer = state.model.generate(tokens, **options)
    flushed = state.attached.flush()
    return {
        "same": torch.equal(answer.sequences, expected.sequences),
        "difference": max(
            float((ours - theirs).abs().max()) for ours, theirs in zip(answer.logits, expected.logits, strict=True)
        ),
        "tokens": answer.sequences[0].tolist(),
        "hit": state.attached.hit_tokens - before[0],
        "stored": state.attached.stored_tokens - before[1],
        "flushed": flushed,
        "refusal": state.attached.refusal,
    }


def do_refused_chats(state: State) -> list[str]:
    """What a check says of a tokenizer without a chat template, and of messages that a template refuses."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    subject, said = quality.Subject(state.model, tokenizer), list[str]()
    for template in (None, "{{ raise_exception('no such role') }}"):
        tokenizer.chat_template = template
        try:
            subject.chat([{"role": "user", "content": "a"}])
        except quality.QualityError as error:
            said.append(str(error))
    return said


def do_quality(state: State, ids: list[list[int]], tokens: int, codecs: list[str], broken: bool = False) -> Any:
    """What codecs do to KV of bfloat16, as `lmcache codec check` says. broken: as if all KV came back as zeros."""
    one_way = quality.one_way
    if broken:
        quality.one_way = lambda rows, codec: (torch.zeros_like(rows), 1) if codec == "int8" else one_way(rows, codec)
    try:
        subject = quality.Subject(state.model, None, torch.bfloat16)
        rows = subject.measure([prompt(*one)[0].tolist() for one in ids], codecs, tokens)
    finally:
        quality.one_way = one_way
    return [one.told() for one in rows]


def do_generate_in_inference_mode(state: State, ids: list[int]) -> dict[str, Any]:
    """As `do_generate`, within `torch.inference_mode`."""
    with torch.inference_mode():
        return do_generate(state, ids)


def do_continue(state: State, ids: list[int], turns: int) -> dict[str, Any]:
    """A conversation: each prompt is the one before, with its answer and more. Hits of each turn."""
    assert state.attached is not None
    tokens, hits, same = prompt(*ids), [], True
    for turn in range(turns):
        expected = state.plain(tokens, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        before = state.attached.hit_tokens
        answer = state.model.generate(tokens, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        same &= torch.equal(answer, expected)
        hits.append(state.attached.hit_tokens - before)
        tokens = torch.cat([answer, prompt(13, 500 + turn)], dim=1)
    return {"same": same, "hits": hits}


def do_keep(state: State, ids: list[int]) -> dict[str, Any]:
    """A cache that generate gave back is the caller's: other prompts leave it alone, and it can be gone on with."""
    tokens = prompt(*ids)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    expected, answer = state.plain(tokens, **options), state.model.generate(tokens, **options)
    for seed in range(3):
        state.model.generate(prompt(len(tokens[0]), 300 + seed), max_new_tokens=4, do_sample=False)
    both = zip(answer.past_key_values.layers, expected.past_key_values.layers, strict=True)
    pairs = [(a, b) for a, b in both if hasattr(b, "keys")]
    kept = all(
        torch.allclose(a.keys, b.keys, atol=1e-4) and torch.allclose(a.values, b.values, atol=1e-4) for a, b in pairs
    )
    more = [
        state.plain(given.sequences, past_key_values=given.past_key_values, max_new_tokens=4, do_sample=False)
        for given in (answer, expected)
    ]
    return {"kept": kept, "same": torch.equal(*more)}


def do_spoil(state: State, group: int | None) -> int:
    """From now on the KV of one group is not the prompt's once it has been loaded; None: it is again. Returns how many groups
    there are."""
    from lmcache.integration.transformers.pool import Pool

    if state.make_cache is None:
        state.make_cache = Pool.cache
    make = state.make_cache

    def spoiled(pool: Pool, tokens: int, *more: Any) -> Any:
        if tokens and group is not None:
            numbers = [*pool._memory, *pool._states][group].view(torch.float32)
            numbers.copy_(torch.randn(numbers.shape, generator=torch.Generator().manual_seed(group)))
        return make(pool, tokens, *more)

    Pool.cache = spoiled  # type: ignore[method-assign]
    assert state.attached is not None and state.attached._pool is not None
    return len(state.attached._pool.tables())


def do_train(state: State, layer: int, scale: float, one: bool = False) -> dict[str, Any]:
    """Change a weight in place, as an optimizer does; or one number in it, past all that PyTorch keeps count of."""
    weight = state.model.model.layers[layer].self_attn.v_proj.weight
    with torch.no_grad():
        if one:
            weight.data[1, 2] *= scale
        else:
            weight.mul_(scale)
    return {}


def do_adapt(state: State, layer: int) -> dict[str, Any]:
    """Put an adapter into the model, as PEFT does: it exchanges layers, and leaves its configuration at the model."""

    class Adapted(torch.nn.Module):
        def __init__(self, base: torch.nn.Module) -> None:
            super().__init__()
            self.base_layer = base
            self.scale = torch.nn.Parameter(torch.tensor(1.5, device=DEVICE))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.scale * self.base_layer(hidden)

    attention = state.model.model.layers[layer].self_attn
    attention.v_proj = Adapted(attention.v_proj)
    state.model.peft_config = {"default": "LORA"}
    return {}


def do_checksums(state: State) -> list[int]:
    """Of some numbers, of the same bytes elsewhere, and of the numbers with one bit changed and in other orders, each once."""
    from lmcache.engine.tensors import checksum

    a, b = torch.tensor([1.5, 2.0]), torch.tensor([2.0, 1.5])  # a vector that begins with numbers in other orders
    sign, vector = torch.tensor([3.0, -3.0]), torch.arange(9000.0)
    quads = [torch.cat(four) for four in ((a, b, b, a), (b, a, a, b))]
    orders = [torch.cat([*quads, sign, vector]), torch.cat([*quads[::-1], sign, vector])]
    orders += [torch.cat([*quads, sign.flip(0), vector]), torch.cat([*quads, sign, vector.flip(0)])]
    orders += [torch.cat([*quads, sign, vector.reshape(-1, 2).flip(1).reshape(-1)])]
    orders += [torch.cat([vector, *quads, sign]), torch.cat([*quads, sign, vector[4096:], vector[:4096]])]
    numbers = [one.view(torch.uint8) for one in orders]
    for place in (0, 4 * 4096, len(numbers[0]) - 1):
        numbers.append(numbers[0].clone())
        numbers[-1][place] ^= 128
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), numbers[0]])[3:]
    return [int(checksum(one)) for one in (shifted, *numbers)]


def do_layouts(state: State) -> list[str]:
    """Digests of the model's configuration as it is, and with another base of RoPE."""
    from lmcache.engine.identity import named
    from lmcache.integration.transformers.model import kv_shape, served_kv
    from lmcache.integration.transformers.pool import Pool

    shape, before = kv_shape(state.model), state.model.config
    pool, configs = Pool(shape, 1), [before, copy.deepcopy(before)]
    configs[1].rope_parameters = {**before.rope_parameters, "rope_theta": 12345.0}
    digests = []
    for state.model.config in configs:
        digests += [one.model.config_digest for one in served_kv(state.model, shape, pool, named("model"))]
    state.model.config = before
    return digests


def do_mode(state: State, training: bool) -> dict[str, Any]:
    state.model.train(training)
    return {}


def do_kinds(state: State, address: str) -> dict[str, Any]:
    """What attach says of small models of other kinds: name -> refusal, and whether generate works."""
    from transformers import GPT2Config, JambaConfig, LlamaConfig, MistralConfig, Qwen2Config

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 0,
        "bos_token_id": 0,
    }
    configs = {
        "llama": LlamaConfig(**small, **heads),
        "gpt2": GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
        "sliding": MistralConfig(**small, **heads, sliding_window=16),
        "mixed": Qwen2Config(**small, **heads, use_sliding_window=True, sliding_window=16, max_window_layers=1),
        "dynamic rope": LlamaConfig(
            **small, **heads, rope_scaling={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        ),
        "forgetting": JambaConfig(
            **small, **heads, attn_layer_period=2, attn_layer_offset=1, num_experts=1, use_mamba_kernels=False
        ),
    }
    answers = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
        tokens = torch.randint(1, 128, (1, 50), generator=torch.Generator().manual_seed(3)).to(DEVICE)
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        expected = model.generate(tokens, **options)
        with _attach(model, address=address) as attached:
            first = model.generate(tokens, **options)
            attached.flush()
            second = model.generate(tokens, **options)
            answers[name] = {
                "refusal": attached.refusal,
                "same": torch.equal(first, expected) and torch.equal(second, expected),
                "hit": attached.hit_tokens,
            }
    return answers


SEPARATOR = [8100, 8101]


def do_attach_blending(state: State, connected: bool = True, **options: Any) -> dict[str, Any]:
    """As `do_attach`; the options of `Blending` are in `blending`."""
    blending = Blending(separator=tuple(SEPARATOR), **options.pop("blending", {}))
    answer = do_attach(state, connected, blending=blending, **options)
    assert state.attached is not None
    return answer | {"blending_refusal": state.attached.blending_refusal}


def _documents(seeds: list[int], beginning: int = 10, length: int = 70, question: int = 12) -> torch.Tensor:
    """A beginning, documents between separators, and a question. Documents are of `length` tokens or a few more."""
    parts = [prompt(beginning, 900)[0] % 8000]
    for seed in seeds:
        parts += [torch.tensor(SEPARATOR, device=DEVICE), prompt(length + seed, seed)[0] % 8000]
    parts += [torch.tensor(SEPARATOR, device=DEVICE), prompt(question, 901)[0] % 8000]
    return torch.cat(parts)[None]


def do_blend(state: State, documents: list[int], named: bool = False, **more: Any) -> dict[str, Any]:
    """`generate` with these documents in this order. digest: of all logits. named: the boundaries are given, with no separator
    in the settings."""
    attached = state.attached
    assert attached is not None
    tokens = _documents(documents, **more)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = state.plain(tokens, **options)
    counted = "hit_tokens", "stored_tokens", "blended_requests", "blended_tokens", "recomputed_tokens"
    before = {name: getattr(attached, name) for name in counted}
    if attached.flush() and attached._pool is not None:  # nothing that an earlier prompt has left is right
        for memory in attached._pool._memory:
            memory.view(torch.float32).fill_(torch.nan)
    if named:
        ends = [0, *(place for place, token in enumerate(tokens[0].tolist()) if token == SEPARATOR[1])]
        options["blend_boundaries"] = [end + 1 for end in ends[1:]]
    answer = state.model.generate(tokens, **options)
    assert attached.flush()
    logits = torch.stack(answer.logits).float()
    return {
        "same": torch.equal(answer.sequences, expected.sequences),
        "difference": float((logits - torch.stack(expected.logits).float()).abs().max()),
        "finite": bool(logits.isfinite().all()),
        "digest": hashlib.sha256(logits.cpu().numpy().tobytes()).hexdigest(),
        "refusal": attached.refusal + attached.blending_refusal,
        **{name.removesuffix("_tokens"): getattr(attached, name) - before[name] for name in counted},
    }


def do_break_loads_of_passages(state: State) -> dict[str, Any]:
    """From now on loads of passages fail in the worker, as if the server were another one."""
    from lmcache.integration.transformers.passages import Passages

    load = Passages._load

    def broken(self: Any, part: Any, usable: Any, after: Any) -> Any:
        part.request.hit = part.request.hit._replace(epoch=b"another server's")
        return load(self, part, usable, after)

    Passages._load = broken  # type: ignore[method-assign]
    return {}


def do_blend_kinds(state: State, address: str) -> dict[str, Any]:
    """Models of one layer, whose KV does not depend on what stood before, so that blended KV is exact if it was turned right:
    name -> refusals, what was blended, how far logits are from those without LMCache, and the error of turned keys relative to
    those that the model computes there, in float32 and in bfloat16."""
    import transformers as hf

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 0,
        "bos_token_id": 0,
    }
    scaled = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    llama3 = {**scaled, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    configs = {
        "llama": hf.LlamaConfig(**small, **heads),
        "linear": hf.LlamaConfig(**small, **heads, rope_parameters={**scaled, "rope_type": "linear"}),
        "yarn": hf.LlamaConfig(**small, **heads, rope_parameters={**scaled, "rope_type": "yarn"}),
        "llama3": hf.LlamaConfig(**small, **heads, rope_parameters=llama3),
        "qwen3": hf.Qwen3Config(**small, **heads, head_dim=16),
        "neighbours": hf.CohereConfig(**small, **heads),
        "partial neighbours": hf.GlmConfig(**small, **heads, head_dim=16, partial_rotary_factor=0.5),
        "partial halves": hf.PhiConfig(**small, **heads, partial_rotary_factor=0.5),
        "no rope": hf.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0),
        "window": hf.MistralConfig(**small, **heads, sliding_window=16),
        "dynamic": hf.LlamaConfig(**small, **heads, rope_parameters={**scaled, "rope_type": "dynamic"}),
    }
    answers, kept = {}, (state.model, state.plain)
    for name, config in configs.items():
        torch.manual_seed(0)
        state.model = AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
        state.plain, errors = state.model.generate, _turn_errors(state.model)
        refusals = do_attach_blending(state, address=address, blending={"min_tokens": 32, "links": 0, "choose": "none"})
        do_blend(state, [1, 2])
        answers[name] = refusals | do_blend(state, [3, 2, 1]) | {"errors": errors}
        do_close(state)
    state.model, state.plain = kept
    return answers


def _turn_errors(model: Any) -> list[float]:
    """Of keys that the model computes at position 5 and that are turned to 1305, in float32 and in bfloat16."""
    from lmcache.errors import LayoutError
    from lmcache.integration.transformers import rope
    from lmcache.integration.transformers.model import kv_shape

    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(model).to(dtype)
        try:
            turns = rope.turns_of(model, kv_shape(model))
        except LayoutError:
            return []
        come, go = (rope._keys_at(model, place, [0])[0] for place in (5, 1305))
        places = (torch.tensor([place], device=DEVICE) for place in (5, 1305))
        errors.append(float((turns[0].turned(come, *places).float() - go.float()).norm() / go.float().norm()))
    return errors


def do_turns_of_odd_keys(state: State) -> dict[str, list[str]]:
    """How keys of models of two layers turn, of which the first has keys with a few elements that are much larger than all others
    (in bfloat16), no keys but zeros of the tried token, or no keys but zeros of the first ones."""
    import transformers as hf
    from lmcache.errors import LayoutError
    from lmcache.integration.transformers import rope
    from lmcache.integration.transformers.model import kv_shape

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    found = {}
    for name in ("outliers", "zeros", "first zeros"):
        torch.manual_seed(0)
        config = hf.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(DEVICE).eval()
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.bias.normal_()
            if name == "outliers":  # in the pairs that turn least
                model.model.layers[0].self_attn.k_proj.bias[7::8] = 300.0
            else:
                model.model.embed_tokens.weight[: 4 if name == "first zeros" else None] = 0
        try:
            found[name] = [turn.pairs for turn in rope.turns_of(model, kv_shape(model))]
        except LayoutError as error:
            found[name] = [str(error)]
    return found


def do_own_cache(state: State, ids: list[int]) -> dict[str, Any]:
    """A caller with a cache of their own is left alone."""
    tokens, cache = prompt(*ids), DynamicCache(config=state.model.config)
    answer = state.model.generate(tokens, past_key_values=cache, max_new_tokens=2, do_sample=False)
    return {"filled": cache.get_seq_length() >= tokens.shape[1], "tokens": answer.shape[1]}


if __name__ == "__main__":
    assert Path(sys.argv[1]).is_dir()
    serve(globals(), State(sys.argv[1]))
