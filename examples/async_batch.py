"""Run programs on an event loop: some at once, then a batch whose results come as they end, and can be resumed.

python examples/async_batch.py
"""

import asyncio
import os
import tempfile

import bough as bo

QUESTIONS = tuple(f"What is {n} + {n + 8}?" for n in range(3, 15))


@bo.function
async def answer(s, question):
    s += bo.user(question)
    forks = s.fork(2)
    forks += bo.assistant(bo.gen("draft", max_tokens=24))
    await forks.ajoin()  # the loop goes on with the other programs meanwhile
    return max(await s.get("draft"), key=len)


async def run(backend, path):
    first = await asyncio.gather(*[answer.arun(question, backend=backend) for question in QUESTIONS[:2]])
    print([state.ret_value for state in first])
    for attempt in ("run", "rerun"):
        states = answer.arun_batch([(q,) for q in QUESTIONS], order="completion", resume=path, backend=backend, seed=1)
        saved = [state.is_saved async for state in states]
        print(f"{attempt}: {len(saved)} results, {sum(saved)} read from the file")


def main(backend):
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(backend, os.path.join(folder, "answers.jsonl")))


if __name__ == "__main__":
    with bo.Runtime() as runtime:
        main(runtime)
