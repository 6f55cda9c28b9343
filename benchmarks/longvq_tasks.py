"""LongVQ (reconstruction) on tasks: recall (MQAR, arXiv 2312.04927) with more and fewer codes than keys, and ListOps.

    python -m benchmarks.longvq_tasks --out runs/longvq-tasks --seeds 0,1
    python -m benchmarks.longvq_tasks --out runs/longvq-tasks --summary

Each model is trained by the trainer on the same rows, and one JSON record is written for each, with accuracy on rows
that are never trained on and how many codes are in use. A record that is there is kept, so several commands with other
--variants or --seeds may run side by side on the same folder. Two keys of one code share the sum of their values, so
with fewer codes than keys attention must add next to nothing to what a state space recalls in short rows by itself.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from swat_lm.data.synthetic import SyntheticSource, synthetic_task
from swat_lm.evaluate.streaming_model import evaluating
from swat_lm.files import write_text
from swat_lm.layers.codebook import KeyCodebook
from swat_lm.model.architectures import configure_model, count_model_parameters
from swat_lm.model.loading import load_causal_lm
from swat_lm.ops.codebook import perplexity
from swat_lm.recipe import DataRecipe, Recipe, TrainRecipe
from swat_lm.train import run

WIDTH, INNER, KEY_SIZE, STATE, BLOCK = 48, 64, 24, 8, 8
VALUE = 2 * WIDTH
ROWS = 64
HELD_OUT_BATCHES = 32
# a feed-forward of three matrices pays for what a control lacks
WITHOUT_ATTENTION = INNER + (KEY_SIZE + 3 * VALUE) // 3
WITHOUT_SYSTEM = INNER + (3 * STATE + 2) // 3


def layer(**settings: Any) -> dict[str, Any]:
    """A layer of LongVQ at the size of these tasks; in short runs keys move on fast, and codes must follow."""
    size = {"key_size": KEY_SIZE, "block": BLOCK, "state_size": STATE, "intermediate_size": INNER}
    book = {} if "attention" in settings else {"average_decay": 0.9}
    return {"kind": "longvq", **size, **book, **settings}


@dataclass(frozen=True)
class Task:
    """Rows, and which models are trained on them."""

    source: str
    length: int
    guessing: float
    layers: int
    plans: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def without(part: str) -> dict[str, Any]:
    """The block without attention or without a state space, as large as with it."""
    if part == "attention":
        return {
            "kind": "longvq", "attention": "none", "state_size": STATE, "intermediate_size": WITHOUT_ATTENTION
        }  # fmt: skip
    plain = {name: value for name, value in layer().items() if name != "state_size"}
    return {**plain, "codes": 32, "ssm": "none", "intermediate_size": WITHOUT_SYSTEM}


TASKS: dict[str, Task] = {
    "mqar": Task(
        "synthetic:mqar?pairs=4&keys=8&values=8", 24, 1 / 8, 2,
        {
            "more-codes": layer(codes=32),
            "fewer-codes": layer(codes=2),
            "exact": layer(attention="exact"),
            "no-attention": without("attention"),
            "no-ssm": without("ssm"),
            "fewer-no-ssm": {**without("ssm"), "codes": 2},
        },
    ),
    "listops": Task(
        "synthetic:listops?depth=3&arguments=4", 96, 1 / 10, 2,
        {
            "quantised": layer(codes=32),
            "exact": layer(attention="exact"),
            "no-attention": without("attention"),
            "no-ssm": without("ssm"),
        },
    ),
}  # fmt: skip


def recipe(task: str, variant: str, seed: int, out: Path, steps: int) -> Recipe:
    """The run of one model with one seed."""
    chosen, name = TASKS[task], f"{task}-{variant}-seed{seed}"
    model = {
        "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": chosen.layers, "num_attention_heads": 2,
        "max_position_embeddings": chosen.length, "initializer_range": 0.1, "layers": [chosen.plans[variant]],
    }  # fmt: skip
    train = TrainRecipe(
        steps=steps, batch_size=ROWS, learning_rate=4e-3, warmup_steps=min(50, steps // 4), weight_decay=0.01,
        log_every=max(1, steps // 50), evaluate_every=0, save_every=0, keep=1, precision="fp32",
    )  # fmt: skip
    data = DataRecipe(
        sources=(chosen.source,), tokenizer="bytes", sequence_length=chosen.length, documents="concatenate",
        held_out=0.0,
    )  # fmt: skip
    return Recipe(name=name, seed=seed, out=str(out / "runs" / name), model=model, data=data, train=train)


def measure(model: PreTrainedModel, task: str, seed: int) -> dict[str, float]:
    """Accuracy of the answers, and how many codes of each layer are in use (perplexity of running counts)."""
    chosen = TASKS[task]
    source = synthetic_task(chosen.source)
    rows = SyntheticSource(
        source, "held_out", chosen.length, seed, batch_size=ROWS, vocab_size=model.config.vocab_size
    )  # fmt: skip
    right: list[float] = []
    with evaluating(model), torch.inference_mode():
        for batch in rows.pass_over(num_batches=HELD_OUT_BATCHES):
            logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1]
            asked = batch.labels[:, 1:] >= 0
            right.append((logits.argmax(dim=-1) == batch.labels[:, 1:])[asked].double().mean().item())
    books = [module for module in model.modules() if isinstance(module, KeyCodebook)]
    used = {f"codes_used_{index}": perplexity(book.counts).item() for index, book in enumerate(books)}
    return {"accuracy": fmean(right), **used}


def train_and_measure(task: str, variant: str, seed: int, out: Path, steps: int) -> dict[str, Any]:
    """One record."""
    torch.set_num_threads(1)
    wanted, begun = recipe(task, variant, seed, out, steps), time.monotonic()
    result = run(wanted)
    if result.interrupted:
        raise KeyboardInterrupt
    model = load_causal_lm(wanted.out)
    return {
        "task": wanted.data.sources[0],
        "variant": variant,
        "seed": seed,
        "length": TASKS[task].length,
        "steps": steps,
        "tokens": steps * ROWS * TASKS[task].length,
        "parameters": count_model_parameters(configure_model(wanted.model, model.config.vocab_size)).total,
        "layers": [TASKS[task].plans[variant]],
        "last_loss": result.last_loss,
        "guessing": TASKS[task].guessing,
        **measure(model, task, seed),
        "seconds": time.monotonic() - begun,
        "torch": torch.__version__,
    }


def summary(out: Path) -> list[str]:
    """A line for each task and variant over its seeds."""
    lines = [f"{'task':8} {'variant':14} {'parameters':>10} {'seeds':>5}  accuracy"]
    for task, chosen in TASKS.items():
        for variant in chosen.plans:
            found = [
                json.loads(path.read_text(encoding="utf-8"))
                for path in sorted((out / "records").glob(f"{task}-{variant}-seed*.json"))
            ]
            if found:
                accuracy = " ".join(f"{100 * one['accuracy']:5.1f}" for one in found)
                lines.append(f"{task:8} {variant:14} {found[0]['parameters']:>10,} {len(found):>5}  {accuracy}")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Train what has no record yet."""
    every = list(dict.fromkeys(variant for task in TASKS.values() for variant in task.plans))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--variants", default=",".join(every))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--summary", action="store_true", help="only show what is there")
    given = parser.parse_args(arguments)
    for name, chosen, known in (("tasks", given.tasks, TASKS), ("variants", given.variants, every)):
        unknown = set(chosen.split(",")) - set(known)
        if unknown:
            parser.error(f"--{name}: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    for seed in () if given.summary else map(int, given.seeds.split(",")):
        for task in given.tasks.split(","):
            for variant in (one for one in given.variants.split(",") if one in TASKS[task].plans):
                path = given.out / "records" / f"{task}-{variant}-seed{seed}.json"
                if path.exists():
                    continue
                record = train_and_measure(task, variant, seed, given.out, given.steps)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(record, indent=1) + "\n")
                shown = f"accuracy {100 * record['accuracy']:.1f} %, {record['seconds']:.0f} s"
                print(f"{task}, {variant}, seed {seed}: {shown}", flush=True)
    print("\n".join(summary(given.out)))


if __name__ == "__main__":
    main(sys.argv[1:])
