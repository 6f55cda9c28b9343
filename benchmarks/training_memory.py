"""Memory of a training pass against the length of its row, for every way to run layers, and the time beside plain.

    python -m benchmarks.training_memory [--lengths 4096 16384] [--record]

Counted are the bytes of live tensors that a forward and a backward pass make, gradients included, weights and optimizer
not; a hook on every operation counts them. Time is of the same pass without the hook, in turns, up to 16,384 tokens.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, models, record
from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.model.execution.live_bytes import LiveBytes

LENGTHS = (4096, 16384, 65536, 262144)
ROUNDS, TIMED, WINDOW, WIDTH, LAYERS, SHORT = 5, 16384, 128, 256, 4, 16384
MOST_TIMES = {"blockwise": 1.35, "chunks": 1.4}
MOST_GROWTH = 1.3
HELD_PER_TOKEN = {"plain": 250_000, "checkpoint": 88_000, "blockwise": 16_000, "chunks": 0}
"""Bytes, roughly: what would not fit is not tried."""


def executions(folder: Path) -> dict[str, dict[str, Any]]:
    """Every way to run layers with its settings."""
    return {
        "plain": {},
        "checkpoint": {},
        "blockwise": {"block_size": 1024, "key_block_size": 1024},
        "chunks": {"chunk_size": 2048, "carries": "disk", "folder": str(folder)},
    }


def main() -> None:
    """Measure, judge the goals, save and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--timed", type=int, default=TIMED, help="the longest row that is timed too")
    parser.add_argument("--limit-gib", type=float, default=8, help="what would need more is left out")
    parser.add_argument("--record", action="store_true", help=record.HELP)
    arguments = parser.parse_args()
    measure.require_green_tests("tests/model/execution/test_chunks.py", "tests/model/execution/test_blockwise.py")
    settings = {
        "layers": LAYERS, "width": WIDTH, "window": WINDOW, "vocabulary": 256, "batch": 1, "dtype": "float32",
        "threads": torch.get_num_threads(), "block": 1024, "chunk": "2048, carries on disk",
    }  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for length in sorted(arguments.lengths):
            rounds = arguments.rounds if length <= arguments.timed else 0
            rows.append(measured(length, Path(folder), rounds, arguments.limit_gib * 2**30))
            sys.stdout.write(f"{rows[-1]}\n")
            sys.stdout.flush()
    goals = judge(rows)
    for line in goals:
        sys.stdout.write(f"{'reached' if line['reached'] else 'MISSED '}  {line['goal']}: {line['measured']:.3g}\n")
    saved = record.save("training_memory", rows, goals, settings, lines=True)
    sys.stdout.write(record.finish(saved, arguments.record))


def measured(length: int, folder: Path, rounds: int, limit: float) -> dict[str, Any]:
    """One length: peaks in MiB, and seconds of a pass and how they compare with plain, unless `rounds` is 0."""
    torch.manual_seed(0)
    config = SwatConfig(
        vocab_size=256, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=WIDTH // models.HEAD_DIM,
        sliding_window=WINDOW,
    )  # fmt: skip
    model, tokens = SwatForCausalLM(config).train(), models.random_tokens(1, length, 256)
    row: dict[str, Any] = {"tokens": length}
    passes = {}
    for name, settings in executions(folder).items():
        if HELD_PER_TOKEN[name] * length > limit:
            row[f"{name} MiB"] = None
            continue

        def run(name: str = name, settings: dict[str, Any] = settings) -> float:
            model.set_execution(name, **settings)
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            model.zero_grad(set_to_none=True)
            return loss.item()

        with LiveBytes() as live:
            run()
        row[f"{name} MiB"] = round(live.peak / 2**20, 1)
        passes[name] = run
    times = measure.take_turns(passes, rounds) if rounds and "plain" in passes else {}
    row |= {f"{name} s": times[name].median if name in times else None for name in HELD_PER_TOKEN}
    for name in MOST_TIMES:
        row[f"plain / {name}"] = times[name].times_faster_than(times["plain"]) if name in times else None
    return row


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time beside plain where both were timed, and what chunks need of the longest row beside 16,384 tokens."""
    goals = []
    for row in rows:
        for name, most in MOST_TIMES.items():
            if row[f"plain / {name}"] is not None:
                text = f"{row['tokens']} tokens: plain's time over that of {name} (at most {most} times as long)"
                goals.append(measure.goal(text, round(1 / most, 3), row[f"plain / {name}"]))
    by_length = {row["tokens"]: row["chunks MiB"] for row in rows}
    if SHORT in by_length and max(by_length) > SHORT:
        text = f"chunks: memory of {SHORT} tokens over that of {max(by_length)} (at most {MOST_GROWTH} times as much)"
        goals.append(measure.goal(text, round(1 / MOST_GROWTH, 3), by_length[SHORT] / by_length[max(by_length)]))
    return goals


if __name__ == "__main__":
    main()
