"""A training step beside Hugging Face's Mistral with the same window and Llama with full attention: time and memory.

    python -m benchmarks.train_cpu [--quick] [--lengths 4096] [--record]

A row is kept when it is measured, short lengths first, and an interrupted run goes on after it. A step is forward with
labels, backward, a fused AdamW step and clearing the gradients, in fp32, batch 1, the same for all. Predicted ratios
count FLOPs by swat_lm/model/cost.py: ours the pairs inside the window, Mistral all T * T (its mask hides pairs, nothing
is skipped), Llama T * (T + 1) / 2.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import measure, models, record
from benchmarks.rows import Rows
from swat_lm.model import cost
from swat_lm.model.conversion import convert_config

LENGTHS, WIDTHS, VOCABULARIES = (4096, 16384), (256, 512), (256, 8192)
# from LONG tokens on a peer's step takes a minute: it is warmed up on a short row instead of the whole one
ROUNDS, LONG = 5, 8192
MEMORY_LIMIT = 16 * 2**30
BUILDERS: dict[str, Callable[[int, int], nn.Module]] = {
    "swat": models.swat,
    "softmax window": models.softmax_window,
    "mistral sdpa": lambda width, vocabulary: models.mistral(width, vocabulary, "sdpa"),
    "mistral eager": lambda width, vocabulary: models.mistral(width, vocabulary, "eager"),
    "llama sdpa": models.llama,
}


@dataclass(frozen=True)
class Task:
    """One comparison."""

    length: int
    width: int
    vocabulary: int


def main() -> None:
    """Measure, judge the goals, save and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short length, fewer rounds; results are not saved")
    parser.add_argument("--lengths", type=int, nargs="+", choices=LENGTHS, default=LENGTHS, help="leave others out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", action="store_true", help=record.HELP)
    arguments = parser.parse_args()
    if arguments.quick and arguments.record:
        parser.error("--record goes without --quick, whose results are not saved")
    torch.set_num_threads(arguments.threads)
    measure.require_green_tests("tests/ops", "tests/model/test_conversion.py", "tests/model/test_cost.py")
    settings = {
        "layers": models.LAYERS,
        "head_dim": models.HEAD_DIM,
        "window": models.WINDOW,
        "batch": 1,
        "dtype": "float32",
        "step": "forward, backward, fused AdamW",
        "memory_limit_gib": MEMORY_LIMIT // 2**30,
    }
    kept = None if arguments.quick else Rows("train_cpu", settings)
    tasks = [
        Task(length, width, vocabulary)
        for length in ((2048,) if arguments.quick else sorted(arguments.lengths))
        for width in WIDTHS
        for vocabulary in VOCABULARIES
    ]
    for width in WIDTHS:
        for vocabulary in VOCABULARIES:
            models.check_same_function(width, vocabulary)
    rows, goals = [], []
    for task in tasks:
        rounds = 3 if arguments.quick else ROUNDS
        measure_row = partial(compare, task, rounds)
        sys.stdout.write(f"row {len(rows) + 1} of {len(tasks)}: {task}\n")
        rows.append(measure_row() if kept is None else kept.measured(str(task), measure_row))
        goals += judge(rows[-1])
    for line in goals:
        sys.stdout.write(f"{'reached' if line['reached'] else 'MISSED '}  {line['goal']}: {line['measured']}\n")
    if kept is not None:
        sys.stdout.write(record.finish(record.save("train_cpu", rows, goals, settings), arguments.record))
        if set(arguments.lengths) == set(LENGTHS):
            kept.forget()


