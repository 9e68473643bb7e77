"""Run a program over many items; one that fails costs only itself.

python examples/batch.py
"""

import bough as bo

SENTENCES = (
    "Mara is 31 years old and lives in Oslo.",
    "The red lamp costs 36 euros.",
    "My friend Tom works as a baker in Lima.",
    "",
)


@bo.function
def extract(s, sentence):
    if not sentence:
        raise ValueError("an empty sentence")
    fields = "product, price" if "costs" in sentence else "name, city"
    s += bo.user(f"Extract {fields} as JSON.\n{sentence}")
    s += bo.assistant(bo.gen("record", max_tokens=48))


def main(backend):
    states = extract.run_batch([{"sentence": text} for text in SENTENCES], temperature=0, backend=backend)
    for sentence, state in zip(SENTENCES, states, strict=True):
        error = state.error()
        print(f"{sentence or '(nothing)'}\n    {state['record'] if error is None else repr(error)}")


if __name__ == "__main__":
    with bo.Runtime() as runtime:
        main(runtime)
