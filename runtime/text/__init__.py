"""Text in, tokens out, and back: the only part of the runtime that knows what a character is.

    tokenizer.py     a model folder -> Tokenizer: encode, decode, special tokens
    folder.py        what the files of a model folder say about its tokenizer, checked once
    engines.py       the two encoders behind it: tiktoken (proved equal at load) and Hugging Face tokenizers
    boundaries.py    where a text may be cut so that its tokens do not depend on what follows
    tail.py          TextTail: appended text whose tokens are not all fixed yet
    detokenizer.py   IncrementalDecoder: token ids one at a time -> whole characters
    stops.py         StopMatcher: stop strings and patterns over growing text, and how much a stream may show
    chat.py          ChatTemplate: what the model's template writes before and after each message

Way in: chat.begin/end and the program's text -> TextTail -> token ids. Way out: sampled ids -> IncrementalDecoder ->
StopMatcher -> text. Nothing here knows of sequences, sockets or tensors.
"""
