"""Training runs are the same however layers are run: 200 steps from one seed, and killed in the middle, bit for bit.

The text is the sections of the repository's documents, packed into rows that keep them apart; gradients are
accumulated. Losses are compared with those of `plain`, a killed run with one that was never disturbed.
"""

import random
import subprocess
import sys
import time
from pathlib import Path

import torch

from swat_lm.recipe import DataRecipe, Recipe, TrainRecipe, dump_recipe
from swat_lm.train import run
from swat_lm.train.metrics import read_metrics
from verification.workplace import REPOSITORY, Workplace, require

EXECUTIONS = {
    "plain": {},
    "checkpoint": {},
    "blockwise": {"block_size": 48, "key_block_size": 48},
    "chunks": {"chunk_size": 40, "carries": "disk"},
}
MODEL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160, "sliding_window": 32,
}  # fmt: skip
STEPS, LENGTH, MOST = 200, 128, 1e-3
PROGRAM = (
    "import sys; from swat_lm.recipe import load_recipe; from swat_lm.train import run; run(load_recipe(sys.argv[1]))"
)
PATIENCE = 900


def check(place: Workplace) -> dict[str, str]:
    """Run every execution undisturbed and killed; raises CheckFailedError where losses or weights differ."""
    text = place.folder / "text"
    text.mkdir()
    for page in sorted((REPOSITORY / "docs").glob("*.md")):
        for number, section in enumerate(page.read_text(encoding="utf-8").split("\n## ")):
            (text / f"{page.stem}-{number}.txt").write_text(section, encoding="utf-8")
    losses = {}
    for name in EXECUTIONS:
        whole, killed = (recipe(place.folder, name, ending) for ending in ("whole", "killed"))
        run(whole)
        losses[name] = [line["loss"] for line in read_metrics(Path(whole.out, "metrics.jsonl"))]
        require(len(losses[name]) == STEPS, f"{name}: expected {STEPS} losses, got {len(losses[name])}")
        at = kill(killed, place.folder)
        run(killed)
        require(logged(killed) == logged(whole), f"{name}: a run killed at step {at} logged other numbers")
        same = (Path(each.out, "export", "model.safetensors").read_bytes() for each in (whole, killed))
        require(next(same) == next(same), f"{name}: a run killed at step {at} ended with other weights")
        farthest = max(abs(own / plain - 1) for own, plain in zip(losses[name], losses["plain"], strict=True))
        require(farthest <= MOST, f"{name}: a loss differs from that of plain by {farthest:.1e} of it")
        place.done(
            f"{name}: {STEPS} losses, from {losses[name][0]:.4f} to {losses[name][-1]:.4f}, the farthest from that of "
            f"plain by {farthest:.1e} of it; killed at step {at} and gone on, bit for bit"
        )
    return {"torch": torch.__version__}


def recipe(folder: Path, name: str, ending: str) -> Recipe:
    """A run of one execution in a folder of its own."""
    train = TrainRecipe(
        steps=STEPS, batch_size=4, micro_batch_size=2, learning_rate=3e-3, warmup_steps=20, log_every=1,
        evaluate_every=100, evaluate_batches=2, save_every=16, keep=2, export=True,
        execution=name,  # type: ignore[arg-type]
        execution_settings=EXECUTIONS[name],
    )  # fmt: skip
    data = DataRecipe(
        sources=(str(folder / "text"),), sequence_length=LENGTH, held_out=0.1, cache=str(folder / "cache"),
        documents="separate",
    )  # fmt: skip
    return Recipe(name=f"{name}-{ending}", out=str(folder / f"{name}-{ending}"), model=MODEL, data=data, train=train)


def kill(begun: Recipe, folder: Path) -> int:
    """Begin a run in a process of its own and end that, somewhere on the way; returns after how many steps."""
    path, log = folder / f"{begun.name}.yaml", Path(begun.out, "metrics.jsonl")
    path.write_text(dump_recipe(begun), encoding="utf-8")
    wanted, deadline = random.Random(begun.name).randrange(20, STEPS - 20), time.monotonic() + PATIENCE
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], cwd=REPOSITORY)
    try:
        while steps_of(log) < wanted:
            require(process.poll() is None, f"{begun.name} ended before it could be killed")
            require(time.monotonic() < deadline, f"{begun.name} came to {steps_of(log)} steps in {PATIENCE} s")
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    done = steps_of(log)
    require(done < STEPS, f"{begun.name} was killed too late")
    return done


def steps_of(log: Path) -> int:
    """Lines that a run has logged."""
    return log.read_text(encoding="utf-8").count("\n") if log.exists() else 0


def logged(finished: Recipe) -> list[tuple[float, ...]]:
    """What must not depend on the clock."""
    names = ("step", "tokens", "loss", "grad_norm", "learning_rate")
    lines = read_metrics(Path(finished.out, "metrics.jsonl"))
    return [tuple(line[name] for name in names) for line in lines]
