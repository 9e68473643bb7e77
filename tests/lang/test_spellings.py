"""SGLang's other names mean the same here, or say what to use."""

from __future__ import annotations

from typing import Any

import pytest

import bough as sgl
from bough.runtime.protocol import SamplingParams
from bough.spellings import runtime_arguments


def test_server_arguments_are_arguments_of_the_runtime() -> None:
    given = {"random_seed": 7, "max_running_requests": 4, "chunked_prefill_size": 64, "launch_timeout": 9.0}
    assert runtime_arguments({**given, "disable_radix_cache": True, "tp_size": 1, "trust_remote_code": False}) == {
        "seed": 7, "max_running": 4, "token_budget": 64, "start_timeout": 9.0, "radix_cache": False,
    }  # fmt: skip


def test_server_arguments_with_another_meaning_are_refused_not_dropped() -> None:
    with pytest.raises(sgl.InvalidRequest, match="tp_size can only be 1, got 8"):
        sgl.Runtime(model_path="pocket", tp_size=8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'speculative_algorithm'"):
        sgl.Runtime(model_path="pocket", speculative_algorithm="EAGLE")
    with pytest.raises(sgl.InvalidRequest, match="seed must be a whole number of at least 0, got -1"):
        sgl.Runtime(model_path="pocket", random_seed=-1)


def test_an_endpoint_is_a_client_and_refuses_what_it_cannot_be() -> None:
    assert issubclass(sgl.RuntimeEndpoint, sgl.RuntimeClient)
    with pytest.raises(sgl.InvalidRequest, match=r"OpenAI\(model, base_url='http://localhost:30000/v1'\)"):
        sgl.RuntimeEndpoint("http://localhost:30000")
    for given in ({"api_key": "k"}, {"verify": "ca.pem"}, {"chat_template_name": "chatml"}):
        with pytest.raises(sgl.InvalidRequest, match=f"{next(iter(given))} has no meaning"):
            sgl.RuntimeEndpoint("ipc:///tmp/nothing", **given)
    with pytest.raises(sgl.InvalidRequest, match="must be a text"):
        sgl.RuntimeEndpoint(3)  # type: ignore[arg-type]
    with pytest.raises(sgl.RuntimeLost):
        sgl.RuntimeEndpoint("ipc:///tmp/bough-nothing-listens-here", timeout=0.05)


@pytest.mark.parametrize("name", ["Engine", "Anthropic", "VertexAI", "LiteLLM", "Crusoe", "global_config"])
def test_names_that_are_not_here_say_what_is(name: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}': "):
        getattr(sgl, name)


def test_images_and_videos_are_refused_by_name() -> None:
    with pytest.raises(sgl.UnsupportedModel, match="images are not supported"):
        sgl.image("cat.png")
    with pytest.raises(sgl.UnsupportedModel, match="videos are not supported"):
        sgl.video("cat.mp4", 8)


def test_speculation_for_paid_apis_is_taken_and_changes_nothing() -> None:
    @sgl.function(num_api_spec_tokens=64)
    def program(s: sgl.State) -> None:
        s += sgl.gen("x")

    assert program.run(backend=sgl.ScriptedBackend(["said"]))["x"] == "said"
    with pytest.raises(sgl.InvalidRequest, match="num_api_spec_tokens"):
        sgl.function(num_api_spec_tokens=-1)


# SGLang's own defaults; None means the run's, then the server's.
EVERY_ARGUMENT: dict[str, Any] = {
    "max_tokens": None, "min_tokens": None, "n": None, "stop": None, "stop_token_ids": None, "stop_regex": None,
    "temperature": None, "top_p": None, "top_k": None, "min_p": None, "frequency_penalty": None,
    "presence_penalty": None, "ignore_eos": None, "return_logprob": None, "logprob_start_len": None,
    "top_logprobs_num": None, "return_text_in_logprobs": None, "dtype": None, "choices": None,
    "choices_method": None, "regex": None, "json_schema": None,
}  # fmt: skip


def test_gen_takes_every_argument_with_its_default() -> None:
    assert sgl.gen("x", **EVERY_ARGUMENT) == sgl.gen("x")
    defaults = SamplingParams()
    assert (defaults.max_tokens, defaults.min_tokens, defaults.temperature, defaults.top_p) == (128, 0, 1.0, 1.0)
    assert (defaults.top_k, defaults.min_p, defaults.ignore_eos, defaults.logprobs) == (-1, 0.0, False, None)


def test_run_takes_every_sampling_argument_too() -> None:
    seen: list[SamplingParams] = []

    def say(text: str, params: SamplingParams) -> str:
        seen.append(params)
        return "x"

    @sgl.function
    def program(s: sgl.State) -> None:
        s += sgl.gen("x")

    program.run(
        max_new_tokens=5, min_tokens=1, n=1, stop=["."], stop_token_ids=[2], stop_regex=["a+"], temperature=0.5,
        top_p=0.9, top_k=3, min_p=0.1, frequency_penalty=0.1, presence_penalty=0.2, ignore_eos=True,
        return_logprob=True, logprob_start_len=-1, top_logprobs_num=2, return_text_in_logprobs=True,
        backend=sgl.ScriptedBackend(say),
    )["x"]  # fmt: skip
    assert seen == [
        SamplingParams(
            max_tokens=5, min_tokens=1, stop=(".",), stop_token_ids=(2,), stop_regex=("a+",), temperature=0.5,
            top_p=0.9, top_k=3, min_p=0.1, frequency_penalty=0.1, presence_penalty=0.2, ignore_eos=True, logprobs=2,
            seed=seen[0].seed,
        )
    ]  # fmt: skip


def test_logprobs_of_the_prompt_are_refused_with_the_way_to_get_them() -> None:
    assert sgl.gen("x", return_logprob=True, logprob_start_len=-1, return_text_in_logprobs=True) == sgl.gen(
        "x", return_logprob=True
    )
    with pytest.raises(sgl.InvalidRequest, match=r"logprob_start_len must be -1 .*got 0: .*choice_token_logprobs"):
        sgl.gen("x", return_logprob=True, logprob_start_len=0)
    with pytest.raises(sgl.InvalidRequest, match="return_text_in_logprobs must be True or False"):
        sgl.gen("x", return_text_in_logprobs="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [sgl.gen_int, sgl.gen_string])
def test_typed_gens_take_no_second_constraint(make: Any) -> None:
    for name in ("regex", "json_schema", "choices", "dtype"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            make("x", **{name: "a"})


def test_typed_gens_give_texts_of_their_type() -> None:
    s = sgl.State(sgl.ScriptedBackend({"age": "42", "name": '"Zoé, 7"'}))
    s += "Age: " + sgl.gen_int("age") + ", name: " + sgl.gen_string("name", max_tokens=8)
    assert (s["age"], s["name"]) == ("42", '"Zoé, 7"')
