"""Copy at one lag: does context move on by segments per layer, as ECP (arXiv 2412.06106) says, and no farther.

    python -m benchmarks.ecp_copy --seeds 0,1

Every token is to be predicted as the one that stood so many places before it. Two layers of segments of 4 reach 8
tokens back from everywhere and 11 at most, so a lag of 8 takes both layers, and 13 is chance. Disjoint segments of 8
reach 7.
"""

import argparse

import torch

from swat_lm import SwatConfig, SwatForCausalLM

SEGMENT, LAYERS, VALUES, LENGTH, ROWS = 4, 2, 8, 32, 32
HELD_OUT_ROWS = 256
RATE, WARM_UP = 3e-3, 100

ECP = {"kind": "ecp", "segment": SEGMENT, "rotary_layers": "all"}
DISJOINT = {**ECP, "segment": 2 * SEGMENT, "look_back": 0}
CASES = (("ecp", ECP, 8), ("disjoint", DISJOINT, 8), ("ecp", ECP, 13))
"""A name, the layers, and the lag."""


def train_and_measure(entry: dict, lag: int, seed: int, steps: int) -> float:
    """Train one model; the share of held-out tokens that it copies, chance being one in `VALUES`."""
    torch.manual_seed(seed)
    config = SwatConfig(
        vocab_size=VALUES, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        layers=[entry], initializer_range=0.05,
    )  # fmt: skip
    model = SwatForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed + 100)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM_UP) * (1 - step / steps * 0.95)
        ids = torch.randint(VALUES, (ROWS, LENGTH), generator=generator)
        targets = torch.full_like(ids, -100)
        targets[:, lag:] = ids[:, :-lag]
        optimizer.zero_grad()
        model(ids, shift_labels=targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    ids = torch.randint(VALUES, (HELD_OUT_ROWS, LENGTH), generator=generator)
    with torch.no_grad():
        found = model.eval()(ids, use_cache=False).logits.argmax(-1)
    return (found[:, lag:] == ids[:, :-lag]).double().mean().item()


def main() -> None:
    """Train every case with every seed, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1", help="by commas")
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in map(int, given.seeds.split(",")):
        for name, entry, lag in CASES:
            share = train_and_measure(entry, lag, seed, given.steps)
            print(f"{name:<9} lag {lag:>2}, seed {seed}: {share:.3f} of the tokens", flush=True)


if __name__ == "__main__":
    main()
