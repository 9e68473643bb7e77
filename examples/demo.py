"""What `make demo` runs: roles, gen, a three-way fork and join, and select, then what each call cost.

python examples/demo.py
"""

import time

import bough as bo

TOPIC = "studying"
FIELDS = ("cached_tokens", "computed_tokens", "completion_tokens")


@bo.function
def advise(s, topic):
    s += bo.system("You are a helpful assistant.")
    s += bo.user(f"Give me three tips for {topic}.")
    s += bo.assistant(bo.gen("tips", max_tokens=80))

    forks = s.fork(3)  # three branches of one tree: they share what was computed so far
    forks += lambda i: bo.user(f"Explain tip {i + 1}.")
    forks += bo.assistant(bo.gen("why", max_tokens=40))
    forks.join()

    choice = s.fork()[0]
    choice += bo.user(f"Which tip is best for {topic}?\n" + s["tips"])
    choice += bo.assistant("Best: " + bo.select("best", ["1", "2", "3"]))
    s["best"] = choice["best"]
    s["best_meta"] = choice.get_meta_info("best")

    s += bo.user("Thank you!")
    s += bo.assistant(bo.gen("goodbye", max_tokens=16))


def show_answers(state):
    print(f"Three tips for {TOPIC}, each explained on a branch of its own:\n")
    for tip, why in zip(state["tips"].splitlines(), state["why"], strict=False):
        print(f"  {tip}\n     {why}")
    share = state["best_meta"]["distribution"][int(state["best"]) - 1]
    print(f"\n  The best one, by select: {state['best']} (probability {share:.2f})")
    print(f"  And at the end: {state['goodbye']}\n")


def show_costs(state):
    rows = [("gen tips", state.get_meta_info("tips"))]
    rows += [(f"gen why, branch {i}", meta) for i, meta in enumerate(state.get_meta_info("why"))]
    rows += [("select best", state["best_meta"]), ("gen goodbye", state.get_meta_info("goodbye"))]
    print(f"  {'call':20}{'cached':>10}{'computed':>10}{'generated':>10}")
    for name, meta in rows:
        print(f"  {name:20}" + "".join(f"{meta[field]:10}" for field in FIELDS))
    totals = (sum(meta[field] for _, meta in rows) for field in FIELDS)
    print(f"  {'in total':20}" + "".join(f"{total:10}" for total in totals))


def run(title, backend):
    started = time.perf_counter()
    state = advise.run(TOPIC, temperature=0, backend=backend)
    state.sync()
    elapsed_ms = (time.perf_counter() - started) * 1000
    return state, f"{title}: {elapsed_ms:.0f} ms"


def main(backend):
    state, first = run("first run", backend)
    show_answers(state)
    print("What each call cost, in tokens:\n")
    show_costs(state)
    again, second = run("the same again", backend)
    print("\nThe same program again, with its prefixes in the cache:\n")
    show_costs(again)
    print(f"\n{first}; {second}")


if __name__ == "__main__":
    with bo.Runtime() as runtime:
        print(f"{runtime.server_info()['model']} serves in process {runtime.pid}, {runtime.address}\n")
        main(runtime)
