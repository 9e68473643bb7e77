"""The HTTP backend against a server on loopback: what is sent, what is read, what fails and how."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from openai_stub import Answer, Body, StubServer, logprob_of, serving

import bough as bo
from bough import State
from bough.runtime import protocol
from bough.runtime.protocol import Grammar, SamplingParams

WAIT_S = 10.0
Make = Callable[..., tuple[bo.OpenAI, StubServer]]


@pytest.fixture
def make() -> Iterator[Make]:
    """Return a backend and its server, by the server's script."""
    open_now: list[Any] = []

    def made(script: Any = None, **options: Any) -> tuple[bo.OpenAI, StubServer]:
        context = serving([Answer()] if script is None else script)
        server = context.__enter__()
        backend = bo.OpenAI("stub", base_url=server.url, api_key="secret", **{"max_retries": 0, **options})
        open_now.append((backend, context))
        return backend, server

    yield made
    for backend, context in open_now:
        backend.close()
        context.__exit__(None, None, None)


@bo.function
def ask(s: State, question: str, **options: Any) -> None:
    s += bo.system("Be brief.") + bo.user(question)
    s += bo.assistant(bo.gen("answer", **options))


def say(*texts: str) -> list[Answer]:
    return [Answer([text]) for text in texts]


# ------------------------------------------------------------------------------------------------ what is sent


def test_a_chat_model_is_sent_messages(make: Make) -> None:
    backend, server = make(say("Paris.", "A tower."))
    state = ask.run("Capital?", backend=backend)
    state += bo.user("Sights?") + bo.assistant(bo.gen("more", max_tokens=9, temperature=0))
    assert (state["answer"], state["more"]) == ("Paris.", "A tower.")
    first, second = server.requests
    assert first.pop("seed") != second.pop("seed")  # derived from the run's, for each gen
    assert first == {
        "model": "stub", "max_tokens": 128, "temperature": 1.0, "top_p": 1.0,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital?"}],
    }  # fmt: skip
    assert second["messages"][2:] == [
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "Sights?"},
    ]
    assert (second["max_tokens"], second["temperature"]) == (9, 0)
    assert server.authorizations == ["Bearer secret"] * 2
    assert state.messages()[-1] == {"role": "assistant", "content": "A tower."}
    assert isinstance(backend, bo.Backend)


def test_a_completion_model_is_sent_text(make: Make) -> None:
    backend, server = make(say(" 4", " 9"), is_chat_model=False)
    s = State(backend)
    s += "2 + 2 =" + bo.gen("four", stop=["\n"]) + ", 3 * 3 =" + bo.gen("nine")
    assert s.text() == "2 + 2 = 4, 3 * 3 = 9"
    assert [request["prompt"] for request in server.requests] == ["2 + 2 =", "2 + 2 = 4, 3 * 3 ="]
    assert server.requests[0]["stop"] == ["\n"]


def test_every_parameter_of_the_protocol_and_declared_extensions(make: Make) -> None:
    extensions = {"top_k": "top_k", "min_p": "min_p", "stop_token_ids": "stop_ids", "regex": "guided_regex"}
    backend, server = make(say("x", "y"), extensions=extensions, max_tokens_field="max_completion_tokens")
    given: dict[str, Any] = {
        "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "frequency_penalty": 0.1, "presence_penalty": 0.2, "seed": 7,
        "stop": "a", "logit_bias": {3: 1.5},
    }  # fmt: skip
    ask.run("?", **given, top_k=4, min_p=0.25, stop_token_ids=[9], backend=backend)["answer"]
    sent = server.requests[0]
    assert sent.pop("messages")
    assert sent.pop("max_completion_tokens") == 5
    expected = {**given, "model": "stub", "stop": ["a"], "logit_bias": {"3": 1.5}}
    expected.pop("max_tokens")
    seed = sent.pop("seed")
    assert expected.pop("seed") != seed  # of the run; each gen has its own
    assert sent == {**expected, "top_k": 4, "min_p": 0.25, "stop_ids": [9]}
    branch = backend.open()
    backend.extend(branch, [protocol.RoleBegin("assistant")])
    backend.generate(branch, SamplingParams(), grammar=Grammar(kind="regex", source="a+")).result(WAIT_S)
    assert server.requests[1]["guided_regex"] == "a+"


