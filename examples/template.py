"""A whole form in one constrained gen: the grammar holds the fixed text, its captures become typed variables.

python examples/template.py
"""

import bough as bo

CARD = (
    "Name: "
    + bo.capture("name", bo.rx("[A-Z][a-z]{2,9}"))
    + "\nLucky number: "
    + bo.capture("number", type=int)
    + "\nMood: "
    + bo.capture("mood", bo.one_of(["calm", "happy", "tired"]))
    + "\nLikes: "
    + bo.separated(bo.capture("likes", bo.one_of(["tea", "chess", "rain", "books"])), ", ", min=1, max=3)
    + "\n"
)


@bo.function
def character(s, place):
    s += bo.user(f"Invent somebody who lives in {place}.")
    s += bo.assistant(bo.gen("card", grammar=CARD, max_tokens=80))


def main(backend):
    for place in ("Oslo", "Rome"):
        state = character.run(place, temperature=0, backend=backend)
        print(f"{place}: {state['name']}, {state['number']}, {state['mood']}, likes {' and '.join(state['likes'])}")
        print("    one gen:", repr(state["card"]))


if __name__ == "__main__":
    with bo.Runtime() as runtime:
        main(runtime)
