"""SWAT's Figure 3: variance over channels of each layer's hidden state, by layer and position.

A token that gathers attention it does not need (a sink) has by far the largest. The first token differs also without
any training, since it alone sees nothing but itself; so the same is measured of the run's first weights.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from swat_lm.evaluate.figures import write_figures
from swat_lm.files import write_text
from swat_lm.papers.experiment import Measurement, Progress, Run
from swat_lm.papers.findings import Findings
from swat_lm.papers.measuring import read_json
from swat_lm.papers.sized import SizedVariant
from swat_lm.papers.swat.variants import ANALYSIS, SwatExperiment
from swat_lm.papers.verdicts import Verdict, judge

__all__ = ["StateVariance"]

VARIANCES = Path("evaluation", "variances.json")
FIRST_POSITIONS = 12


class StateVariance(SwatExperiment):
    """Whether training raises the first token's variance over that of later ones, and for which models."""

    @override
    def measure(self, variant: SizedVariant, run: Run) -> list[Measurement]:
        return [lambda told: measure_variances(run, told)] if read_variances(run.folder) is None else []

    @override
    def verdicts(self, found: Findings) -> list[Verdict]:

        def samples(name: str) -> dict[int, list[float]]:
            read = {seed: read_variances(found.run_folder(ANALYSIS[name], seed)) for seed in found.seeds}
            return {
                seed: [
                    math.log(trained / untrained)
                    for trained, untrained in zip(
                        held["first_over_rest"], held["untrained_first_over_rest"], strict=True
                    )
                ]
                for seed, held in read.items()
                if held is not None
            }

        full, window, swat = (samples(name) for name in ("vanilla-softmax-long", "sliding-softmax", "sliding-alirope"))
        zero = {seed: [0.0] * len(row) for seed, row in full.items()}
        what = "a picture without numbers"
        remark = (
            "Gaps are logarithms of the first token's variance over the median of the others', less the same of the "
            "untrained model: the first token differs from the start, since it sees itself only."
        )
        says = "training with full softmax attention makes the first token's hidden states vary more than other tokens'"
        return [
            judge(says, what, full, zero, remark),
            judge("it does so more than under SWAT", what, full, swat, remark),
            judge("it does so more than under a softmax window", what, full, window, remark),
        ]

    @override
    def pictures(self, found: Findings, out: Path) -> dict[str, Path]:
        # of the first seed, one range of colours
        from swat_lm.evaluate.heatmaps import plot_heat_map

        levels, drawn = {}, {}
        for variant in found.chosen.values():
            read = read_variances(found.run_folder(variant, found.seeds[0]))
            if read is not None:
                levels[variant.name] = [
                    [math.log10(max(x, 1e-12)) for x in row[:FIRST_POSITIONS]] for row in read["mean"]
                ]
        every = [x for layers in levels.values() for layer in layers for x in layer]
        for name, layers in levels.items():
            label = found.chosen[name].label
            path = drawn[f"Variance of hidden states: {label}"] = out / f"{self.name}-{name}.png"
            plot_heat_map(
                layers, path, rows=["embedding", *map(str, range(1, len(layers)))],
                columns=[str(place) for place in range(1, len(layers[0]) + 1)],
                ylabel="after layer", xlabel="position in the row (tokens)", scale="variance of hidden states (log10)",
                title=label, limits=(min(every), max(every)),
            )  # fmt: skip
        return drawn


def read_variances(run: Path) -> dict[str, Any] | None:
    """What was measured, if it was; not what an earlier version measured without an untrained twin."""
    path = run / VARIANCES
    found = read_json(path) if path.exists() else None
    return found if found is not None and "untrained_first_over_rest" in found else None


def measure_variances(run: Run, told: Progress) -> None:
    """Write the variances at the first positions of held-out rows of the training length to a JSON file."""
    import torch

    from swat_lm.data import BatchSource, prepare
    from swat_lm.model.architectures import build_model
    from swat_lm.model.loading import load_causal_lm

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
    write_text(run.folder / VARIANCES, write_figures(found))
    told("variances of hidden states", 1, 1)


def state_variances(model: Any, tokens: Any) -> np.ndarray:
    """[layers, rows, positions]: the embedding and all layers but the last, which comes behind the final norm."""
    import torch

    from swat_lm.evaluate.streaming_model import evaluating

    with torch.inference_mode(), evaluating(model):
        states = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    return torch.stack([layer.float().var(dim=-1) for layer in states[:-1]]).cpu().numpy()


def first_over_rest(variances: np.ndarray) -> list[float]:
    """Of each row the largest over layers of the first token's variance over the median of the later ones."""
    return (variances[1:, :, 0] / np.median(variances[1:, :, 1:], axis=2)).max(axis=0).tolist()