def test_a_number_ends_by_itself_where_a_server_knows_regular_expressions_alone(make: Make) -> None:
    backend, server = make(say("42", "0.5", "7"), extensions=["regex"])
    s = State(backend)
    for index, type in enumerate((int, float)):
        s += bo.user("?") + bo.assistant(bo.gen(f"x{index}", type=type))
    assert (s["x0"], s["x1"]) == (42, 0.5)
    sent = server.requests[0]["regex"]
    assert re.fullmatch(sent, "42")
    assert not re.fullmatch(sent, "42 apples")
    assert "stop_regex" not in server.requests[0]

    backend, server = make(say("42 apples"), extensions=["regex", "stop_regex"])
    s = State(backend)
    s += bo.assistant(bo.gen("x", type=int))
    s.sync()
    assert re.fullmatch(server.requests[0]["regex"], "42 apples")
    assert server.requests[0]["stop_regex"] == ["[^-.,0-9]"]


def test_a_json_schema_travels_as_response_format(make: Make) -> None:
    backend, server = make(say('{"a": 1}'))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    branch = backend.open()
    backend.extend(branch, [protocol.RoleBegin("assistant")])
    grammar = Grammar(kind="json_schema", source=json.dumps(schema))
    assert backend.generate(branch, SamplingParams(), grammar=grammar).result(WAIT_S).text == '{"a": 1}'
    form = server.requests[0]["response_format"]
    assert form["type"] == "json_schema"
    assert form["json_schema"]["schema"] == schema


def test_forks_share_what_is_before_them_and_roll_back_to_it(make: Make) -> None:
    backend, _ = make(lambda path, body: Answer([body["prompt"].upper()]), is_chat_model=False)
    s = State(backend)
    s += "a"
    forks = s.fork(3)
    forks += lambda i: str(i)
    forks += bo.gen("x")
    forks.join()
    assert s["x"] == ["A0", "A1", "A2"]
    branch = backend.open()
    length = backend.extend(branch, [protocol.Text("keep")]).result(WAIT_S).length
    backend.extend(branch, [protocol.Text(" drop")])
    assert backend.rollback(branch, length).result(WAIT_S).length == 4
    assert backend.generate(branch, SamplingParams()).result(WAIT_S).text == "KEEP"
    with pytest.raises(bo.InvalidRequest, match="length must be between 0 and 8, got 9"):
        backend.rollback(branch, 9).result(WAIT_S)


# ------------------------------------------------------------------------------------------------ what is read


def test_what_a_call_cost_and_why_it_ended(make: Make) -> None:
    answers = [Answer(["a b", " c"], "length"), Answer(["x"], extra={"stop_reason": "END"}), Answer(has_usage=False)]
    backend, _ = make(answers)
    metas = [ask.run("?", backend=backend).get_meta_info("answer") for _ in answers]
    assert [meta["finish_reason"] for meta in metas] == ["length", "stop", "stop"]
    assert [meta["matched_stop"] for meta in metas] == [None, "END", None]
    fields = ("prompt_tokens", "cached_tokens", "computed_tokens", "completion_tokens")
    assert [metas[0][field] for field in fields] == [10, 4, 6, 2]
    assert metas[2]["prompt_tokens"] == 0
    assert 0 <= metas[0]["queue_ms"] <= metas[0]["ttft_ms"] <= metas[0]["latency_ms"]
    assert backend.stats() == {
        "prompt_tokens": 20, "cached_tokens": 8, "computed_tokens": 12, "generated_tokens": 3,
        "num_requests": 3, "num_branches": backend.stats()["num_branches"],
    }  # fmt: skip
    assert backend.server_info()["model"] == "stub"


