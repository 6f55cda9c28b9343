"""Selective copy with early marks: does SPARSEK (arXiv 2406.16747) learn which keys to keep when they leave the window.

    python -m benchmarks.selective_copy --seeds 0,1

The task `synthetic:selective`: a few values behind marks stand in the first quarter of a row of other values, and the
marks are shown again at its end. Every answer lies far outside the window. Whoever knows that a marked value is wanted,
and not which mark it stood behind, gets one in so many right as there are marks. One key/value head: with several, each
choosing by chance, a layer would see much of what the window of the layer below has gathered. All models have equal
parameters, but for the scores that SPARSEK learns, one row of its width.
"""

import argparse
from typing import Any

import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.data.synthetic import SyntheticSource, SyntheticTask

PAIRS, VALUES, LENGTH, WINDOW, ROWS = 4, 16, 96, 4, 32
TASK = SyntheticTask("selective", pairs=PAIRS, values=VALUES)
RATE, WARM_UP, HELD_OUT_BATCHES = 3e-3, 100, 16

SPARSEK = {"kind": "sparsek", "k": PAIRS, "sliding_window": WINDOW}
SOFTMAX = {"kind": "attention", "score_function": "softmax", "slopes": "none"}
PLANS: dict[str, dict[str, Any]] = {
    "sparsek": SPARSEK,
    "sparsek-straight": {**SPARSEK, "masking": "straight"},
    "sparsek-sigmoid": {**SPARSEK, "score_function": "sigmoid", "score_bias": "-log(window)"},
    "random-k": {**SPARSEK, "selection": "random"},
    "recent-k": {**SPARSEK, "selection": "recent"},
    "window": {**SOFTMAX, "sliding_window": WINDOW},
    "full-attention": {**SOFTMAX, "sliding_window": None},
}


def source(split: str, seed: int) -> SyntheticSource:
    """The rows of a split."""
    return SyntheticSource(TASK, split, LENGTH, seed, batch_size=ROWS, vocab_size=TASK.num_ids)


def train_and_measure(entry: dict[str, Any], seed: int, steps: int) -> tuple[float, float]:
    """Train one model; the share of held-out answers that it gives, and how far the scores' weights have moved."""
    torch.manual_seed(seed)
    config = SwatConfig(
        vocab_size=TASK.num_ids, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, layers=[entry], initializer_range=0.05,
    )  # fmt: skip
    model = SwatForCausalLM(config).train()
    scores = [weight for name, weight in model.named_parameters() if "score_proj" in name]
    begun = [weight.detach().clone() for weight in scores]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    rows = source("train", seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM_UP) * (1 - step / steps * 0.95)
        batch = rows.batch(step)
        optimizer.zero_grad()
        model(batch.input_ids, labels=batch.labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    moved = max(
        (((weight.detach() - was).norm() / was.norm()).item() for weight, was in zip(scores, begun, strict=True)),
        default=0,
    )
    right = []
    with torch.no_grad():
        for batch in source("held_out", seed).pass_over(num_batches=HELD_OUT_BATCHES):
            found = model.eval()(batch.input_ids, use_cache=False).logits[:, :-1].argmax(-1)
            asked = batch.labels[:, 1:] >= 0
            right.append((found == batch.labels[:, 1:])[asked].double().mean())
    return torch.stack(right).mean().item(), moved


def main() -> None:
    """Train every model with every seed, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1", help="by commas")
    parser.add_argument("--models", default=",".join(PLANS), help=f"some of {', '.join(PLANS)}")
    parser.add_argument("--steps", type=int, default=800)
    given = parser.parse_args()
    unknown = set(given.models.split(",")) - PLANS.keys()
    if unknown:
        parser.error(f"--models: expected some of {', '.join(PLANS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    for seed in map(int, given.seeds.split(",")):
        for name in given.models.split(","):
            share, moved = train_and_measure(PLANS[name], seed, given.steps)
            scores = f", scores' weights moved by {moved:.2f} of their norm" if moved else ""
            print(f"{name:<17} seed {seed}: {share:.3f} of the answers{scores}", flush=True)


if __name__ == "__main__":
    main()
