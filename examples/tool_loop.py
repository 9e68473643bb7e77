"""An agent in plain Python: thought, action, observation, until it has an answer (ReAct).

The loop's text only grows, so each turn computes just the observation and the new thought.

    python examples/tool_loop.py
"""

import re

import bough as bo

FACTS = {"price of the lamp": "36", "city of Mara": "Oslo"}
SIGNS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def calculator(expression):
    match = re.fullmatch(r"\s*(\d{1,9})\s*([-+*])\s*(\d{1,9})\s*", expression)
    return str(SIGNS[match[2]](int(match[1]), int(match[3]))) if match else "unknown"


def lookup(key):
    return FACTS.get(key.strip(), "not found")


TOOLS = {"calculator": calculator, "lookup": lookup}


@bo.function
def agent(s, question, max_turns=4):
    s += bo.system(
        "You can use these tools: calculator[expression], lookup[key]. Write a thought and then an action or an answer."
    )
    s += bo.user(question)
    for _ in range(max_turns):
        s += bo.assistant("Thought:" + bo.gen("thought", stop="\n") + "\n" + bo.gen("act", stop="\n"))
        kind, _, rest = s["act"].partition(": ")
        if kind == "Answer":
            return rest
        call = re.match(r"(\w+)\[(.*)\]", rest)
        s += bo.role("tool", TOOLS[call[1]](call[2]) if call and call[1] in TOOLS else "unknown")
    return None


def main(backend):
    for question in ("What is 17 + 25?", "What is the price of the lamp plus 12?", "Where does Mara live?"):
        state = agent.run(question, temperature=0, max_tokens=48, backend=backend)
        for message in state.messages()[1:]:
            print(f"{message['role']:>9}  " + message["content"].replace("\n", "\n" + " " * 11))
        print("   answer ", state.ret_value, "\n")


if __name__ == "__main__":
    with bo.Runtime() as runtime:
        main(runtime)
