"""Classify with a few examples and `select`, which scores the given labels instead of writing freely.

All runs share the examples as their prefix: after the first one, the runtime has them in its cache.

    python examples/few_shot_select.py
"""

import bough as bo

EXAMPLES = """\
Review: The film was wonderful.
Sentiment: positive

Review: What a boring book!
Sentiment: negative

Review: I loved the meal, it was excellent.
Sentiment: positive

Review: The hotel is terrible and the staff is rude.
Sentiment: negative

"""
REVIEWS = ("We had a lovely time with the concert.", "I did not like this awful song.", "What a perfect trip!")


@bo.function
def classify(s, review):
    s += EXAMPLES
    s += f"Review: {review}\nSentiment:" + bo.select("label", [" positive", " negative"])


def main(backend):
    for review in REVIEWS:
        state = classify.run(review, backend=backend)
        meta = state.get_meta_info("label")
        share = meta["distribution"][meta["index"]]
        print(f"{state['label'].strip():9} {share:5.1%}  {meta['cached_tokens']:3} tokens cached  {review}")


if __name__ == "__main__":
    with bo.Runtime() as runtime:
        main(runtime)
