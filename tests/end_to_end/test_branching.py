"""Races, going back and choosing on a real runtime: what is cancelled, freed, and not computed again."""

from __future__ import annotations

from typing import Any

from processes import wait_until, within

import bough as bo

LONG: dict[str, Any] = {"max_tokens": 3000, "ignore_eos": True, "temperature": 1.0}


def numbers(runtime: bo.Runtime) -> dict[str, int]:
    return {name: value for name, value in runtime.stats().items() if isinstance(value, int)}


def test_the_losers_of_a_race_stop_and_their_pages_come_back(pocket: bo.Runtime) -> None:
    pocket.flush_cache()
    s = bo.State(pocket)
    s += "Once upon a time there was a tree. " * 8
    s.sync()
    forks = s.fork(6)
    before = numbers(pocket)
    for f in forks[1:]:
        f += bo.gen("story", **LONG)
    forks[0] += bo.gen("story", max_tokens=8, ignore_eos=True)
    (winner,) = within(60, forks.race)
    assert winner is forks[0]
    wait_until(lambda: numbers(pocket)["num_running"] == 0, 10, "the losers to stop")
    after = numbers(pocket)
    # All six drew together: the losers had drawn about as much as the winner when they were ended, never their 3,000.
    assert after["generated_tokens"] - before["generated_tokens"] < 5 * 3000
    # Cached are the prompt and the winner's eight tokens; the losers' private pages are free again.
    assert after["discarded_pages"] > before["discarded_pages"]
    tokens = winner.get_meta_info("story")["prompt_tokens"] + 8
    assert after["cached_pages"] <= -(-tokens // after["page_size"]) + 1
    assert after["free_pages"] == after["total_pages"] - after["cached_pages"]
    winner += bo.gen("more", max_tokens=4)
    assert winner.get_meta_info("more")["computed_tokens"] <= 2


def test_a_rewind_computes_nothing_again_and_draws_something_else(pocket: bo.Runtime) -> None:
    s = bo.function(lambda s: None).run(backend=pocket, seed=3)
    s += "The old house on the hill was"
    mark = s.checkpoint()
    s += bo.gen("x", max_tokens=12, ignore_eos=True)
    first = within(30, lambda: s["x"])
    text = s.text()
    s.rewind(mark)
    s += bo.gen("x", max_tokens=12, ignore_eos=True)
    assert within(30, lambda: s["x"]) != first
    assert s.get_meta_info("x")["computed_tokens"] == 1  # the last token, whose logits are needed
    s.rewind(mark)
    assert text.startswith(s.text())


def test_a_check_draws_from_right_before_its_gen(pocket: bo.Runtime) -> None:
    s = bo.State(pocket)
    s += bo.user("Say a number.") + bo.assistant("It is " + bo.gen("n", max_tokens=6))
    first = within(30, lambda: s["n"])
    seen: list[str] = []
    value = within(60, lambda: s.check(lambda n: seen.append(n) or len(seen) == 4))  # type: ignore[func-returns-value]
    assert (value, s["n"], seen[0]) == (seen[-1], seen[-1], first)
    assert s.get_meta_info("n")["computed_tokens"] <= 1
    assert s.messages()[-1]["content"] == "It is " + value


def test_a_dropped_span_leaves_what_a_text_without_it_would_hold(pocket: bo.Runtime) -> None:
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    s = bo.State(pocket)
    s += bo.system("Be brief.")
    with s.checkpoint() as page:
        s += bo.user("A very long page. " * 20)
    s += bo.user("What is 2 + 3?")
    assert 0 < s.drop(page) < 60
    s += bo.assistant(bo.gen("answer", **greedy))
    plain = bo.State(pocket)
    plain += bo.system("Be brief.") + bo.user("What is 2 + 3?") + bo.assistant(bo.gen("answer", **greedy))
    assert within(30, s.text) == plain.text()
    assert s.get_meta_info("answer")["prompt_tokens"] == plain.get_meta_info("answer")["prompt_tokens"]


def test_a_state_goes_on_as_its_best_branch_without_computing_it_again(pocket: bo.Runtime) -> None:
    s = bo.State(pocket)
    s += "A good name for a ship is"
    forks = s.fork(4)
    forks += bo.gen("name", max_tokens=8, ignore_eos=True, return_logprob=True)
    best = within(30, forks.best)
    assert bo.mean_logprob(best) == max(bo.mean_logprob(f) for f in forks)
    s += " because" + bo.gen("why", max_tokens=4, ignore_eos=True)
    assert within(30, lambda: s["name"]) == best["name"]
    assert s.get_meta_info("why")["computed_tokens"] <= 3


def test_a_whole_run_has_one_deadline(pocket: bo.Runtime) -> None:
    @bo.function
    def endless(s: bo.State) -> None:
        s += "x"
        while True:
            s += bo.gen("x", max_tokens=200, ignore_eos=True)
            s.sync()
            if s.error() is not None:
                return

    state = within(30, lambda: endless.run(backend=pocket, timeout=1.0))
    assert isinstance(state.error(), bo.Timeout)


def test_beams_share_their_past_and_the_pruned_give_their_pages_back(pocket: bo.Runtime) -> None:
    pocket.flush_cache()
    s = bo.State(pocket)
    s += "The captain looked at the sea and said that it was going to be a long night. " * 4
    gen = bo.gen("x", max_tokens=6, ignore_eos=True, heal=False)  # healing may draw a seam's token once more
    before = numbers(pocket)
    beams = within(60, lambda: s.beam(2, gen, depth=3, branching=3))
    after = numbers(pocket)
    assert len(beams) == 2
    scores = [bo.mean_logprob(b) for b in beams]
    assert scores == sorted(scores, reverse=True)
    assert after["generated_tokens"] - before["generated_tokens"] == 6 * (6 + 6 + 6)
    # The prompt was computed once, and of every later gen only what no sibling had computed.
    prompt = beams[0].get_meta_info("x")["prompt_tokens"]
    assert after["computed_tokens"] - before["computed_tokens"] < prompt + 6 * 3 * 4
    s.adopt(beams[0])
    assert within(30, s.text) == beams[0].text()
