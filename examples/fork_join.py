"""Fork a state to explain three tips at once; join, and go on with what the branches wrote.

The branches share the conversation up to the fork: it is computed once, and nothing is copied or sent again.

    python examples/fork_join.py
"""

import bough as bo


@bo.function
def tips(s, topic):
    s += bo.system("You are a helpful assistant.")
    s += bo.user(f"Give me three tips for {topic}.")
    s += bo.assistant(bo.gen("tips", max_tokens=80))

    forks = s.fork(3)
    forks += lambda i: bo.user(f"Explain tip {i + 1}.")
    forks += bo.assistant(bo.gen("explanation", max_tokens=40))
    forks.join()  # s["explanation"] is now a list, in the order of the branches

    s += bo.user("Summarize:\n" + "\n".join(s["explanation"]))
    s += bo.assistant(bo.gen("summary", max_tokens=80))


def main(backend):
    state = tips.run("staying healthy", temperature=0, backend=backend)
    for tip, explanation in zip(state["tips"].splitlines(), state["explanation"], strict=False):
        print(f"{tip}\n   {explanation}")
    print("\nIn short:")
    print(state["summary"])
    print()
    print(state.tree())


if __name__ == "__main__":
    with bo.Runtime() as runtime:
        main(runtime)
