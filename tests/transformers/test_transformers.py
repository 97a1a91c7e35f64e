"""Reuse never changes an answer of `model.generate`, and nothing that happens to the server hurts it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ports import free_port
from servers import PATIENCE, Server, eventually

TOLERANCE = 1e-4 if os.environ.get("LMCACHE_TEST_DEVICE", "cpu") == "cpu" else 1e-3
"""Of float32 logits, whose spread is about 3: the same sums in another order."""

Scripts = Callable[[Path], Any]
Servers = Callable[..., Server]


def right(answer: dict[str, Any]) -> bool:
    return bool(answer["same"] and answer["difference"] < TOLERANCE and not answer["refusal"])


def test_the_second_generate_loads_what_the_first_has_stored(server: Servers, user: Any) -> None:
    one = server(l1=256, chunk=16)
    assert user.ask("attach", address=one.address)["refusal"] == ""
    first = user.ask("generate", ids=[300, 1])
    assert right(first) and first["hit"] == 0
    assert first["stored"] == (300 + 7) // 16 * 16  # the answer's KV too, but for its last token
    second = user.ask("generate", ids=[300, 1])
    assert right(second) and second["hit"] == 288  # the full chunks of the prompt
    assert second["stored"] == 0
    assert second["tokens"] == first["tokens"]


def test_hits_of_every_length(server: Servers, user: Any) -> None:
    """Prompts of 16 k - 1, 16 k and 16 k + 1 tokens; and prompts that share 100 tokens, which end inside a chunk."""
    one = server(l1=256, chunk=16)
    user.ask("attach", address=one.address)
    for tokens, hit in ((1, 0), (15, 0), (16, 15), (17, 16), (31, 16), (64, 63)):  # the last token is always computed
        assert right(user.ask("generate", ids=[tokens, tokens], new=17))
        again = user.ask("generate", ids=[tokens, tokens], new=17)
        assert right(again) and again["hit"] == hit
    first = user.ask("generate", ids=[200, 2, 100])
    branch = user.ask("generate", ids=[150, 3, 100])
    assert right(first) and right(branch) and branch["hit"] == 96


def test_a_conversation_grows(server: Servers, user: Any) -> None:
    one = server(l1=512, chunk=16)
    user.ask("attach", address=one.address)
    talk = user.ask("continue", ids=[300, 4], turns=4)
    assert talk["same"]
    # Turn n begins with 300 + 33 (n - 1) + 20 tokens whose KV is known but for the last one.
    assert talk["hits"] == [0] + [(300 + 33 * turn + 19) // 16 * 16 for turn in range(3)]


def test_a_tier_is_weighed_against_what_computing_takes(server: Servers, user: Any, tmp_path: Path) -> None:
    """`generate` tells how fast it has computed the prompts before this one."""
    one = server(l1=256, chunk=16, flags=("--l2", f"disk://{tmp_path}/tier?max_gb=1"))
    user.ask("attach", address=one.address)
    began = time.monotonic()
    assert right(user.ask("generate", ids=[900, 5], new=1))
    longest = time.monotonic() - began
    eventually(lambda: one.status()["tiers"][0]["counters"].get("kept_shards") == 900 // 16)
    one.clear()
    assert right(user.ask("generate", ids=[900, 5], new=1))
    computing = max(fetch["recompute_seconds"] or 0.0 for fetch in one.status()["fetches"])
    assert 0 < computing < longest


def test_rounded_kv_is_used_where_it_is_accepted_and_nowhere_else(server: Servers, user: Any, tmp_path: Path) -> None:
    """The prompt comes back from a tier with codec=int8: nearly the same logits, and for an exact model nothing at all."""
    one = server(l1=256, chunk=16, flags=("--worth", "always", "--l2", f"disk://{tmp_path}/tier?max_gb=1&codec=int8"))
    user.ask("attach", address=one.address, lossy_kv="int8", model_id="tiny")
    assert right(user.ask("generate", ids=[300, 8]))
    eventually(lambda: one.status()["tiers"][0]["codec"]["rounded_bytes"] > 0)
    eventually(lambda: one.status()["tiers"][0]["counters"].get("kept_shards") == (300 + 7) // 16)
    one.clear()
    again = user.ask("generate", ids=[300, 8])
    assert again["hit"] == 288 and TOLERANCE < again["difference"] < 0.5
    user.ask("attach", address=one.address, model_id="tiny")
    exact = user.ask("generate", ids=[300, 8])
    assert right(exact) and exact["hit"] == 0


def test_what_a_codec_does_to_answers_is_measured(user: Any) -> None:
    prompts, codecs = [[120, seed] for seed in range(6)], ["none", "pack12", "int8"]
    none, pack12, int8 = user.ask("quality", ids=prompts, tokens=4, codecs=codecs)
    for lossless in (none, pack12):
        assert lossless["bit_exact"] and lossless["kl"] == 0 and lossless["answer_same"] == 1
    assert none["ratio"] == 1 and 1.2 < pack12["ratio"] < 1.35 and 1.3 < int8["ratio"] < 2
    assert not int8["bit_exact"] and 0 < int8["kl"] < 0.01 and int8["prompts"] == 6
    assert int8["kl_interval"][0] <= int8["kl"] <= int8["kl_interval"][1] <= int8["kl_worst"]
    (broken,) = user.ask("quality", ids=prompts, tokens=4, codecs=["int8"], broken=True)
    assert broken["kl"] > 10 * int8["kl"] and broken["answer_same"] < 1
    without, refused = user.ask("refused_chats")
    assert "cannot turn [{'role': 'user', 'content': 'a'}] into a prompt: Cannot use chat template" in without
    assert refused.endswith("into a prompt: no such role")


def test_a_longer_answer_than_foreseen(server: Servers, user: Any) -> None:
    """The room is for 1,024 tokens. What does not fit is computed outside; what did fit is stored and found."""
    one = server(l1=512, chunk=16)
    user.ask("foresee", tokens=4)
    user.ask("attach", address=one.address)
    first = user.ask("generate", ids=[1010, 13], new=40)
    assert right(first) and first["stored"] == 1024
    again = user.ask("generate", ids=[1010, 13], new=40)
    assert right(again) and again["hit"] == 1008
    user.ask("foresee", tokens=2048)


def test_inference_mode_once_and_then_not(server: Servers, user: Any) -> None:
    """A tensor that is made in inference mode can be written to in no other mode."""
    user.ask("attach", address=server(l1=512, chunk=16).address)
    assert right(
        user.ask("generate_in_inference_mode", ids=[1500, 17])
    )  # the pool is made anew, since it was too small
    again = user.ask("generate", ids=[1500, 17])
    assert right(again) and again["hit"] == 1488
    assert right(user.ask("generate_in_inference_mode", ids=[1500, 17]))


def test_another_process_and_another_model(server: Servers, script: Scripts, model: Path, other_model: Path) -> None:
    one, first = server(l1=256, chunk=16), script(model)
    first.ask("attach", address=one.address)
    stored = first.ask("generate", ids=[300, 5])
    first.end()
    same, other = script(model), script(other_model)
    same.ask("attach", address=one.address)
    other.ask("attach", address=one.address)
    again = same.ask("generate", ids=[300, 5])
    assert right(again) and again["hit"] == 288 and again["tokens"] == stored["tokens"]
    differs = other.ask("generate", ids=[300, 5])
    assert right(differs) and differs["hit"] == 0 and differs["tokens"] != stored["tokens"]


def test_weights_that_change_and_salts(server: Servers, script: Scripts, model: Path) -> None:
    one, user = server(l1=256, chunk=16), script(model)
    user.ask("attach", address=one.address)
    before = user.ask("generate", ids=[300, 6])
    user.ask("train", layer=3, scale=1.5)
    after = user.ask("generate", ids=[300, 6])
    assert right(after) and after["hit"] == 0 and after["tokens"] != before["tokens"]
    assert user.ask("generate", ids=[300, 6])["hit"] == 288
    user.ask("train", layer=3, scale=1 / 1.5)  # exact for these numbers or not: what was there is never wrong
    assert right(user.ask("generate", ids=[300, 6]))
    user.ask("attach", address=one.address, cache_salt="another tenant")
    assert user.ask("generate", ids=[300, 6])["hit"] == 0


def test_one_number_that_is_written_past_pytorchs_counts(server: Servers, script: Scripts, model: Path) -> None:
    user = script(model)
    user.ask("attach", address=server(l1=256, chunk=16).address)
    user.ask("generate", ids=[100, 8], new=1)
    assert user.ask("generate", ids=[100, 8], new=1)["hit"] == 96
    user.ask("train", layer=3, scale=1e4, one=True)
    changed = user.ask("generate", ids=[100, 8], new=1)
    assert right(changed) and changed["hit"] == 0


def test_an_adapter_that_is_put_in_later(server: Servers, script: Scripts, model: Path) -> None:
    """It can be switched off and on without a trace in the weights."""
    user = script(model)
    user.ask("attach", address=server(l1=256, chunk=16).address)
    user.ask("generate", ids=[100, 7], new=1)
    user.ask("adapt", layer=3)
    adapted = user.ask("generate", ids=[100, 7], new=1)
    assert adapted["same"] and adapted["hit"] == adapted["stored"] == 0
    assert "merge_and_unload" in adapted["refusal"]


def test_another_configuration_is_another_layout(user: Any) -> None:
    assert len(set(user.ask("layouts"))) == 2


def test_checksums_of_weights_on_a_device(user: Any) -> None:
    shifted, plain, *changed = user.ask("checksums")
    assert plain == shifted and len({plain, *changed}) == 1 + len(changed)


def test_large_weights_are_hashed_while_generate_runs(server: Servers, script: Scripts, model: Path) -> None:
    one, user = server(l1=256, chunk=16), script(model)
    user.ask("hold_hashing")
    assert user.ask("attach", address=one.address)["refusal"] == ""
    for tokens in (300, 3000):  # more than the first pool has room for
        answer = user.ask("generate", ids=[tokens, 8])
        assert right(answer) and (answer["hit"], answer["stored"]) == (0, 0)
    user.ask("train", layer=3, scale=1.5)
    user.ask("go_on")
    eventually(lambda: user.said("have changed while they were hashed"))
    assert right(user.ask("generate", ids=[300, 8]))
    assert user.ask("wait_connected", seconds=PATIENCE)
    assert user.ask("generate", ids=[300, 8])["stored"] > 0
    assert user.ask("generate", ids=[300, 8])["hit"] == 288


def test_weights_are_not_read_without_a_server(server: Servers, script: Scripts, model: Path) -> None:
    """What has changed meanwhile is noticed at the first call with one."""
    port, user, other = free_port(), script(model), script(model)
    user.ask("attach", address=f"tcp://127.0.0.1:{port}", connected=False)
    assert user.ask("count_stamps") == 0
    user.ask("train", layer=3, scale=1.5)
    assert right(user.ask("generate", ids=[100, 8], new=1))
    assert user.ask("count_stamps") == 0
    one = server(l1=256, chunk=16, port=port)
    assert user.ask("wait_connected", seconds=PATIENCE)
    noticed = user.ask("generate", ids=[100, 8], new=1)
    assert right(noticed) and user.ask("count_stamps") > 0
    assert user.ask("wait_connected", seconds=PATIENCE)
    # By the first call already, where the weights were hashed before it began.
    assert noticed["stored"] + user.ask("generate", ids=[100, 8], new=1)["stored"] == 96
    other.ask("attach", address=one.address)
    first = other.ask("generate", ids=[100, 8], new=1)
    assert right(first) and first["hit"] == 0


def test_weights_that_are_trained_while_they_are_hashed(server: Servers, script: Scripts, model: Path) -> None:
    """Only the newest are hashed on, and nobody is told of the others."""
    one, user = server(l1=256, chunk=16), script(model)
    user.ask("hold_hashing")
    user.ask("attach", address=one.address)
    for _ in range(3):
        user.ask("train", layer=3, scale=1.1)
        assert user.ask("generate", ids=[100, 8], new=1)["stored"] == 0
        assert user.ask("hashing_threads") == 1
    user.ask("go_on")
    assert user.ask("wait_connected", seconds=PATIENCE)
    assert user.ask("generate", ids=[100, 8], new=1)["stored"] == 96
    user.ask("train", layer=3, scale=1.1)
    user.ask("hold_hashing")
    user.ask("generate", ids=[100, 8], new=1)
    assert user.ask("close") and user.ask("hashing_threads") == 0
    assert not user.said("LMCache serves nothing")


def test_what_is_none_of_ours(server: Servers, user: Any) -> None:
    """Batches, padding, beams, a caller's own cache, training: generate goes on without us, and one line says why."""
    one = server(l1=256, chunk=16)
    user.ask("attach", address=one.address)
    user.ask("generate", ids=[64, 7])
    for more, why in (
        ({"batch": 2}, "a batch of 2 prompts"),
        ({"padded": True}, "padding in attention_mask"),
        ({"num_beams": 2}, "several sequences"),
        ({"use_cache": False}, "past_key_values are the caller's"),
        ({"cache_implementation": "static"}, "cache_implementation is given"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens is given"),
        ({"prefill_chunk_size": 16}, "prefill_chunk_size is given"),  # it begins at the first token, whatever there is
    ):
        answer = user.ask("generate", ids=[64, 7], new=4, **more)
        assert right(answer) and answer["hit"] == 0, more
        assert user.said(why)
    assert user.ask("own_cache", ids=[64, 7]) == {"filled": True, "tokens": 66}
    user.ask("mode", training=True)
    assert user.ask("generate", ids=[64, 7])["hit"] == 0
    user.ask("mode", training=False)
    assert user.ask("generate", ids=[64, 7])["hit"] == 63


def test_padding_that_nobody_has_named(server: Servers, user: Any) -> None:
    """Without a mask Transformers takes each padding token for padding, and hides it from the others."""
    user.ask("attach", address=server(l1=64, chunk=16).address)
    ids, tokens = [64, 12], {"pad_token_id": 0, "eos_token_id": 1}
    assert right(user.ask("generate", ids=ids, **tokens))
    hidden = user.ask("generate", ids=ids, masked=False, **tokens)
    assert right(hidden) and hidden["hit"] == hidden["stored"] == 0 and user.said("pass attention_mask")
    seen = user.ask("generate", ids=ids, **tokens)
    assert right(seen) and seen["hit"] == 63
    same = user.ask("generate", ids=ids, masked=False, pad_token_id=0, eos_token_id=0)
    assert right(same) and same["hit"] == 63, "then it stands for itself"


def test_a_cache_that_was_given_back_stays(server: Servers, user: Any) -> None:
    one = server(l1=256, chunk=16)
    user.ask("attach", address=one.address)
    for _ in range(2):  # computed, and loaded
        assert user.ask("keep", ids=[200, 8]) == {"kept": True, "same": True}


def test_kinds_of_models(server: Servers, user: Any) -> None:
    one = server(l1=64, chunk=16)
    answers = user.ask("kinds", address=one.address)
    assert all(answer["same"] for answer in answers.values()), answers
    assert {name: answer["hit"] for name, answer in answers.items()} == {
        "llama": 48,
        "gpt2": 48,
        "sliding": 48,
        "mixed": 48,
        "dynamic rope": 0,
        "forgetting": 0,
    }
    assert "begin with empty states" in answers["forgetting"]["refusal"]
    assert "'dynamic'" in answers["dynamic rope"]["refusal"]


def test_the_server_is_killed_and_comes_back(server: Servers, user: Any) -> None:
    one = server(l1=256, chunk=16)
    user.ask("attach", address=one.address)
    assert right(user.ask("generate", ids=[300, 9]))
    one.kill()
    alone = user.ask("generate", ids=[300, 9])
    assert right(alone) and alone["stored"] == 0
    other = server(l1=256, chunk=32, port=one.port)
    other.line_with("Registered")
    assert user.ask("wait_connected", seconds=PATIENCE)
    assert right(user.ask("generate", ids=[300, 9]))
    back = user.ask("generate", ids=[300, 9])
    assert right(back) and back["hit"] == 288


def test_a_close_in_the_middle_of_generate_costs_no_answer(server: Servers, user: Any) -> None:
    user.ask("attach", address=server(l1=256, chunk=16).address)
    assert user.ask("close_within", ids=[300, 9])


def test_a_frozen_server_costs_a_deadline(server: Servers, user: Any) -> None:
    one = server(l1=256, chunk=16)
    user.ask("attach", address=one.address)
    assert right(user.ask("generate", ids=[300, 10]))
    user.ask("deadline", seconds=0.5)
    one.freeze()
    assert right(user.ask("generate", ids=[300, 10]))
    user.ask("deadline", seconds=3000.0)  # of which nothing is waited for: the server is known to be frozen
    assert right(user.ask("generate", ids=[300, 11]))
    one.thaw()


@pytest.mark.parametrize("where", [{"address": "tcp://127.0.0.1:1"}, {"embedded_gb": 0.25}])
def test_no_server_and_a_server_of_ones_own(user: Any, where: dict[str, Any]) -> None:
    assert user.ask("attach", connected="embedded_gb" in where, **where)["refusal"] == ""
    assert right(user.ask("generate", ids=[600, 12]))
    again = user.ask("generate", ids=[600, 12])
    assert right(again) and again["hit"] == (512 if "embedded_gb" in where else 0)
    assert user.ask("close") == {"own generate": True}
