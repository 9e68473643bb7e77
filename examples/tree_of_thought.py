"""Search over thoughts: several ways to work a sum out, judged, and only the best one kept.

Every thought is a branch. The judge reads the sum and the thought on that branch; a branch that is not kept is dropped,
and its memory with it.

    python examples/tree_of_thought.py
"""

import bough as bo

WIDTH = 4


@bo.function
def solve(s, a, b):
    s += bo.system("You are a careful assistant.")
    thoughts = s.fork(WIDTH)
    thoughts += bo.user(f"What is {a} + {b}? Think step by step.")
    thoughts += bo.assistant(bo.gen("thought", max_tokens=64, temperature=1.2))
    for thought in thoughts:
        claim = f"{a} + {b} = {last_number(thought['thought'])}"
        judge = s.fork()[0]
        judge += bo.user(f"Is {claim} right?")
        judge += bo.assistant(bo.gen("working", temperature=0, stop=["Yes", "No"]))
        judge += bo.select("verdict", ["Yes", "No"])
        thought["claim"] = claim
        thought["judge"] = judge
    for thought in thoughts:
        verdict = thought["judge"].get_meta_info("verdict")
        thought["score"] = verdict["distribution"][0]  # how likely "Yes" is
    thoughts.join()
    return max(zip(s["score"], s["claim"], strict=True))


def last_number(text):
    digits = "".join(c if c.isdigit() else " " for c in text).split()
    return digits[-1] if digits else "0"


def main(backend):
    state = solve.run(17, 25, seed=1, backend=backend)
    for score, claim in zip(state["score"], state["claim"], strict=True):
        print(f"{score:6.1%}  {claim}")
    print("best:", state.ret_value[1])


if __name__ == "__main__":
    with bo.Runtime() as runtime:
        main(runtime)
