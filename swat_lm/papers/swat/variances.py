"""Variance over channels of each layer's hidden state, for SWAT's Figure 3.

A token that gathers attention it does not need (a sink) has by far the largest. The first token differs also without
any training, since it alone sees nothing but itself; so the same is measured of the run's first weights.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from swat_lm.data import BatchSource, prepare
from swat_lm.evaluate.figures import write_figures
from swat_lm.evaluate.streaming_model import evaluating
from swat_lm.files import write_text
from swat_lm.model.architectures import build_model
from swat_lm.model.loading import load_causal_lm
from swat_lm.papers.experiment import Run

__all__ = ["measure_variances"]


def measure_variances(run: Run, path: Path) -> None:
    """Write the variances at the first positions of held-out rows of the training length to a JSON file."""
    model = load_causal_lm(str(run.folder))
    torch.manual_seed(run.recipe.seed)
    untrained: Any = build_model(model.config)
    data, rows = prepare(run.recipe.data), run.scale.pieces
    source = BatchSource(data, "held_out", run.scale.sizes["L"], "concatenate", 0, batch_size=rows)
    tokens = next(source.pass_over(num_batches=1)).input_ids.to(model.device)
    variances = state_variances(model, tokens)
    found = {
        "mean": np.round(variances.mean(axis=1), 6).tolist(),
        "first_over_rest": first_over_rest(variances),
        "untrained_first_over_rest": first_over_rest(state_variances(untrained.to(model.device), tokens)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, write_figures(found))


def state_variances(model: Any, tokens: torch.Tensor) -> np.ndarray:
    """[layers, rows, positions]: the embedding and all layers but the last, which comes behind the final norm."""
    with torch.inference_mode(), evaluating(model):
        states = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    return torch.stack([layer.float().var(dim=-1) for layer in states[:-1]]).cpu().numpy()


def first_over_rest(variances: np.ndarray) -> list[float]:
    """Of each row the largest over layers of the first token's variance over the median of the later ones."""
    return (variances[1:, :, 0] / np.median(variances[1:, :, 1:], axis=2)).max(axis=0).tolist()
