"""A runtime process as programs see it: its names, its counters, its limits, its clients."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from processes import end, is_running, python, socket_folder, wait_until, within
from tiny_checkpoints import tiny_checkpoint

import bough as bo
from bough.runtime import protocol

STATS = {
    *("prompt_tokens", "cached_tokens", "computed_tokens", "generated_tokens", "total_pages", "free_pages"),
    *("cached_pages", "num_nodes", "num_branches", "num_running", "num_waiting", "steps", "evictions"),
    *("preemptions", "bytes_in", "bytes_out"),
}
META = {"prompt_tokens", "cached_tokens", "completion_tokens", "finish_reason", "ttft_ms", "latency_ms"}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}


@bo.function
def answer(s: bo.State, question: str) -> None:
    s += bo.system("You are a careful assistant.")
    s += bo.user(question)
    s += bo.assistant(bo.gen("answer"))


@bo.function
def continued(s: bo.State, prompt: str) -> None:
    s += prompt
    s += bo.gen("new")


@pytest.fixture(scope="module")
def small() -> Iterator[bo.Runtime]:
    """A context of 256 tokens, and 96 tokens for keys and values."""
    with bo.Runtime(tiny_checkpoint(), max_total_tokens=96, schedule_policy="fcfs") as runtime:
        yield runtime


@pytest.fixture(scope="module")
def tiny() -> Iterator[bo.Runtime]:
    """A context of 256 tokens, and room for several."""
    with bo.Runtime(tiny_checkpoint(), max_total_tokens=4096) as runtime:
        yield runtime


def difference(runtime: bo.Runtime, before: dict[str, Any]) -> dict[str, int]:
    now = runtime.stats()
    return {name: int(now[name]) - int(before[name]) for name in STATS}


# ------------------------------------------------------------------------------------------------ names


def test_a_runtime_tells_its_address_its_process_and_its_counters(pocket: bo.Runtime) -> None:
    assert pocket.address.startswith("ipc://")
    assert is_running(pocket.pid)
    stats = pocket.stats()
    assert set(stats) >= STATS
    assert all(isinstance(stats[name], int) for name in STATS)
    info = bo.get_server_info(pocket)
    assert (info["model"], info["pid"], info["context_len"]) == ("pocket", pocket.pid, 4096)


def test_meta_information_accounts_for_every_token(pocket: bo.Runtime) -> None:
    before = pocket.stats()
    state = answer.run("Name a colour, please.", backend=pocket, **GREEDY)
    meta = within(30, lambda: state.get_meta_info("answer"))
    assert set(meta) >= META
    assert meta["prompt_tokens"] == meta["cached_tokens"] + meta["computed_tokens"]
    assert meta["completion_tokens"] == len(meta["token_ids"]) == 4
    assert 0 < meta["ttft_ms"] <= meta["latency_ms"]
    change = difference(pocket, before)
    assert change["prompt_tokens"] == meta["prompt_tokens"]
    assert change["computed_tokens"] == meta["computed_tokens"]
    assert change["generated_tokens"] == 4
    assert change["bytes_in"] > 0
    assert change["bytes_out"] > 0


def test_a_second_identical_prompt_has_all_but_its_last_token_cached(pocket: bo.Runtime) -> None:
    pocket.flush_cache()
    first, second = (
        within(30, lambda: answer.run("Where is the red book?", backend=pocket, **GREEDY).get_meta_info("answer"))
        for _ in range(2)
    )
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] == second["prompt_tokens"] - 1
    assert second["token_ids"] == first["token_ids"]
    bo.flush_cache(pocket)
    third = within(30, lambda: answer.run("Where is the red book?", backend=pocket, **GREEDY).get_meta_info("answer"))
    assert third["cached_tokens"] == 0


def test_64_forks_of_a_cold_prefix_compute_it_once(tiny: bo.Runtime) -> None:
    tiny.flush_cache()
    before = tiny.stats()

    @bo.function
    def fan(s: bo.State) -> None:
        s += "A tree of the world, and the cache of a model: " * 4
        forks = s.fork(64)
        forks += [f"\n{chr(0x4E00 + index)}" for index in range(64)]  # the newline is shared as well
        forks += bo.gen("leaf")
        forks.join()

    state = fan.run(backend=tiny, **GREEDY)
    metas = within(60, lambda: state.get_meta_info("leaf"))
    change = difference(tiny, before)
    prompt_tokens = [meta["prompt_tokens"] for meta in metas]
    assert change["prompt_tokens"] == sum(prompt_tokens)
    assert change["computed_tokens"] == sum(meta["computed_tokens"] for meta in metas)
    assert sum(meta["cached_tokens"] == 0 for meta in metas) == 1, "one branch computes the prefix"
    shared = min(meta["cached_tokens"] for meta in metas if meta["cached_tokens"])
    assert shared > min(prompt_tokens) - 6
    assert change["computed_tokens"] <= shared + sum(tokens - shared for tokens in prompt_tokens)


def test_forks_of_a_cold_prefix_without_text_of_their_own_compute_one_token_each(tiny: bo.Runtime) -> None:
    tiny.flush_cache()
    before = tiny.stats()

    @bo.function
    def fan(s: bo.State) -> None:
        s += "The world of a tree is a branch, and a page is a token. " * 3
        forks = s.fork(64)
        forks += bo.gen("leaf")
        forks.join()

    metas = within(60, lambda: fan.run(backend=tiny, **GREEDY).get_meta_info("leaf"))
    assert difference(tiny, before)["computed_tokens"] == metas[0]["prompt_tokens"] + 63
    assert len({tuple(meta["token_ids"]) for meta in metas}) == 1


# ------------------------------------------------------------------------------------------------ options


def test_shutdown_leaves_no_process_and_no_folder_and_can_be_repeated() -> None:
    runtime = bo.Runtime(tiny_checkpoint())
    pid, folder = runtime.pid, socket_folder(runtime.address)
    assert is_running(pid)
    assert folder.is_dir()
    runtime.shutdown()
    assert not is_running(pid)
    assert not folder.exists()
    runtime.shutdown()
    with pytest.raises(bo.RuntimeLost):
        runtime.stats()


def test_two_runtimes_serve_side_by_side(pocket: bo.Runtime, tiny: bo.Runtime) -> None:
    assert pocket.pid != tiny.pid
    assert pocket.address != tiny.address
    states = [answer.run("Hello!", backend=pocket, **GREEDY), continued.run("Hello", backend=tiny, **GREEDY)]
    assert all(within(30, state.error) is None for state in states)
    assert tiny.server_info()["context_len"] == 256


def test_the_default_backend_is_used_where_none_is_given(pocket: bo.Runtime) -> None:
    bo.set_default_backend(pocket)
    try:
        assert within(30, lambda: answer.run("Hello!", **GREEDY)["answer"])
        assert bo.get_server_info()["pid"] == pocket.pid
    finally:
        bo.set_default_backend(None)
    with pytest.raises(bo.InvalidRequest, match="no backend"):
        answer.run("Hello!")


def test_a_seed_fixes_what_is_sampled_whatever_the_page_size_and_the_cache(pocket: bo.Runtime) -> None:
    hot: dict[str, Any] = {"temperature": 1.5, "max_tokens": 12, "ignore_eos": True}

    def two_texts(address: str) -> list[str]:
        with bo.RuntimeClient(address) as client:  # a client's first branch draws the same as any other's first
            states = [answer.run("Tell me about trees.", backend=client, **hot) for _ in range(2)]
            return [within(30, state.text) for state in states]

    seeded = two_texts(pocket.address)
    assert seeded[0] != seeded[1], "two draws of one seed"
    with bo.Runtime(seed=5, page_size=1) as same:
        assert two_texts(same.address) == seeded
        assert same.server_info()["page_size"] == 1
    with bo.Runtime(radix_cache=False, schedule_policy="fcfs") as other:
        assert two_texts(other.address) != seeded
        unshared = [within(30, answer.run("Tell me about trees.", backend=other, seed=3, **hot).text) for _ in "ab"]
        assert other.stats()["cached_tokens"] == other.stats()["cached_pages"] == 0
    shared = within(30, answer.run("Tell me about trees.", backend=pocket, seed=3, **hot).text)
    assert unshared == [shared, shared]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"page_size": 0}, "page_size must be a whole number of at least 1, got 0"),
        ({"token_budget": -1}, "token_budget must be a whole number of at least 1, got -1"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"schedule_policy": "best"}, "schedule_policy must be one of lpm, fcfs, got 'best'"),
        ({"seed": 1.5}, "seed must be a whole number"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_starts(options: dict[str, Any], words: str) -> None:
    with pytest.raises(bo.InvalidRequest, match=words):
        bo.Runtime(**options)


def test_a_runtime_tells_who_would_pickle_it_how_to_reach_it(tiny: bo.Runtime) -> None:
    with pytest.raises(TypeError, match=re.escape(f"RuntimeClient({tiny.address!r})")):
        pickle.dumps(tiny)
    with bo.RuntimeClient(tiny.address) as client, pytest.raises(TypeError, match=re.escape(tiny.address)):
        pickle.dumps(client)


# ------------------------------------------------------------------------------------------------ limits


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(tiny: bo.Runtime) -> None:
    state = continued.run("tree " * 300, backend=tiny, **GREEDY)
    with pytest.raises(bo.ContextOverflow) as caught:
        within(10, lambda: state["new"])
    assert caught.value.details["context_len"] == 256
    assert int(str(caught.value.details["num_tokens"])) > 300
    assert "256" in str(caught.value)
    assert str(caught.value.details["num_tokens"]) in str(caught.value)
    assert within(10, continued.run("tree", backend=tiny, **GREEDY).error) is None


def test_a_generation_ends_where_the_context_does(tiny: bo.Runtime) -> None:
    state = continued.run("tree " * 100, backend=tiny, max_tokens=1000, ignore_eos=True)
    meta = within(60, lambda: state.get_meta_info("new"))
    assert meta["finish_reason"] == "context"
    assert meta["prompt_tokens"] + meta["completion_tokens"] == 256


def test_a_prompt_beyond_the_pool_is_refused_with_both_numbers(small: bo.Runtime) -> None:
    state = continued.run("tree " * 110, backend=small, **GREEDY)
    with pytest.raises(bo.ResourceExhausted, match=r"\d+ tokens need \d+ pages, the KV pool has 6"):
        within(10, lambda: state["new"])


def test_a_pool_that_fills_up_while_decoding_ends_the_generation_with_what_it_had(small: bo.Runtime) -> None:
    state = continued.run("tree " * 20, backend=small, max_tokens=200, ignore_eos=True)
    with pytest.raises(bo.ResourceExhausted, match="fill the KV pool of 96 tokens") as caught:
        within(20, lambda: state["new"])
    assert caught.value.details["pool_tokens"] == 96
    assert caught.value.details["partial_text"]
    assert within(10, continued.run("tree", backend=small, **GREEDY).error) is None
    assert small.stats()["num_running"] == 0


def test_more_work_than_the_pool_holds_is_done_in_turns(small: bo.Runtime) -> None:
    items = [{"prompt": f"branch {index} of the tree " * 3} for index in range(10)]
    states = within(
        60, lambda: continued.run_batch(items, backend=small, max_tokens=24, temperature=0, ignore_eos=True)
    )
    assert [state.error() for state in states] == [None] * 10
    alone = continued.run(items[3]["prompt"], backend=small, max_tokens=24, temperature=0, ignore_eos=True)
    assert within(20, lambda: alone["new"]) == states[3]["new"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, "temperature must be between 0 and 100, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be between 0 and 100, got nan"),
        ({"top_p": 0.0}, "top_p must be greater than 0"),
        ({"logit_bias": {5000: 1.0}}, "token ids must be between 0 and 1279, got 5000"),
    ],
)
def test_parameters_out_of_range_are_refused_by_field_limit_and_value(
    pocket: bo.Runtime, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(bo.InvalidRequest, match=words):
        within(10, lambda: answer.run("Hello!", backend=pocket, **options)["answer"])


def test_the_runtime_itself_refuses_what_a_careless_client_lets_through(pocket: bo.Runtime) -> None:
    with bo.RuntimeClient(pocket.address) as client:
        branch = client.open()
        client.extend(branch, [protocol.Text("Hello")])
        bad = client.generate(branch, protocol.SamplingParams(max_tokens=0))
        assert isinstance(bad.exception(10), bo.InvalidRequest)
        for choices in ([], ["a", "a"], [""]):
            other = client.open()
            client.extend(other, [protocol.Text("Hello")])
            failure = client.select(other, choices, "token_length_normalized").exception(10)
            assert isinstance(failure, bo.InvalidRequest)
        unknown = client.open()
        failure = client.extend(unknown, [protocol.RoleBegin("nobody")]).exception(10)
        assert isinstance(failure, bo.InvalidRequest)
        assert "unknown role: nobody" in str(failure)


# ------------------------------------------------------------------------------------------------ clients

CLIENT = """
import json, sys
import bough as bo

