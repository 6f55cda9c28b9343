"""How many steps of the demo's models, trained side by side, fit into the minutes allowed; found by timing a few.

The recipe's steps are the most; a slower machine trains fewer, all models the same number.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.model.recipe_fields import config_from_recipe
from swat_lm.papers.worker import MOST_THREADS, usable_cores
from swat_lm.recipe import Recipe

__all__ = ["Pace", "find_pace", "steps_within", "threads"]

# what training may use of the minutes; the rest is for start, evaluation, streaming and the page
TRAINING_SHARE = 0.68
# a step of the loop, beside the other models (optimizer, clipping, evaluation, shared caches), over the pass timed here
LOOP_OVERHEAD = 1.35
FEWEST = 20


@dataclass(frozen=True)
class Pace:
    """How the demo trains on this machine."""

    threads: int
    steps: int


def find_pace(recipes: Sequence[Recipe], vocab_size: int, minutes: float, timed: int = 5) -> Pace:
    """Threads for each of the models trained side by side, and the steps that fit."""
    cores = usable_cores()
    count = min(MOST_THREADS, max(1, cores // len(recipes)))
    with threads(count):
        seconds = [seconds_per_step(recipe, vocab_size, timed) for recipe in recipes]
    # side by side the slowest counts, unless they have to share cores
    together = max(max(seconds), sum(seconds) / cores)
    return Pace(count, steps_within(minutes, recipes[0].train.steps, together))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of PyTorch inside, the former number again after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def steps_within(minutes: float, most: int, seconds_per_step: float) -> int:
    """At most `most` steps that fit into the training share of the minutes; a multiple of 10."""
    fitting = int(minutes * 60 * TRAINING_SHARE / (LOOP_OVERHEAD * seconds_per_step))
    if fitting >= most:
        return most
    return max(min(FEWEST, most), fitting // 10 * 10)


def seconds_per_step(recipe: Recipe, vocab_size: int, timed: int) -> float:
    """Median seconds of a forward and backward pass over one batch, after two to warm up."""
    # the timing must not shift the random numbers that training draws
    with torch.random.fork_rng(devices=[]):
        model = SwatForCausalLM(config_from_recipe(recipe.model, vocab_size))
        tokens = torch.randint(vocab_size, (recipe.train.batch_size, recipe.data.sequence_length))
    seconds = []
    for _ in range(timed + 2):
        began = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[2:])[timed // 2]