def compare(task: Task, rounds: int, memory: bool = True) -> dict:
    """Memory of each candidate in a process of its own, then the time of those that fit, in turns."""
    row: dict = {**asdict(task), "rounds": rounds}
    left_out, peaks = {}, {}
    for name in BUILDERS:
        reason = too_large(name, task)
        if reason is None and memory:
            try:
                peaks[name] = peak(name, task)
            except measure.DoesNotFitError as error:
                reason = str(error)
        if reason is not None:
            left_out[name] = reason
            sys.stdout.write(f"{name}, {task}: not measured, {reason}\n")
    steps = {name: TrainingStep(name, task) for name in BUILDERS if name not in left_out}
    for step in steps.values():
        step.warm_up()
    timings = measure.take_turns(dict(steps), rounds, warm_up=task.length < LONG)
    row |= {f"{name} s": timing.median for name, timing in timings.items()}
    for label, peers in (("mistral", ("mistral sdpa", "mistral eager")), ("llama", ("llama sdpa",))):
        measured = [name for name in peers if name in timings]
        if not measured:
            continue
        best = min(measured, key=lambda name: timings[name].median)
        predicted = predicted_ratio(best, task)
        row |= {f"best {label}": best} if len(peers) > 1 else {}
        row[f"predicted / {label}"] = predicted
        for name in ("swat", "softmax window"):
            ratio = timings[name].times_faster_than(timings[best])
            row[f"{name} times {label}"] = ratio
            row[f"{name} share / {label}"] = ratio / predicted
    row |= {f"{name} MiB": round(peak / 2**20) for name, peak in peaks.items()}
    if left_out:
        row["not measured"] = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
    report(row)
    return row


def judge(row: dict) -> list[dict]:
    """The goals of one row: the product against each peer."""
    where = f"T {row['length']}, width {row['width']}, vocabulary {row['vocabulary']}"
    return [
        measure.goal(f"{where}: share of the FLOP-predicted ratio to {label}", 0.8, row[f"swat share / {label}"])
        for label in ("mistral", "llama")
        if f"swat share / {label}" in row
    ]


def report(row: dict) -> None:
    """Print one row as it is measured."""
    for key, value in row.items():
        sys.stdout.write(f"  {key}: {value:.4g}\n" if isinstance(value, float) else f"  {key}: {value}\n")
    sys.stdout.write("\n")
    sys.stdout.flush()


class TrainingStep:
    """One candidate with its optimizer and its row of tokens."""

    def __init__(self, name: str, task: Task) -> None:
        self.model = BUILDERS[name](task.width, task.vocabulary).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.tokens = models.random_tokens(1, task.length, task.vocabulary)

    def __call__(self, tokens: Tensor | None = None) -> float:
        """Take one step; returns the loss."""
        tokens = self.tokens if tokens is None else tokens
        loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def warm_up(self) -> None:
        """One step on a short row: the optimizer's state and every lazily made thing exist afterwards."""
        self(self.tokens[:, : 2 * models.WINDOW])


def peak(name: str, task: Task) -> int:
    """Bytes a step adds to a process that holds model, optimizer and tokens."""
    code = (
        "from benchmarks.train_cpu import Task, TrainingStep\n"
        f"step = TrainingStep({name!r}, {task!r})\nstep.warm_up()\nmark()\nstep()\n"
    )
    began = time.perf_counter()
    result = measure.peak_memory(code, MEMORY_LIMIT, torch.get_num_threads())
    sys.stdout.write(f"{name}, {task}: {result / 2**20:.0f} MiB ({time.perf_counter() - began:.0f} s)\n")
    sys.stdout.flush()
    return result


def too_large(name: str, task: Task) -> str | None:
    """Why a candidate is not even tried, or None: only eager attention keeps T * T scores for its backward."""
    if name != "mistral eager":
        return None
    # softmax's output per layer for the backward, and three more at once: scores, masked scores, a gradient
    heads = task.width // models.HEAD_DIM
    needed = (models.LAYERS + 3) * heads * task.length**2 * 4
    if needed <= MEMORY_LIMIT:
        return None
    return f"its scores alone need {needed / 2**30:.0f} GiB, more than {MEMORY_LIMIT / 2**30:.0f}"


def pairs(name: str, length: int) -> int:
    """Query-key pairs per head that a candidate's algorithm computes."""
    if name.startswith("mistral"):
        return length * length
    return cost.visible_pairs(length, None if name.startswith("llama") else models.WINDOW)


def training_flops(name: str, task: Task) -> int:
    """FLOPs of forward and backward with the candidate's pairs; all have the same matrices."""
    with torch.device("meta"):
        config = convert_config(models.mistral(task.width, task.vocabulary).config)
    forward = cost.forward_flops(config, task.length)
    added = pairs(name, task.length) - cost.visible_pairs(task.length, models.WINDOW)
    return 3 * (forward + 4 * task.width * models.LAYERS * added)


def predicted_ratio(peer: str, task: Task) -> float:
    """How many times faster ours would be at the same FLOP rate."""
    return training_flops(peer, task) / training_flops("swat", task)


if __name__ == "__main__":
    main()
