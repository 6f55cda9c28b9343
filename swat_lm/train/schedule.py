"""The learning rate as a pure function of the step, so that a resumed run needs nothing saved."""

import math

from swat_lm.recipe import TrainRecipe

__all__ = ["learning_rate"]


def learning_rate(step: int, train: TrainRecipe) -> float:
    """Learning rate of optimizer step `step` (the first is 0).

    Linear from 0 over `warmup_steps`; then `constant`, `cosine` to the last step (Loshchilov and Hutter 2017,
    arXiv:1608.03983, without restarts), or `wsd`: constant, then linear over the last `decay_steps`
    (arXiv:2404.06395; linear as in arXiv:2405.18392). The last step has `final_learning_rate_ratio` of the highest.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    decay_steps = train.decay_steps if train.schedule == "wsd" else train.steps - train.warmup_steps
    progress = min(max((step + 1 - (train.steps - decay_steps)) / decay_steps, 0.0), 1.0)
    share = (1 + math.cos(math.pi * progress)) / 2 if train.schedule == "cosine" else 1 - progress
    ratio = train.final_learning_rate_ratio
    return train.learning_rate * (ratio + (1 - ratio) * share)