@pytest.mark.parametrize("is_chat_model", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities(make: Make, is_chat_model: bool, stream: bool) -> None:
    backend, _ = make([Answer(["so it", " is"])], is_chat_model=is_chat_model)

    @bo.function
    def program(s: State) -> None:
        s += (bo.user("?") + bo.assistant_begin()) if is_chat_model else "?"
        s += bo.gen("x", return_logprob=True, top_logprobs_num=1)

    meta = program.run(backend=backend, stream=stream).get_meta_info("x")
    assert [(token[0], token[2]) for token in meta["output_token_logprobs"]] == [
        (logprob_of(token, "x"), token) for token in ("so", " it", " is")
    ]
    assert meta["output_top_logprobs"][0][-1][2] == "?"


@pytest.mark.parametrize("is_chat_model", [True, False])
def test_a_stream_is_read_piece_by_piece(make: Make, is_chat_model: bool) -> None:
    first_read = threading.Event()

    def before(number: int) -> None:
        if number == 1:
            first_read.wait(WAIT_S)

    answer = Answer(["one", " two", " three"], before=before)
    backend, server = make([answer], is_chat_model=is_chat_model)

    @bo.function
    def program(s: State) -> None:
        s += (bo.user("?") + bo.assistant_begin()) if is_chat_model else "?"
        s += bo.gen("x")

    chunks = []
    for chunk in program.run(backend=backend, stream=True).text_iter("x"):
        chunks.append(chunk)
        first_read.set()  # the server goes on only after the first piece has arrived here
    assert chunks == ["one", " two", " three"]
    assert server.requests[0]["stream_options"] == {"include_usage": True}


def test_streams_without_usage_where_the_server_counts_none(make: Make) -> None:
    backend, server = make([Answer(["x"])], stream_usage=False)
    state = ask.run("?", backend=backend, stream=True)
    assert state["answer"] == "x"
    assert "stream_options" not in server.requests[0]


# ------------------------------------------------------------------------------------------------ select


@pytest.mark.parametrize("method", [method for method in protocol.CHOICE_METHODS if method != "pmi"])
def test_a_completion_model_scores_choices_by_echo(make: Make, method: Any) -> None:
    backend, server = make(lambda path, body: Answer(), is_chat_model=False)
    s = State(backend)
    s += "Pet:" + bo.select("pet", [" hamster", " cat", " big dog"], choices_method=method) + "!"
    meta = s.get_meta_info("pet")
    rows = [[" hamster"], [" cat"], [" big", " dog"]]
    assert [[token for _, _, token in row] for row in meta["choice_token_logprobs"]] == rows
    assert [[logprob for logprob, _, _ in row] for row in meta["choice_token_logprobs"]] == [
        [logprob_of(token, "x") for token in row] for row in rows
    ]
    assert sum(meta["distribution"]) == pytest.approx(1)
    assert meta["scores"][meta["index"]] == max(meta["scores"])
    assert s.text() == "Pet:" + s["pet"] + "!"
    assert server.requests[0]["prompt"] == ["Pet: hamster", "Pet: cat", "Pet: big dog"]
    assert (server.requests[0]["max_tokens"], server.requests[0]["echo"]) == (0, True)
    if method == "token_length_normalized":
        assert s["pet"] == " cat"


def test_a_choice_is_drawn_by_the_runs_seed(make: Make) -> None:
    backend, _ = make(lambda path, body: Answer(), is_chat_model=False)

    @bo.function
    def pets(s: State) -> None:
        for index in range(12):
            s += "Pet:" + bo.select(str(index), [" hamster", " cat", " big dog"], temperature=20)

    first, again = (pets.run(backend=backend, seed=3) for _ in range(2))
    chosen = [first[str(index)] for index in range(12)]
    assert chosen == [again[str(index)] for index in range(12)]
    assert len(set(chosen)) > 1


def test_a_neutral_prompt_is_refused_by_name(make: Make) -> None:
    backend, _ = make(lambda path, body: Answer(), is_chat_model=False)
    s = State(backend)
    s += "Pet:" + bo.select("pet", [" hamster", " cat"], choices_method=bo.pmi)
    with pytest.raises(bo.errors.UnsupportedByBackend, match="capability 'pmi'"):
        s["pet"]


def test_a_token_that_straddles_the_seam_belongs_to_the_choice(make: Make) -> None:
    backend, _ = make(lambda path, body: Answer(), is_chat_model=False)
    s = State(backend)
    s += "a sun" + bo.select("x", ["flower", " rises"])
    rows = [[token for _, _, token in row] for row in s.get_meta_info("x")["choice_token_logprobs"]]
    assert rows == [[" sunflower"], [" rises"]]


@pytest.mark.parametrize("status", [200, 400])
def test_a_server_that_does_not_score_prompts_is_named(make: Make, status: int) -> None:
    def script(path: str, body: Body) -> Answer:
        body.pop("echo", None)
        body.pop("logprobs", None)
        return Answer(status=status)

    backend, _ = make(script, is_chat_model=False)
    s = State(backend)
    s += "Pet:" + bo.select("pet", [" cat"])
    with pytest.raises(bo.UnsupportedByBackend, match="score given choices") as caught:
        s["pet"]
    assert caught.value.details["capability"] == "select"


# ------------------------------------------------------------------------------------------------ tools


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_those_of_the_protocol(make: Make, stream: bool) -> None:
    calls = [("add", '{"a": 1, "b": 2}'), ("add", '{"a": "x"}')]
    backend, server = make([Answer(["I add."], "tool_calls", calls=calls), Answer(["It is 3."])])

    @bo.function
    def agent(s: State, question: str) -> Any:
        s.tools([add], system="Be careful.")
        s += bo.user(question)
        return s.run_tools(name="answer")

    state = agent.run("1 + 2?", backend=backend, stream=stream)
    done = state.ret_value
    assert done.answer == state["answer"] == "It is 3."
    assert [result.text for result in done.results] == ["3", "error: add: argument a: Expected `int`, got `str`"]
    first, second = server.requests
    assert first["tools"][0]["function"]["parameters"]["required"] == ["a", "b"]
    assert first["messages"][0] == {"role": "system", "content": "Be careful."}
    assert second["messages"][2:] == [
        {
            "role": "assistant", "content": "I add.",
            "tool_calls": [
                {"id": f"id{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
                for number, (name, arguments) in enumerate(calls)
            ],
        },
        {"role": "tool", "content": "3", "tool_call_id": "id0"},
        {"role": "tool", "content": done.results[1].text, "tool_call_id": "id1"},
    ]  # fmt: skip


def test_tools_in_plain_words_for_a_completion_model_and_results_without_calls(make: Make) -> None:
    backend, _ = make(is_chat_model=False)
    s = State(backend)
    s.tools([add], format="template")
    s += bo.gen("x")
    with pytest.raises(bo.UnsupportedByBackend, match="capability 'tools'"):
        s["x"]
    chat, _ = make()
    s = State(chat)
    s += bo.role("tool", "3") + bo.assistant(bo.gen("x"))
    with pytest.raises(bo.UnsupportedByBackend, match="answers no call"):
        s["x"]


# ------------------------------------------------------------------------------------------------ what it cannot


@pytest.mark.parametrize(
    ("options", "expression", "capability"),
    [
        ({}, bo.user("q") + bo.assistant(bo.select("x", ["a", "b"])), "select"),
        ({}, "text" + bo.gen("x"), "plain_text"),
        ({}, bo.user("q") + bo.gen("x"), "plain_text"),
        ({}, bo.user(bo.gen("x")), "roles"),
        ({}, bo.assistant("Best: " + bo.gen("x")), "continue_final_message"),
        ({}, bo.assistant(bo.gen("x", top_k=3)), "top_k"),
        ({}, bo.assistant(bo.gen("x", min_tokens=3)), "min_tokens"),
        ({}, bo.assistant(bo.gen("x", stop_regex="a")), "stop_regex"),
        ({}, bo.assistant(bo.gen("x", type=int)), "regex"),
        ({"extensions": ["regex"]}, bo.assistant(bo.gen("x", type=int, stop_regex="a")), "stop_regex"),
        ({}, bo.assistant(bo.gen("x", ignore_eos=True)), "ignore_eos"),
        ({}, bo.assistant(bo.gen("x", repetition_penalty=1.1)), "repetition_penalty"),
        ({"is_chat_model": False}, bo.user("q") + bo.gen("x"), "roles"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_names_the_capability(
    make: Make, options: Any, expression: Any, capability: str
) -> None:
    backend, server = make(**options)
    s = State(backend)
    s += expression
    with pytest.raises(bo.UnsupportedByBackend, match=f"cannot .*capability '{capability}'") as caught:
        s["x"]
    assert caught.value.details["capability"] == capability
    assert server.requests == []


def test_constraints_tokens_and_caches_it_does_not_know(make: Make) -> None:
    backend, _ = make()
    for kind in ("regex", "lark", "choices"):
        branch = backend.open()
        backend.extend(branch, [protocol.RoleBegin("assistant")])
        failed = backend.generate(branch, SamplingParams(), grammar=Grammar(kind=kind, source="[]"))
        with pytest.raises(bo.UnsupportedByBackend, match=kind):
            failed.result(WAIT_S)
    with pytest.raises(bo.UnsupportedByBackend, match="token ids"):
        backend.extend(backend.open(), [protocol.Tokens(0)]).result(WAIT_S)
    with pytest.raises(bo.UnsupportedByBackend, match="drop the server's cache"):
        bo.flush_cache(backend)


def test_a_message_is_continued_where_the_server_can(make: Make) -> None:
    backend, server = make(say("42"), extensions=["continue_final_message"])
    s = State(backend)
    s += bo.user("?") + bo.assistant("It is " + bo.gen("x"))
    assert s.messages()[-1]["content"] == "It is 42"
    assert server.requests[0]["messages"][-1] == {"role": "assistant", "content": "It is "}
    assert server.requests[0]["continue_final_message"] is True


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": ""}, "model must be the name"),
        ({"max_concurrency": 0}, "max_concurrency must be at least 1"),
        ({"max_tokens_field": "n"}, "max_tokens_field must be one of"),
        ({"extensions": ["warp"]}, "an extension must be one of .* got 'warp'"),
        ({"extensions": {"top_k": ""}}, "the server's name of top_k"),
        ({"extensions": 3}, "extensions must be names"),
    ],
)
def test_bad_arguments_are_refused_at_once(given: dict[str, Any], words: str) -> None:
    with pytest.raises(bo.InvalidRequest, match=words):
        bo.OpenAI(**{"model": "m", "api_key": "k", **given})


def test_a_missing_key_is_told_in_the_packages_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(bo.InvalidRequest, match=r"openai package refuses this: .*api_key"):
        bo.OpenAI("m")


# ------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("answer", "kind", "details"),
    [
        (Answer(status=400, message="bad"), bo.InvalidRequest, {"status": 400}),
        (Answer(status=401), bo.InvalidRequest, {"status": 401}),
        (Answer(status=400, code="context_length_exceeded"), bo.ContextOverflow, {}),
        (Answer(status=400, message="This model's maximum context length is 8"), bo.ContextOverflow, {}),
        (Answer(status=404, code="model_not_found"), bo.UnsupportedModel, {}),
        (Answer(status=429, headers={"retry-after": "7"}), bo.Overloaded, {"retry_after": "7"}),
        (Answer(status=429, code="insufficient_quota"), bo.ResourceExhausted, {}),
        (Answer(status=500, message="oh"), bo.BackendError, {"status": 500}),
        (Answer(status=503), bo.Overloaded, {}),
        (Answer(["x"], "content_filter"), bo.BackendError, {"partial_text": "x"}),
    ],
)
def test_failures_are_bough_errors_and_poison_their_branch_only(
    make: Make, answer: Answer, kind: type[bo.BoughError], details: dict[str, Any]
) -> None:
    backend, _ = make([answer, Answer(["fine"])])
    failed = ask.run("?", backend=backend)
    failed += bo.user("more") + bo.assistant(bo.gen("later"))
    with pytest.raises(kind) as caught:
        failed["answer"]
    assert details.items() <= caught.value.details.items()
    with pytest.raises(kind):
        failed["later"]
    assert ask.run("?", backend=backend)["answer"] == "fine"


def test_load_is_waited_out_for_as_long_as_the_server_says(make: Make) -> None:
    refusals = [Answer(status=429, headers={"retry-after-ms": "20"}), Answer(status=503, headers={"retry-after": "0"})]
    backend, server = make([*refusals, *say("at last")], max_retries=2)
    assert ask.run("?", backend=backend)["answer"] == "at last"
    assert len(server.requests) == 3


def test_a_stream_that_breaks_ends_with_what_had_come(make: Make) -> None:
    backend, _ = make([Answer(["one", " two", " three"], cut_after=2), Answer(["one"], error="out of memory")])
    for kind, partial in ((bo.RuntimeLost, "one two"), (bo.BackendError, "one")):
        state = ask.run("?", backend=backend, stream=True)
        chunks: list[str] = []
        with pytest.raises(kind) as caught:
            chunks.extend(state.text_iter("answer"))  # keeps what came before the failure
        assert "".join(chunks) == partial
        assert caught.value.details["partial_text"] == partial


def test_a_stream_without_an_end_is_no_answer(make: Make) -> None:
    backend, _ = make([Answer(["one"], finish_reason=None)])
    with pytest.raises(bo.BackendError, match="ended before the server was done"):
        ask.run("?", backend=backend, stream=True)["answer"]


def test_nobody_listens() -> None:
    with serving(say()) as server:
        url = server.url
    with (
        bo.OpenAI("m", base_url=url, api_key="k", max_retries=0) as backend,
        pytest.raises(bo.RuntimeLost, match=r"127\.0\.0\.1.* cannot be reached"),
    ):
        ask.run("?", backend=backend)["answer"]


def test_a_server_that_refuses_seeds_gets_none(make: Make) -> None:
    backend, server = make(say("x"), sends_seed=False)
    assert ask.run("?", seed=3, backend=backend)["answer"] == "x"
    assert "seed" not in server.requests[0]


def held() -> tuple[threading.Event, Callable[[int], None]]:
    release = threading.Event()

    def hold(number: int) -> None:
        release.wait(WAIT_S)

    return release, hold


def test_a_deadline_ends_a_slow_request_and_one_that_waits_for_its_turn(make: Make) -> None:
    release, hold = held()
    backend, _ = make(lambda path, body: Answer(before=hold), max_concurrency=1)
    slow = ask.run("?", backend=backend)
    waiting = ask.run("?", backend=backend, timeout=0.2)
    with pytest.raises(bo.Timeout, match=r"longer than its 0\.[12]\d* s"):
        waiting["answer"]
    release.set()
    assert slow["answer"] == "said"
    backend.close()


def test_the_timeout_of_a_request(make: Make) -> None:
    release, hold = held()
    backend, _ = make(lambda path, body: Answer(before=hold), timeout=0.05)
    with pytest.raises(bo.Timeout, match="did not answer in time"):
        ask.run("?", backend=backend)["answer"]
    release.set()


def test_cancel_closes_the_connection_and_ends_the_descendants(make: Make) -> None:
    begun = threading.Event()
    server: StubServer

    def before(number: int) -> None:
        begun.set()
        if number:
            server.disconnected.wait(0.01)  # until the closed connection is noticed by a write

    backend, server = make(lambda path, body: Answer(["x" * 1000] * 1000, before=before))
    state = ask.run("?", backend=backend, stream=True)
    (child,) = state.fork()
    child += bo.user("?") + bo.assistant(bo.gen("later"))
    assert begun.wait(WAIT_S)
    state.cancel()
    for branch, name in ((state, "answer"), (child, "later")):
        with pytest.raises(bo.Cancelled):
            branch[name]
    assert server.disconnected.wait(WAIT_S)


def test_closing_wakes_everyone(make: Make) -> None:
    release, hold = held()
    backend, _ = make(lambda path, body: Answer(before=hold))
    state = ask.run("?", backend=backend)
    state += bo.user("more") + bo.assistant(bo.gen("later"))
    backend.close()
    backend.close()
    for name in ("answer", "later"):
        with pytest.raises(bo.RuntimeLost, match="was closed"):
            state[name]
    with pytest.raises(bo.RuntimeLost):
        ask.run("?", backend=backend)["answer"]
    release.set()


# ------------------------------------------------------------------------------------------------ many at once


def test_many_branches_share_one_thread_and_a_bounded_number_of_requests(make: Make) -> None:
    others = set(threading.enumerate())
    backend, server = make(lambda path, body: Answer([body["messages"][-1]["content"]]), max_concurrency=4)
    s = State(backend)
    forks = s.fork(64)
    forks += lambda i: bo.user(str(i)) + bo.assistant(bo.gen("x"))
    ours = [t for t in threading.enumerate() if t not in others and t.name.startswith("bough")]
    forks.join()
    assert s["x"] == [str(i) for i in range(64)]
    assert len(ours) <= 2  # the loop's, and the one it looks names up in
    assert server.most_running <= 4
    assert backend.stats()["num_requests"] == 64


def test_branches_are_forgotten_with_their_states(make: Make) -> None:
    backend, _ = make(lambda path, body: Answer(), is_chat_model=False)

    def work() -> None:
        s = State(backend)
        s += "a" + bo.gen("x")
        forks = s.fork(3)
        forks += bo.gen("y")
        forks.join()
        assert s["y"] == ["said"] * 3

    work()
    done: Future[Any] = backend.extend(backend.open(), [])  # after the releases, in the loop's order
    done.result(WAIT_S)
    assert backend.stats()["num_branches"] == 1


def test_order_and_poison_of_branches_that_are_not_open(make: Make) -> None:
    backend, _ = make()
    for failed in (backend.extend(99, []), backend.generate(backend.fork(99, 1)[0], SamplingParams())):
        with pytest.raises(bo.InvalidRequest, match="branch 99 is not open"):
            failed.result(WAIT_S)
    assert backend.cancel(99).result(WAIT_S) == 0
    branch = backend.open()
    backend.release([branch])
    with pytest.raises(bo.InvalidRequest, match="is not open"):
        backend.extend(branch, []).result(WAIT_S)
