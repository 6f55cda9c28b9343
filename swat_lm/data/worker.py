"""A process of the tokenizers library: `python -P worker.py`, fed and read through pipes by `swat_lm/data/encoding.py`.

Run as a file, not as a module of the package, so that it starts in a fraction of a second; imports nothing of ours.
It ends when its input does, so it cannot outlive the process that started it. Messages are pickles between our own
processes: a job with its settings, lists of texts, and None for their end. Each list to encode is answered by a list of
token arrays, all lists to train on together by the tokenizer's JSON.
"""

import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np


def encode(batches: Iterator[list[str]], tokenizer_json: str, dtype: str) -> Iterator[list[np.ndarray]]:
    """Token ids of each text, without special tokens; text that looks like a special token is plain text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    for texts in batches:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        yield [np.array(encoding.ids, dtype=dtype) for encoding in encodings]


def train(batches: Iterator[list[str]], vocab_size: int, specials: list[str]) -> Iterator[str]:
    """Byte-level BPE with GPT-2's rule of where words end; `vocab_size` counts the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(batches, trainer)
    yield backend.to_str()


def serve() -> None:
    """Do one job."""
    requests = sys.stdin.buffer
    # whatever a library prints must not mix with the answers
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    job, *settings = pickle.load(requests)
    for answer in {"encode": encode, "train": train}[job](iter(partial(pickle.load, requests), None), *settings):
        pickle.dump(answer, answers, protocol=5)
        answers.flush()


if __name__ == "__main__":
    # of an input that ends early: whoever started this is gone
    with suppress(EOFError):
        serve()