@bo.function
def continued(s, prompt):
    s += prompt
    s += bo.gen("new", temperature=0, max_tokens=16, ignore_eos=True)

with bo.RuntimeClient(sys.argv[1]) as client:
    states = continued.run_batch([{"prompt": f"{name} of the tree"} for name in sys.argv[2:]], backend=client)
    print(json.dumps([state["new"] for state in states]))
"""


def test_two_processes_use_one_runtime_at_once_and_get_their_own_answers(tiny: bo.Runtime) -> None:
    names = (["branch", "token", "page"], ["page", "world", "cache"])
    children = [python("-c", CLIENT, tiny.address, *each) for each in names]
    try:
        with ThreadPoolExecutor() as pool:
            outputs = list(pool.map(lambda child: child.communicate(timeout=60), children))
    finally:
        for child in children:
            end(child)
    assert [child.returncode for child in children] == [0, 0], outputs
    for each, (printed, _) in zip(names, outputs, strict=True):
        expected = [
            continued.run(f"{name} of the tree", backend=tiny, temperature=0, max_tokens=16, ignore_eos=True)["new"]
            for name in each
        ]
        assert json.loads(printed) == expected
    wait_until(lambda: tiny.stats()["num_branches"] == 0, 10, "the clients' branches are given back")


def test_a_client_that_leaves_gives_its_branches_back(pocket: bo.Runtime) -> None:
    before = pocket.stats()["num_branches"]
    with bo.RuntimeClient(pocket.address) as client:
        states = [answer.run("Hello!", backend=client, **GREEDY) for _ in range(3)]
        assert all(within(30, state.error) is None for state in states)
        assert int(pocket.stats()["num_branches"]) > int(before)
    wait_until(lambda: pocket.stats()["num_branches"] == before, 10, "the client's branches are given back")
    with pytest.raises(bo.RuntimeLost, match="closed"):
        client.stats()
