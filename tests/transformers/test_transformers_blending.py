"""Blended answers are near, what is exact stays exact, and blended KV is never stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from servers import Server, eventually

TOLERANCE = 1e-4
SMALL = {"min_tokens": 32}
Servers = Callable[..., Server]
Scripts = Callable[[Path], Any]


def test_all_computed_again_is_a_cold_run(server: Servers, user: Any) -> None:
    """With every blended token computed again nothing of the passages is left, so places, masks and passes are right."""
    one = server(l1=256, chunk=16)
    user.ask("attach_blending", address=one.address, blending={**SMALL, "recompute_ratio": 1.0})
    first = user.ask("blend", documents=[1, 2, 3])
    assert first["same"] and not first["blended"] and first["difference"] < TOLERANCE and not first["refusal"]
    again = user.ask("blend", documents=[4, 3, 1])
    assert again["blended"] == 73 + 71 and again["recomputed"] == 73 + 71 and again["hit"] == 0
    assert again["same"] and again["difference"] < TOLERANCE
    apart = user.ask("blend", documents=[3, 5, 1, 6])  # two that are not there, behind one that is
    assert apart["blended"] == 73 + 71 and apart["recomputed"] == 73 + 71 and apart["stored"] == 75 + 76
    assert apart["same"] and apart["difference"] < TOLERANCE
    ends = user.ask("blend", documents=[3, 1], question=0)  # the answer goes on from the last separator
    assert ends["blended"] == 73 + 71 and ends["same"] and ends["difference"] < TOLERANCE


def test_all_passages_of_a_full_pool(server: Servers, user: Any) -> None:
    """Each is stored and found, although they begin at new blocks, and together with these gaps are longer than the prompt."""
    one, documents = server(l1=256, chunk=16), list(range(1, 12))
    user.ask("attach_blending", address=one.address, blending=SMALL)
    user.ask("blend", documents=documents)
    assert user.ask("blend", documents=documents[::-1])["blended"] == sum(70 + number for number in documents)


def test_one_layer_of_every_kind_of_rope(server: Servers, user: Any) -> None:
    found = user.ask("blend_kinds", address=server(l1=256, chunk=16).address)
    for name in ("llama", "linear", "yarn", "llama3", "qwen3", "neighbours", "partial neighbours", "partial halves"):
        one = found[name]
        assert not one["refusal"] and one["blended"] == 72 + 71 and one["recomputed"] == 0, name
        assert one["difference"] < TOLERANCE, name
        assert one["errors"][0] < 1e-6 and one["errors"][1] < 1e-2, name
    assert "no module with inverse frequencies" in found["no rope"]["blending_refusal"]
    assert "without windows" in found["window"]["blending_refusal"]
    assert "'dynamic'" in found["dynamic"]["refusal"]
    for name in ("no rope", "window", "dynamic"):
        assert not found[name]["blended"] and found[name]["same"] and found[name]["difference"] < TOLERANCE, name


def test_keys_that_say_little_of_their_turn(user: Any) -> None:
    """A layer is not taken for one whose keys do not turn because its largest elements turn little, or because it has no keys."""
    found = user.ask("turns_of_odd_keys")
    assert found["outliers"] == found["first zeros"] == ["halves", "halves"]
    assert "layer 0 do not turn" in found["zeros"][0]


def test_each_way_to_choose(server: Servers, user: Any) -> None:
    """What is computed again is bounded; where that is everything, the answer is that of a cold run."""
    one = server(l1=256, chunk=16)
    for choose in ("none", "query", "deviation"):
        for ratio in (0.5, 1.0):
            blending = {**SMALL, "choose": choose, "recompute_ratio": ratio}
            user.ask("attach_blending", address=one.address, cache_salt=f"{choose} {ratio}", blending=blending)
            user.ask("blend", documents=[1, 2, 3])
            blended = user.ask("blend", documents=[4, 3, 1])
            assert blended["finite"] and not blended["refusal"] and blended["blended_requests"] == 1
            if choose == "none":
                assert blended["recomputed"] == 8 and blended["difference"] > TOLERANCE
            elif ratio == 1.0:
                assert blended["recomputed"] == 73 + 71 and blended["difference"] < TOLERANCE
            else:
                assert 64 <= blended["recomputed"] <= (73 + 71) // 2 + 8 and blended["difference"] > TOLERANCE


def test_the_server_knows_what_was_blended(server: Servers, user: Any) -> None:
    """The accounts of lookups add up, with the tokens of passages as missing; beside them stands what was blended."""
    one = server(l1=256, chunk=16)
    user.ask("attach_blending", address=one.address, blending=SMALL)
    lengths = [10 + 3 * 2 + 71 + 72 + 12, 10 + 3 * 2 + 73 + 71 + 12]
    user.ask("blend", documents=[1, 2])
    blended = user.ask("blend", documents=[3, 1])
    eventually(lambda: one.counters()["blended_requests_total"] == 1)
    counters = one.counters()
    assert counters["blended_tokens_total"] == blended["blended"] == 71
    assert counters["blend_recomputed_tokens_total"] == blended["recomputed"] > 0
    parts = ("lookup_tokens_total", "missed_tokens_total")
    accounted = sum(value for name, value in counters.items() if name.startswith(parts))
    assert counters["requested_tokens_total"] == accounted == sum(lengths)
    latest, before = one.get("/requests")["requests"][:2]
    assert latest["blended"] == {"passages": 1, "recomputed": blended["recomputed"]}
    assert latest["sources"] == {"passages": 71} and not before["blended"] and before["tokens"] == lengths[1]


def test_blended_kv_is_never_stored_as_exact(server: Servers, user: Any, tmp_path: Path) -> None:
    """The same prompt without blending is bit for bit what it was before, also from a tier."""
    user.ask("attach", address=server(l1=256, chunk=16).address)
    cold = user.ask("blend", documents=[4, 3, 1])
    one = server(l1=256, chunk=16, flags=("--l2", f"disk://{tmp_path}/tier?max_gb=1", "--worth", "always"))
    user.ask("attach_blending", address=one.address, blending={**SMALL, "links": 0, "choose": "none"})
    user.ask("blend", documents=[1, 2, 3])
    blended = user.ask("blend", documents=[3, 4, 1])
    assert blended["blended"] == 73 + 71 and blended["stored"] == 74  # the fourth, which is computed apart
    blended = user.ask("blend", documents=[4, 3, 1])
    assert blended["blended"] == 74 + 73 + 71 and blended["digest"] != cold["digest"] and blended["stored"] == 0
    for clears in (False, True):
        if clears:
            kept = one.status()["l1"]["complete_chunks"] if "l1" in one.status() else 0
            eventually(lambda kept=kept: one.status()["tiers"][0]["counters"].get("kept_shards", 0) >= max(1, kept))
            one.clear()
        user.ask("attach", address=one.address)
        plain = user.ask("blend", documents=[3, 1, 4])
        assert plain["same"] and plain["difference"] < TOLERANCE
        user.ask("attach", address=one.address)
        plain = user.ask("blend", documents=[3, 4, 1])
        assert plain["same"] and plain["difference"] < TOLERANCE


def test_a_prompt_after_a_blended_run_is_cold(server: Servers, user: Any) -> None:
    """Nothing of a prompt that begins with a blended passage is stored, so it misses, and is computed as on another server."""
    user.ask("attach", address=server(l1=256, chunk=16).address)
    cold = user.ask("blend", documents=[3, 1])
    one = server(l1=256, chunk=16)
    user.ask("attach_blending", address=one.address, blending={**SMALL, "choose": "none"})
    user.ask("blend", documents=[1, 2, 3])
    for _ in range(2):
        blended = user.ask("blend", documents=[3, 1])
        assert blended["blended"] == 73 + 71 and blended["stored"] == 0 and blended["digest"] != cold["digest"]
    user.ask("attach", address=one.address)
    after = user.ask("blend", documents=[3, 1])
    assert after["hit"] == 0 and after["digest"] == cold["digest"]


def test_salts_boundaries_and_failed_loads(server: Servers, script: Scripts, model: Path) -> None:
    one, user = server(l1=256, chunk=16), script(model)
    user.ask("attach", address=server(l1=256, chunk=16).address)
    cold = user.ask("blend", documents=[2, 1])
    user.ask("attach_blending", address=one.address, blending=SMALL)
    user.ask("blend", documents=[1, 2, 3])
    assert (
        user.ask("blend", documents=[3, 1], named=True)["blended"] == 64 + 64
    )  # their ends, with separators, are others
    user.ask("attach_blending", address=one.address, blending=SMALL, cache_salt="another tenant")
    assert user.ask("blend", documents=[3, 1])["blended"] == 0
    user.ask("attach_blending", address=one.address, blending=SMALL)
    assert user.ask("blend", documents=[3, 1])["blended"] == 73 + 71
    user.ask("break_loads_of_passages")
    failed = user.ask("blend", documents=[2, 1])
    assert not failed["blended"] and failed["digest"] == cold["digest"] and not failed["refusal"]
