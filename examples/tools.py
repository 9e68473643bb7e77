"""Python functions as tools: the model is told of them, its calls are checked and carried out, until it answers.

python examples/tools.py
"""

import operator

import bough as bo

FACTS = {"price of the lamp": 36, "city of Mara": "Oslo"}
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def calculator(expression: str) -> int:
    """computes a number"""
    left, sign, right = expression.split()
    return SIGNS[sign](int(left), int(right))


def lookup(key: str) -> int | str:
    """finds a fact"""
    return FACTS.get(key.strip(), "not found")


@bo.function
def agent(s, question):
    s.tools([calculator, lookup])
    s += bo.user(question)
    return s.run_tools(max_rounds=4, name="answer")


def main(backend):
    for question in ("What is 17 + 25?", "What is the price of the lamp plus 12?", "Where does Mara live?"):
        state = agent.run(question, temperature=0, max_tokens=48, backend=backend)
        done = state.ret_value
        calls = (f"{result.call.name} {result.call.arguments!r} -> {result.text}" for result in done.results)
        print(f"{question}\n    {done.answer}  ({', '.join(calls)})")


if __name__ == "__main__":
    with bo.Runtime() as runtime:
        main(runtime)
