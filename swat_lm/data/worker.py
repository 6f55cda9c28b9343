"""A tokenising process: `python -P worker.py`, fed and read through pipes by `swat_lm/data/encoding.py`.

Run as a file, not as a module of the package, so that it starts in a fraction of a second; imports nothing of ours.
It ends when its input does, so it cannot outlive the process that started it. Messages are pickles between our own
processes: first the tokenizer's JSON, then batches of texts; each is answered by a list of token arrays, or an error.
"""

import os
import pickle
import sys
from typing import Any

import numpy as np


def encode(tokenizer: Any, texts: list[str], dtype: str) -> list[np.ndarray]:
    """Token ids of each text, without special tokens; text that looks like a special token is plain text."""
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(one.ids, dtype=dtype) for one in encodings]


def serve() -> None:
    """Answer batches until the input ends."""
    from tokenizers import Tokenizer

    requests = sys.stdin.buffer
    # whatever a library prints must not mix with the answers
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    content, dtype = pickle.load(requests)
    tokenizer = Tokenizer.from_str(content)
    tokenizer.encode_special_tokens = True
    while True:
        try:
            texts = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(encode(tokenizer, texts, dtype), answers, protocol=5)
        answers.flush()


if __name__ == "__main__":
    serve()
