"""What operators do over HTTP with the KV of prompts, on real servers with engines: pins, lists, deletions, prefetches."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine_process import Engine
from lmcache.cache import L1
from lmcache.cache.managing import Managing
from lmcache.chunks import Layout
from lmcache.cli.main import main
from lmcache.memory.arena import Arena
from lmcache.server.named import Models
from lmcache.wire import messages as m
from servers import PATIENCE, Server, eventually

StartServer = Callable[..., Server]
StartEngine = Callable[..., Engine]
CHUNK = 16


def prompt(seed: int, tokens: int = 160) -> list[int]:
    return [(seed * 7919 + at * 31) % 50000 for at in range(tokens)]


def call(server: Server, method: str, path: str, content: Any = None, **more: Any) -> httpx.Response:
    url = f"http://127.0.0.1:{server.http_port}{path}"
    return httpx.request(method, url, json=content, timeout=PATIENCE, trust_env=False, **more)


def ask(server: Server, method: str, path: str, content: Any = None, status: int = 200) -> Any:
    answer = call(server, method, path, content)
    assert answer.status_code == status, answer.text
    return answer.json()


def in_l1(server: Server, **named: Any) -> int:
    """Tokens of a prompt that are in L1, as the route says, which touches nothing."""
    (found,) = ask(server, "POST", "/cache/lookup", named)["models"]
    return int(found["l1_tokens"])


def test_a_pinned_prompt_survives_whatever_comes_after_it(server: StartServer, engine: StartEngine) -> None:
    cache = server(l1=4, chunk=CHUNK)
    one = engine(cache)
    kept = prompt(1)
    assert one.store(kept) == 160
    looked = ask(cache, "POST", "/cache/lookup", {"tokens": kept})
    (found,) = looked["models"]
    assert (found["tokens"], found["l1_tokens"], looked["chunk_size"]) == (160, 160, CHUNK)
    pin = ask(cache, "POST", "/cache/pins", {"tokens": [*kept, 1, 2], "seconds": 3000, "note": "the system prompt"})
    assert (pin["pinned_tokens"], pin["tokens"], pin["chunks"]) == (160, 162, 10)
    other = 2
    while cache.counters()["evicted_chunks_total"] < 300:
        one.store(prompt(other, 1600))
        other += 1
    assert one.hit_tokens(kept) == 160 and one.hit_tokens(prompt(2, 1600)) < 1600
    listed = ask(cache, "GET", "/cache/pins")
    assert [row["id"] for row in listed["pins"]] == [pin["id"]] and listed["pins"][0]["note"] == "the system prompt"
    index, counters = cache.status()["index"], cache.counters()
    assert listed["pinned_bytes"] == index["pinned_bytes"] == counters["pinned_bytes"] == pin["bytes"] > 0
    assert index["pins"] == 1 and counters["pinned_chunks"] == 10
    ask(cache, "DELETE", f"/cache/pins/{pin['id']}")
    assert ask(cache, "GET", "/cache/pins")["pins"] == [] and cache.counters()["pinned_bytes"] == 0
    while in_l1(cache, tokens=kept):  # without touching it
        one.store(prompt(other, 1600))
        other += 1


def test_pins_hold_at_most_their_share_and_say_so(server: StartServer, engine: StartEngine) -> None:
    cache = server(l1=4, chunk=CHUNK, flags=("--pinned-share", "0.02"))
    one = engine(cache)
    assert one.store(prompt(1)) == 160 and one.store(prompt(2, 320)) == 320
    first = ask(cache, "POST", "/cache/pins", {"tokens": prompt(1)})
    again = ask(cache, "POST", "/cache/pins", {"tokens": prompt(1)})
    assert ask(cache, "GET", "/cache/pins")["pinned_bytes"] == first["bytes"], "what two pins hold counts once"
    refused = ask(cache, "POST", "/cache/pins", {"tokens": prompt(2, 320)}, status=409)
    assert refused["status"] == "refused"
    for said in ("20 chunks", "--pinned-share", "unpin", f"{first['bytes'] / 2**20:,.1f} MiB are pinned"):
        assert said in refused["reason"], refused
    assert len(ask(cache, "GET", "/cache/pins")["pins"]) == 2, "nothing is pinned by a refusal"
    partly = ask(cache, "POST", "/cache/pins", {"tokens": [*prompt(1), *prompt(3)]})
    assert partly["pinned_tokens"] == 160
    ended = ask(cache, "DELETE", "/cache/pins", {"tokens": [*prompt(1), *prompt(3)]})["unpinned"]
    assert ended == [partly["id"]], "the pins of its beginning stay"
    ended = ask(cache, "DELETE", "/cache/pins", {"tokens": prompt(1)})["unpinned"]
    assert sorted(ended) == sorted([first["id"], again["id"]])
    assert ask(cache, "POST", "/cache/pins", {"tokens": prompt(3)}, status=404)["reason"].startswith("L1 has nothing")


def test_a_pin_ends_with_its_time_and_with_a_clear_but_not_with_its_engine(
    server: StartServer, engine: StartEngine
) -> None:
    cache = server(l1=4, chunk=CHUNK)
    one = engine(cache)
    one.store(prompt(1))
    ask(cache, "POST", "/cache/pins", {"tokens": prompt(1), "seconds": 0.01})
    eventually(lambda: not ask(cache, "GET", "/cache/pins")["pins"])
    lasting = ask(cache, "POST", "/cache/pins", {"tokens": prompt(1)})
    one.close()
    eventually(lambda: cache.counters()["engine_processes"] == 0)
    assert [row["id"] for row in ask(cache, "GET", "/cache/pins")["pins"]] == [lasting["id"]]
    assert in_l1(cache, tokens=prompt(1), model="model") == 160, "the model is known without an engine"
    assert ask(cache, "POST", "/cache/clear") == {"status": "ok", "ended_pins": 1}
    assert ask(cache, "POST", "/cache/clear") == {"status": "ok"}
    counters = cache.counters()
    assert counters["pinned_bytes"] == counters["arena_used_bytes"] == 0
    gone = ask(cache, "DELETE", f"/cache/pins/{lasting['id']}", status=404)
    assert "no such pin" in gone["reason"]


def test_a_deleted_prompt_leaves_what_others_share_with_it(server: StartServer, engine: StartEngine) -> None:
    cache = server(l1=4, chunk=CHUNK)
    one = engine(cache)
    mine, other = prompt(1), [*prompt(1)[:64], *prompt(2)[:96]]
    one.store(mine)
    one.store(other)
    done = ask(cache, "DELETE", "/cache/objects", {"tokens": mine})
    assert done["deleted_chunks"] == 6 and done["kept_chunks"] == {"shared": 4} and done["deleted_bytes"] > 0
    assert (one.hit_tokens(mine), one.hit_tokens(other)) == (64, 160)
    ask(cache, "POST", "/cache/pins", {"tokens": other})
    assert ask(cache, "POST", "/cache/delete", {"tokens": other})["kept_chunks"] == {"pinned": 10}
    ask(cache, "DELETE", "/cache/pins", {"tokens": other})
    hit = one.lookup(other)
    assert hit is not None
    assert ask(cache, "POST", "/cache/delete", {"tokens": other})["kept_chunks"] == {"in_use": 10}
    assert one.scheduler is not None
    one.scheduler.release(hit)
    eventually(lambda: cache.counters()["leases"] == 0)
    assert ask(cache, "POST", "/cache/delete", {"tokens": other})["deleted_chunks"] == 10
    counters = cache.counters()
    assert counters["arena_used_bytes"] == 0 and counters["complete_chunks"] == 0
    assert counters["stored_chunks_total"] == counters["evicted_chunks_total"] == 16


def test_the_list_has_every_chunk_once_page_by_page(server: StartServer, engine: StartEngine) -> None:
    cache = server(l1=4, chunk=CHUNK)
    first, second = engine(cache, "first", model="a/one"), engine(cache, "second", model="b/two")
    first.store(prompt(1))
    second.store(prompt(2, 320))
    rows, page, pages = [], "/cache/objects?limit=7", 0
    while page:
        told = ask(cache, "GET", page)
        rows += told["objects"]
        following, pages = told["next"], pages + 1
        page = following and f"/cache/objects?limit=7&space={following['space']}&after={following['after']}"
    assert pages >= 5 and len(rows) == 30 == len({(row["space"], row["hash"]) for row in rows})
    by_model = {name: [row for row in rows if row["model"] == name] for name in ("a/one", "b/two")}
    assert [len(some) for some in by_model.values()] == [10, 20]
    hashes = {row["hash"] for row in by_model["a/one"]}
    assert sum(row["parent"] is None for row in by_model["a/one"]) == 1
    assert all(row["parent"] in hashes for row in by_model["a/one"] if row["parent"])
    only = ask(cache, "GET", "/cache/objects?model=b/two&limit=1000")
    assert len(only["objects"]) == 20 and only["next"] is None
    chain = [row["hash"] for row in sorted(by_model["a/one"], key=lambda row: row["parent"] is not None)][:1]
    assert in_l1(cache, hashes=chain, model="a/one") == CHUNK
    assert ask(cache, "GET", "/cache/objects?model=c", status=404)["reason"].startswith("c: L1 has nothing")


def test_what_is_wrong_is_named(server: StartServer, engine: StartEngine) -> None:
    cache = server(l1=4, chunk=CHUNK)
    assert (
        "an engine has to connect first" in ask(cache, "POST", "/cache/lookup", {"tokens": [1]}, status=404)["reason"]
    )
    engine(cache, "first", model="a/one"), engine(cache, "second", model="b/two")
    for content, status, said in (
        ({}, 400, "one of"),
        ({"tokens": [1], "text": "a"}, 400, "one of"),
        ({"tokens": [-1]}, 400, "$.tokens[0]"),
        ({"tokens": ["a"]}, 400, "$.tokens[0]"),
        ({"tokens": []}, 400, "no tokens"),
        ({"tokens": [1], "adress": "http://evil"}, 400, "adress"),
        ({"hashes": ["12"]}, 400, "32 hexadecimal digits"),
        ({"hashes": ["ab" * 16, "AB" * 16]}, 400, "there twice"),
        ({"text": "hello"}, 400, "--tokenizer-url"),
        ({"tokens": [1], "model": "c"}, 404, "a/one, b/two"),
        ({"tokens": list(range(CHUNK * 4097))}, 409, "4097 chunks"),
        ([], 400, "Expected `object`"),
    ):
        told = ask(cache, "POST", "/cache/lookup", content, status)
        assert said in told["reason"], (content, told)
    assert '"model"' in ask(cache, "POST", "/cache/pins", {"tokens": [1]}, status=400)["reason"]
    assert "$.seconds" in ask(cache, "POST", "/cache/pins", {"tokens": [1], "seconds": 1e9}, status=400)["reason"]
    assert "no tier" in ask(cache, "POST", "/cache/prefetches", {"tokens": [1]}, status=400)["reason"]
    assert "no such prefetch" in ask(cache, "GET", "/cache/prefetches/x", status=404)["reason"]
    assert "limit=" in ask(cache, "GET", "/cache/objects?limit=0", status=400)["reason"]
    assert "must be a number" in ask(cache, "GET", f"/cache/objects?after={'9' * 5000}", status=400)["reason"]
    assert call(cache, "POST", "/cache/lookup", {"text": "a" * (3 << 20)}).status_code == 413
    assert cache.counters()["loop_errors_total"] == 0


class Tokenizer(ThreadingHTTPServer):
    """An engine's /tokenize, which makes a token of each letter."""

    def __init__(self) -> None:
        asked: list[Any] = []
        self.asked = asked

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append((self.path, content))
                tokens = [ord(one) for one in content["prompt"]]
                body = json.dumps({"count": len(tokens), "max_model_len": 4096, "tokens": tokens}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, daemon=True).start()


