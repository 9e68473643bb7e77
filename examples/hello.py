"""The smallest program: one question, one answer, and what the answer cost.

python examples/hello.py
"""

import bough as bo


@bo.function
def answer(s, question):
    s += bo.system("You are a helpful assistant.")
    s += bo.user(question)
    s += bo.assistant(bo.gen("answer", max_tokens=64, temperature=0))


def main(backend):
    for question in ("What is 17 + 25?", "What is the capital of France?"):
        state = answer.run(question, backend=backend)
        print(question)
        print("   ", state["answer"].replace("\n", "\n    "))
        meta = state.get_meta_info("answer")
        print(f"    cached {meta['cached_tokens']}, computed {meta['computed_tokens']} tokens of the prompt;")
        print(f"    generated {meta['completion_tokens']}, ended by {meta['finish_reason']}")


if __name__ == "__main__":
    with bo.Runtime() as runtime:
        main(runtime)
