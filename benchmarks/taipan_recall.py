"""Multi-query associative recall (arXiv 2312.04927) inside the window: does Taipan's gate find the queries.

    python -m benchmarks.taipan_recall --out runs/taipan-recall --seeds 0,1
    python -m benchmarks.taipan_recall --out runs/taipan-recall --summary

Each model is trained by the trainer on the same rows, and one JSON record is written for each, with accuracy on rows
that are never trained on and how often the gate opens at the tokens that ask and at all others. A record that is there
is kept, so several commands with other --variants or --seeds may run side by side on the same folder. More pairs are
asked for than the recurrences' small states hold; every answer lies inside the window.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from swat_lm.data.synthetic import SyntheticSource, SyntheticTask
from swat_lm.evaluate.streaming_model import evaluating
from swat_lm.files import write_text
from swat_lm.layers.selective_attention import SelectiveAttention
from swat_lm.model.architectures import configure_model, count_model_parameters
from swat_lm.model.loading import load_causal_lm
from swat_lm.recipe import DataRecipe, Recipe, TrainRecipe
from swat_lm.train import run

PAIRS, KEYS, VALUES = 8, 32, 32
LENGTH = WINDOW = 64
CAPACITY = 0.15
"""Of 64 tokens 8 ask: 12.5 %."""
WIDTH, STATE = 64, 4
SIX = {"kind": "mamba2", "state_size": STATE, "repeat": 2}
ROWS = 32
HELD_OUT_BATCHES = 32


def selective(**settings: Any) -> list[Any]:
    """Two recurrences and a layer of selective attention: one such group, where the paper has six recurrences."""
    return [SIX, {"kind": "taipan", "capacity": CAPACITY, **settings}]


STRICT = 3.0
"""The budget's weight; with the layer's default of 1 more tokens stay chosen than the budget asks for."""
PLANS: dict[str, list[Any]] = {
    "taipan": selective(budget_weight=STRICT),
    "taipan-light": selective(),
    "all-tokens": selective(selection="all"),
    "random": selective(selection="random"),
    "ssm-only": [{"kind": "mamba2", "state_size": STATE}],
    "taipan-sparse": selective(budget_weight=STRICT, execution="sparse"),
    "taipan-sigmoid": selective(budget_weight=STRICT, score_function="sigmoid", score_bias="-log(window)"),
}
# as many parameters as two recurrences with attention and feed-forward: see the records
DEPTHS = {"ssm-only": 4}


def recipe(variant: str, seed: int, out: Path, steps: int) -> Recipe:
    """The run of one model with one seed."""
    name = f"{variant}-seed{seed}"
    model = {
        "hidden_size": WIDTH, "intermediate_size": 184, "num_hidden_layers": DEPTHS.get(variant, 3),
        "num_attention_heads": 2, "sliding_window": WINDOW, "max_position_embeddings": LENGTH, "initializer_range": 0.1,
        "layers": PLANS[variant],
    }  # fmt: skip
    train = TrainRecipe(
        steps=steps, batch_size=ROWS, learning_rate=3e-3, warmup_steps=min(100, steps // 4), weight_decay=0.01,
        log_every=max(1, steps // 50), evaluate_every=0, save_every=0, keep=1, precision="fp32",
    )  # fmt: skip
    source = f"synthetic:mqar?pairs={PAIRS}&keys={KEYS}&values={VALUES}"
    data = DataRecipe(
        sources=(source,), tokenizer="bytes", sequence_length=LENGTH, documents="concatenate", held_out=0.0
    )
    return Recipe(name=name, seed=seed, out=str(out / "runs" / name), model=model, data=data, train=train)


def measure(model: PreTrainedModel, seed: int) -> dict[str, float]:
    """Accuracy of the answers, and of all gates together how often they open where one is asked for and elsewhere."""
    task = SyntheticTask("mqar", pairs=PAIRS, keys=KEYS, values=VALUES)
    rows = SyntheticSource(task, "held_out", LENGTH, seed, batch_size=ROWS, vocab_size=model.config.vocab_size)
    right: list[float] = []
    opened: dict[bool, list[Tensor]] = {True: [], False: []}
    shares: list[Tensor] = []
    mixers = [module for module in model.modules() if isinstance(module, SelectiveAttention)]
    handles = [mixer.register_forward_hook(lambda _, __, output: shares.append(output[1][..., 0])) for mixer in mixers]
    with evaluating(model), torch.inference_mode():
        for batch in rows.pass_over(num_batches=HELD_OUT_BATCHES):
            shares.clear()
            logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1]
            asked = batch.labels[:, 1:] >= 0
            right.append((logits.argmax(dim=-1) == batch.labels[:, 1:])[asked].double().mean().item())
            asking = torch.nn.functional.pad(asked, (0, 1))
            for share in shares:
                for which in (True, False):
                    opened[which].append((share > 0)[asking == which].double())
    for handle in handles:
        handle.remove()
    found = {"accuracy": fmean(right)}
    if mixers:
        found |= {
            "opened_where_asked": torch.cat(opened[True]).mean().item(),
            "opened_elsewhere": torch.cat(opened[False]).mean().item(),
            "opened": torch.cat([*opened[True], *opened[False]]).mean().item(),
        }
    return found


def train_and_measure(variant: str, seed: int, out: Path, steps: int) -> dict[str, Any]:
    """One record."""
    torch.set_num_threads(1)
    wanted, begun = recipe(variant, seed, out, steps), time.monotonic()
    result = run(wanted)
    if result.interrupted:
        raise KeyboardInterrupt
    model = load_causal_lm(wanted.out)
    return {
        "task": wanted.data.sources[0],
        "variant": variant,
        "seed": seed,
        "length": LENGTH,
        "window": WINDOW,
        "steps": steps,
        "tokens": steps * ROWS * LENGTH,
        "parameters": count_model_parameters(configure_model(wanted.model, model.config.vocab_size)).total,
        "layers": PLANS[variant],
        "last_loss": result.last_loss,
        "guessing": 1 / VALUES,
        **measure(model, seed),
        "seconds": time.monotonic() - begun,
        "torch": torch.__version__,
    }


def summary(out: Path) -> list[str]:
    """A line for each variant over its seeds."""
    records: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((out / "records").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        records.setdefault(record["variant"], []).append(record)
    lines = [f"{'variant':16} {'parameters':>10} {'seeds':>5}  accuracy         opens where asked, elsewhere"]
    for variant in (name for name in PLANS if name in records):
        found = records[variant]
        accuracy = " ".join(f"{100 * one['accuracy']:5.1f}" for one in found)
        gates = "  ".join(
            f"{100 * one['opened_where_asked']:5.1f} / {100 * one['opened_elsewhere']:.1f}"
            for one in found
            if "opened" in one
        )
        lines.append(f"{variant:16} {found[0]['parameters']:>10,} {len(found):>5}  {accuracy:16} {gates}")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Train what has no record yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--variants", default=",".join(PLANS))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--summary", action="store_true", help="only show what is there")
    given = parser.parse_args(arguments)
    unknown = set(given.variants.split(",")) - PLANS.keys()
    if unknown:
        parser.error(f"--variants: expected some of {', '.join(PLANS)}, got {', '.join(sorted(unknown))}")
    for seed in () if given.summary else map(int, given.seeds.split(",")):
        for variant in given.variants.split(","):
            path = given.out / "records" / f"{variant}-seed{seed}.json"
            if path.exists():
                continue
            record = train_and_measure(variant, seed, given.out, given.steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(record, indent=1) + "\n")
            print(f"{variant}, seed {seed}: accuracy {100 * record['accuracy']:.1f} %, {record['seconds']:.0f} s")
    print("\n".join(summary(given.out)))


if __name__ == "__main__":
    main(sys.argv[1:])