def test_pins_of_equal_chunks_are_counted_once_and_end_with_a_clear() -> None:
    heart = Managing(64 * 4096)
    heart.join(1, "engine")
    space, chunks = heart.open_space(1, b"space".ljust(16), 1, 0, 4096), bytes(range(16 * 3))
    heart.commit(0.0, 1, heart.reserve(0.0, 1, space, 0, b"", True, chunks).reservation, True)
    heart.pin(0.0, "all", [space], chunks, 60.0)
    heart.pin(0.0, "twice", [space], chunks[:16] * 2, 60.0)
    assert (heart.pinned_bytes, heart.pinned_chunks) == (3 * 4096, 3)
    heart.unpin("all")
    assert (heart.pinned_bytes, heart.pinned_chunks) == (4096, 1)
    assert heart.remove([space], chunks) == (2, 2 * 4096, {"pinned": 1})
    heart.unpin("twice")
    assert (heart.pinned_bytes, heart.pinned_chunks) == (0, 0)
    heart.pin(0.0, "again", [space], chunks, 60.0)
    heart.pin(0.0, "and again", [space], chunks, 60.0)
    heart.clear()
    assert (heart.pinned_bytes, heart.pinned_chunks, heart.pins, heart.used_bytes()) == (0, 0, [], 0)


