"""A process that trains a tokenizer: `python -P training_worker.py`, fed by `swat_lm/data/tokenizer_training.py`.

Run as a file like `swat_lm/data/worker.py`, and ended like it. Messages are pickles between our own processes: the
vocabulary's size with its special tokens, lists of texts, None; the answer is the tokenizer's JSON.
"""

import os
import pickle
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO


def received(requests: BinaryIO) -> Iterator[list[str]]:
    """The lists of texts, to the one that says that there are no more."""
    while (texts := pickle.load(requests)) is not None:
        yield texts


def train(texts: Iterator[list[str]], vocab_size: int, specials: list[str]) -> str:
    """Byte-level BPE with GPT-2's rule of where words end."""
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
    backend.train_from_iterator(texts, trainer)
    return backend.to_str()


def serve() -> None:
    """Train once and answer."""
    requests = sys.stdin.buffer
    # whatever a library prints must not mix with the answer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    vocab_size, specials = pickle.load(requests)
    pickle.dump(train(received(requests), vocab_size, specials), answers, protocol=5)
    answers.flush()


if __name__ == "__main__":
    serve()
