"""A conversation of several turns, printed while it is written.

The body of a streaming run has a thread of its own; readers follow it. Each turn computes only what is new in it.

    python examples/chat_streaming.py
"""

import bough as bo

FACTS = "Mara lives in Oslo. Mara works as a teacher. Tom lives in Lima. Tom has a cat."
QUESTIONS = ("Where does Mara live?", "What does she work as?", "What pet does Tom have?", "Thank you!")


@bo.function
def chat(s, questions):
    s += bo.system(f"You are a helpful assistant. {FACTS}")
    for number, question in enumerate(questions):
        s += bo.user(question)
        s += bo.assistant(bo.gen(f"answer{number}", max_tokens=32))


def main(backend):
    state = chat.run(QUESTIONS, temperature=0, stream=True, backend=backend)
    for number, question in enumerate(QUESTIONS):
        print(f"> {question}")
        for chunk in state.text_iter(f"answer{number}"):
            print(chunk, end="", flush=True)
        meta = state.get_meta_info(f"answer{number}")
        print(f"\n    ({meta['cached_tokens']} tokens cached, {meta['computed_tokens']} computed)")


if __name__ == "__main__":
    with bo.Runtime() as runtime:
        main(runtime)