@pytest.fixture
def tokenizer() -> Iterator[Tokenizer]:
    one = Tokenizer()
    yield one
    one.shutdown()
    one.server_close()


def test_text_is_tokenized_by_the_configured_engine_only(
    server: StartServer, engine: StartEngine, tokenizer: Tokenizer
) -> None:
    url = f"http://127.0.0.1:{tokenizer.server_port}"
    cache = server(l1=4, chunk=CHUNK, flags=("--tokenizer-url", url))
    text = "You are a helpful assistant. " * 6
    assert engine(cache).store([ord(one) for one in text]) == len(text) // CHUNK * CHUNK
    assert in_l1(cache, text=text) == len(text) // CHUNK * CHUNK
    pin = ask(cache, "POST", "/cache/pins", {"text": text})
    assert pin["pinned_tokens"] == len(text) // CHUNK * CHUNK and pin["tokens"] == len(text)
    assert tokenizer.asked == [("/tokenize", {"prompt": text})] * 2
    tokenizer.shutdown()
    tokenizer.server_close()
    said = ask(cache, "POST", "/cache/lookup", {"text": text}, status=502)["reason"]
    assert f"--tokenizer-url {url}: no engine answers" in said and "lmcache server" not in said


def test_a_stranger_needs_the_token(server: StartServer, engine: StartEngine, tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("secret")
    secret.chmod(0o600)
    cache = server(l1=4, chunk=CHUNK, flags=("--api-token-file", str(secret)))
    engine(cache).store(prompt(1))
    web_page, proxied = {"Origin": "http://evil.example"}, {"X-Forwarded-For": "10.0.0.1"}
    changing = (("POST", "/cache/pins"), ("DELETE", "/cache/pins"), ("DELETE", "/cache/objects"), ("POST", "/cache/delete"),
                ("POST", "/cache/prefetches"), ("DELETE", "/cache/pins/x"), ("DELETE", "/cache/prefetches/x"),
                ("POST", "/cache/lookup"), ("POST", "/lookup"), ("POST", "/health"), ("POST", "/query_instance"),
                ("POST", "/pin"), ("POST", "/clear"), ("POST", "/move"))  # fmt: skip
    reading = ("GET", "/cache/pins"), ("GET", "/cache/objects"), ("GET", "/cache/models")
    for method, path in (*changing, *reading):
        for headers in (
            proxied,
            {"Authorization": "Bearer wrong"},
            *([web_page] if method != "GET" else []),
        ):
            assert call(cache, method, path, {"tokens": prompt(1)}, headers=headers).status_code == 403, (method, path)
    good = {"Authorization": "Bearer secret", **proxied, **web_page}
    assert call(cache, "POST", "/cache/pins", {"tokens": prompt(1)}, headers=good).status_code == 200


def ended(server: Server, name: str) -> Any:
    return eventually(lambda: (told := ask(server, "GET", f"/cache/prefetches/{name}"))["state"] != "loading" and told)


def test_a_prefetch_brings_a_prompt_from_a_tier_to_l1_and_pins_it(
    server: StartServer, engine: StartEngine, tmp_path: Path
) -> None:
    cache = server(l1=4, chunk=CHUNK, flags=("--l2", f"disk://{tmp_path}?max_gb=0.1"))
    one, wanted = engine(cache), prompt(1, 1600)
    one.store(wanted)
    eventually(lambda: cache.status()["tiers"][0]["shards"] == 100)
    cache.clear()
    (looked,) = ask(cache, "POST", "/cache/lookup", {"tokens": wanted})["models"]
    assert (looked["l1_tokens"], looked["tier_tokens"]) == (0, {"disk": 1600})
    begun = ask(cache, "POST", "/cache/prefetches", {"tokens": wanted, "pin_seconds": 600}, status=202)
    told = ended(cache, begun["id"])
    assert (told["state"], told["l1_tokens"], told["loaded_tokens"]) == ("done", 1600, 1600), told
    (pin,) = ask(cache, "GET", "/cache/pins")["pins"]
    assert pin["id"] == told["pin"] and pin["chunks"] == 100
    assert one.hit_tokens(wanted) == 1600
    one.poison()
    hit = one.lookup(wanted)
    assert hit is not None
    assert one.wait(one.submit_load(hit, CHUNK, 0, 1600, wanted)).ok and one.right(wanted, 0, 1600)
    assert one.scheduler is not None
    one.scheduler.release(hit)
    eventually(lambda: cache.counters()["leases"] == 0)
    again = ended(cache, ask(cache, "POST", "/cache/prefetches", {"tokens": wanted}, status=202)["id"])
    assert (again["state"], again["loaded_tokens"]) == ("done", 0)
    nothing = ask(cache, "POST", "/cache/prefetches", {"tokens": prompt(9)}, status=202)
    assert ended(cache, nothing["id"])["state"] == "absent"
    assert [row["id"] for row in ask(cache, "GET", "/cache/prefetches")["prefetches"]] == [
        nothing["id"], again["id"], begun["id"]
    ]  # fmt: skip
    too_large = ask(cache, "POST", "/cache/prefetches", {"tokens": prompt(2, CHUNK * 600)}, status=409)
    assert "half of L1" in too_large["reason"]
    ask(cache, "DELETE", "/cache/pins", {"tokens": wanted})
    deleted = ask(cache, "POST", "/cache/delete", {"tokens": wanted, "tiers": "all"})
    assert (deleted["deleted_chunks"], deleted["tiers"]) == (100, ["disk"])
    eventually(lambda: cache.status()["tiers"][0]["shards"] == 0)
    assert "there is no such tier" in ask(cache, "POST", "/cache/delete", {"tokens": [1], "tiers": "x"}, 400)["reason"]


def test_a_prefetch_for_which_pins_leave_no_room_says_so(
    server: StartServer, engine: StartEngine, tmp_path: Path
) -> None:
    flags = "--l2", f"disk://{tmp_path}?max_gb=0.1", "--pinned-share", "1", "--worth", "always"
    cache = server(l1=4, chunk=CHUNK, flags=flags)
    one, wanted = engine(cache), prompt(1, 1600)
    one.store(wanted)
    eventually(lambda: cache.status()["tiers"][0]["shards"] == 100)
    cache.clear()
    seed, stored = 2, True
    while stored:  # until L1 is full of pins
        stored = one.store(prompt(seed, 1600)) > 0
        if stored:
            ask(cache, "POST", "/cache/pins", {"tokens": prompt(seed, 1600)})
        seed += 1
    eventually(lambda: cache.status()["tiers"][0]["queued_chunks"] == 0)
    told = ended(cache, ask(cache, "POST", "/cache/prefetches", {"tokens": wanted}, status=202)["id"])
    assert told["state"] in ("failed", "partial") and "no room" in told["reason"] and "pinned" in told["reason"], told


def test_a_prefetch_for_an_engine_that_has_gone_says_so(
    server: StartServer, engine: StartEngine, tmp_path: Path
) -> None:
    cache = server(l1=4, chunk=CHUNK, flags=("--l2", f"disk://{tmp_path}?max_gb=0.1"))
    one, wanted = engine(cache), prompt(1, 1600)
    one.store(wanted)
    one.store(prompt(2, 32))
    eventually(lambda: cache.status()["tiers"][0]["shards"] == 102)
    ask(cache, "DELETE", "/cache/objects", {"tokens": wanted})  # the other prompt's chunks keep the model known
    one.close()
    eventually(lambda: cache.status()["active_sessions"] == 0)
    told = ended(cache, ask(cache, "POST", "/cache/prefetches", {"tokens": wanted}, status=202)["id"])
    assert told["state"] == "failed" and "no engine with this model is connected" in told["reason"], told


def test_a_prefetch_that_hangs_is_cancelled_and_bounded_in_number(
    server: StartServer, engine: StartEngine, hanging: Path
) -> None:
    patient = (
        "--l2-patience-seconds",
        "600",
        "--lease-seconds",
        "600",
    )  # else a load of a slow machine has failed by then
    cache = server(
        l1=4, chunk=CHUNK, flags=("--l2", f"hanging://{hanging}?calls=load&stalled=3600&at_once=9", *patient)
    )
    engine(cache).store(prompt(1))
    begun = [ask(cache, "POST", "/cache/prefetches", {"tokens": prompt(seed)}, status=202) for seed in range(2, 10)]
    cache.line_with("load hangs")
    assert {one["state"] for one in begun} == {"loading"} and cache.counters()["prefetches_running"] == 8
    assert "8 prefetches run" in ask(cache, "POST", "/cache/prefetches", {"tokens": prompt(10)}, status=409)["reason"]
    for one in begun:
        told = ask(cache, "DELETE", f"/cache/prefetches/{one['id']}")
        assert told["state"] == "cancelled", told
    assert cache.counters()["prefetches_running"] == 0 and cache.counters()["fetches_open"] == 0
    os.close(os.open(hanging, os.O_WRONLY))
    assert in_l1(cache, tokens=prompt(1), tiers=False) == 160


@pytest.mark.parametrize("call", ["load", "contains"])
def test_a_prefetch_behind_a_stalled_tier_says_what_stalls(
    call: str, server: StartServer, engine: StartEngine, hanging: Path
) -> None:
    flags = "--l2", f"hanging://{hanging}?calls={call}", "--l2-patience-seconds", "1"
    cache = server(l1=4, chunk=CHUNK, flags=flags)
    engine(cache).store(prompt(1))
    told = ended(cache, ask(cache, "POST", "/cache/prefetches", {"tokens": prompt(2)}, status=202)["id"])
    assert told["state"] == "failed" and f"hanging (stalled: {call} has not returned for" in told["reason"], told
    os.close(os.open(hanging, os.O_WRONLY))


def test_lookups_of_operators_do_not_judge_a_tier(
    server: StartServer, engine: StartEngine, hanging: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "token"
    secret.write_text("secret")
    secret.chmod(0o600)
    tier = "--l2", f"hanging://{hanging}?calls=contains"
    cache = server(l1=4, chunk=CHUNK, flags=(*tier, "--api-token-file", str(secret)))
    engine(cache)
    with ThreadPoolExecutor(6) as threads:
        asked = [threads.submit(ask, cache, "POST", "/cache/lookup", {"tokens": prompt(one)}) for one in range(6)]
        for one in asked:
            (found,) = one.result()["models"]
            assert (found["l1_tokens"], found["unanswered_tiers"]) == (0, ["hanging"]), found

    def running() -> Any:
        pause = call(cache, "POST", "/tiers/hanging/pause", headers={"Authorization": "Bearer secret"})
        return pause.json()["under_way"]

    eventually(lambda: running() == {"contains": 2})  # the others are cancelled
    counted = cache.status()["tiers"][0]["counters"]
    assert not any(name.startswith(("failed", "opened")) for name in counted), counted
    os.close(os.open(hanging, os.O_WRONLY))


def test_the_command_line_does_the_same(
    server: StartServer, engine: StartEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = server(l1=4, chunk=CHUNK, flags=("--l2", f"disk://{tmp_path}/tier?max_gb=0.1"))
    engine(cache).store(prompt(1))
    eventually(lambda: cache.status()["tiers"][0]["shards"] == 10)
    file = tmp_path / "prompt.json"
    file.write_text(json.dumps(prompt(1)))

    def verb(*words: str, code: int = 0) -> str:
        assert main(["kvcache", *words, "--url", f"http://127.0.0.1:{cache.http_port}"]) == code
        said = capsys.readouterr()
        return said.out + said.err

    named = "--tokens", f"@{file}"
    assert "160 of 160 tokens in L1" in verb("lookup", *named)
    pin = json.loads(verb("pin", *named, "--seconds", "60", "--note", "a system prompt", "--json"))
    assert f"pin {pin['id']}: 10 chunks" in verb("pins") and "a system prompt" in verb("pins")
    assert main(["status", "--url", f"http://127.0.0.1:{cache.http_port}"]) == 0
    assert "by 1 pins" in capsys.readouterr().out
    assert "kept 10 chunks: pinned" in verb("delete", *named)
    assert pin["id"] in verb("unpin", pin["id"])
    assert "no such pin" in verb("unpin", pin["id"], code=1)
    assert "nothing of this prompt is pinned" in verb("unpin", *named, code=1)
    assert (
        len(verb("list").splitlines()) == 10 and len(json.loads(verb("list", "--limit", "3", "--json"))["objects"]) == 3
    )
    assert "deleted 10 chunks" in verb("delete", "--tokens", ",".join(map(str, prompt(1))))
    assert "10 more in the tier disk" not in verb("lookup", *named) and "160 more in the tier disk" in verb(
        "lookup", *named
    )
    assert "done, 160 of 160 tokens in L1" in verb("prefetch", *named, "--wait", str(PATIENCE))
    assert "absent" in verb("prefetch", "--tokens", "1,2,3", "--wait", str(PATIENCE), code=1)
    assert "one of --tokens, --text and --hashes" in verb("pin", code=2)
    assert "must be numbers" in verb("pin", "--tokens", "1,x", code=2)
    assert "--limit inf: must be a number" in verb("list", "--limit", "inf", code=2)
    assert "cannot be read" in verb("pin", "--tokens", "@/nowhere", code=2)
    assert "--tokenizer-url" in verb("pin", "--text", "hello", code=1)
    assert "is for `lmcache kvcache clear`" in verb("pins", "--tiers", "all", code=2)


def test_a_model_is_known_again_when_one_of_its_groups_begins_anew(tmp_path: Path) -> None:
    """The KV of one group has been evicted after the engine's end, that of another has not; then the engine comes back."""
    l1 = L1(Arena(tmp_path, 64 * 4096))
    models, layout = Models(l1), Layout("model", "bfloat16", 2, 2, 8, 16)
    first, groups = -1, list[int]()
    for process in (1, 2):
        l1.join(process, f"engine {process}")
        first = l1.open_space(process, b"main".ljust(16), 1, 0, 4096)
        groups.append(l1.open_space(process, b"group".ljust(16), 1, 0, 4096, reach_chunks=1))
        models.registered(m.Register(layout, 1, -1, 0), first)
        models.registered(m.Register(layout, 1, -1, 0, main=first), groups[-1])
        assert [one.spaces for one in models.known()] == [(first, groups[-1])]
        if process == 1:
            grant = l1.reserve(0.0, process, first, 0, b"", True, bytes(range(16)))
            l1.commit(0.0, process, grant.reservation, True)
            l1.leave(process)
            l1.tick(1.0)
    assert groups[0] != groups[1]
