"""`pocket`: the tiny chat model that comes with the project, and the recipe that made it.

example.py      what one training or evaluation conversation is
words.py        word lists, made-up names, and the split that keeps evaluation names unseen
facts.py        answering from facts that the conversation gives; copying; long contexts
sums.py         sums by tens and ones, word problems, checking, comparing, choosing
labels.py       few-shot classification, as a chat and as raw text
records.py      a sentence into a JSON record
tips.py         numbered tips and their explanations (the sentences are in tip_list.py)
tools.py        thought, action, observation, answer
chat.py         greetings, remembering a name, a small closed set of general knowledge
tasks.py        the mixture of all of these, seeded
tokenizer.py    trains the byte-level BPE and writes the chat template
muon.py         the optimizer of the hidden matrices
train.py        trains the model and writes the weights folder
evaluate.py     exact answers on held-out prompts
weights/        the result
"""
