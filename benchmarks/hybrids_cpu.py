"""Layers of hybrids, forward and backward: Taipan's two executions, and Mamba-2 beside the torch paths of transformers.

    python -m benchmarks.hybrids_cpu [--quick] [--lengths 2048] [--record]

One layer of width 256 in fp32, batch 1, on one thread and by its processor's seconds. Taipan's chosen tokens are drawn
by chance, so that their share is what is asked for. Of Mamba-2 transformers' path is taken at each chunk size that fits
its memory, and the best counts; the mixers of its hybrids stand beside ours in `benchmarks/hybrid_peers.py`. Growth is
the exponent between the two lengths: of seconds, or bytes, that go as T to the power of it.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Block

from benchmarks import measure, record
from benchmarks.hybrid_peers import PEERS, compare_peer
from benchmarks.rows import Rows
from swat_lm.layers import Layer
from swat_lm.layers.base import Shared
from swat_lm.layers.chunk import Chunk
from swat_lm.model.plan import resolve_plan

WIDTH, FEED_FORWARD, HEADS, WINDOW, STATE = 256, 704, 4, 1024, 128
LENGTHS, SHARES, CHUNKS = (2048, 16384), (0.5, 0.25, 0.15, 0.1), (8, 16, 32, 64, 128)
# of transformers' largest intermediate tensor, of which its backward keeps several
LARGEST = 2**30


def layer(entry: dict[str, Any]) -> Layer:
    """A layer of ours, started alike each time."""
    torch.manual_seed(0)
    size = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": WIDTH // HEADS}
    flat = {"intermediate_size": FEED_FORWARD, "sliding_window": WINDOW, **size}
    (found,) = resolve_plan([entry], 1, WIDTH, [flat])
    return found.kind.build(found.settings, WIDTH, 0, Shared())


def taipan(execution: str, share: float) -> Layer:
    """Selective attention for a share of the tokens."""
    return layer({"kind": "taipan", "selection": "random", "capacity": share, "execution": execution})


class Step:
    """Forward and backward of a layer on one row."""

    def __init__(self, module: nn.Module, length: int) -> None:
        self.module = module
        self.hidden = torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        self.chunk = Chunk(torch.arange(length)[None])

    def __call__(self) -> None:
        """Gradients of everything, and none kept."""
        ours = isinstance(self.module, Layer)
        output: Tensor = self.module(self.hidden, self.chunk, None).hidden if ours else self.module(self.hidden)
        output.sum().backward()
        self.module.zero_grad(set_to_none=True)
        self.hidden.grad = None


def theirs(chunk: int) -> nn.Module:
    """A block of transformers' Mamba2 with the same sizes."""
    return Mamba2Block(
        Mamba2Config(
            hidden_size=WIDTH, num_heads=2 * WIDTH // 64, head_dim=64, state_size=STATE, n_groups=1, chunk_size=chunk,
            expand=2, num_hidden_layers=1,
        ),
        layer_idx=0,
    )  # fmt: skip


def growth(values: dict[int, float]) -> float:
    """The exponent between the least and the greatest length."""
    short, long = min(values), max(values)
    return math.log(values[long] / values[short]) / math.log(long / short)


def peak(execution: str, share: float, length: int) -> int:
    """Bytes that a step adds to a process that holds layer and row."""
    code = (
        "from benchmarks.hybrids_cpu import Step, taipan\n"
        f"short = Step(taipan({execution!r}, {share}), 256)\nshort()\n"
        f"step = Step(short.module, {length})\nmark()\nstep()\n"
    )
    return measure.peak_memory(code, threads=1)


def compare_executions(share: float, lengths: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """A row for each length."""
    rows, seconds, bytes_ = [], {}, {}
    for length in lengths:
        steps: dict[str, Callable[[], None]] = {name: Step(taipan(name, share), length) for name in ("dense", "sparse")}
        timings = measure.take_turns(steps, rounds, clock=measure.processor_clock)
        seconds[length] = timings["sparse"].median
        bytes_[length] = peak("sparse", share, length)
        ratio = timings["sparse"].times_faster_than(timings["dense"])
        rows.append(
            {
                "layer": "taipan", "share": share, "length": length, "dense s": timings["dense"].median,
                "sparse s": seconds[length], "sparse times dense": ratio,
                "sparse MiB": round(bytes_[length] / 2**20),
            }
        )  # fmt: skip
    if len(lengths) > 1:
        rows[-1] |= {"growth of seconds": growth(seconds), "growth of bytes": growth(bytes_)}
    return rows


def compare_recurrences(lengths: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """A row for each length."""
    rows, seconds = [], {}
    for length in lengths:
        heads = 2 * WIDTH // 64
        fitting = [chunk for chunk in CHUNKS if 4 * length * chunk * heads * STATE <= LARGEST]
        steps: dict[str, Callable[[], None]] = {"ours": Step(layer({"kind": "mamba2", "state_size": STATE}), length)}
        steps |= {f"chunk {chunk}": Step(theirs(chunk), length) for chunk in fitting}
        timings = measure.take_turns(steps, rounds, clock=measure.processor_clock)
        best = min((name for name in timings if name != "ours"), key=lambda name: timings[name].median)
        seconds[length] = timings["ours"].median
        rows.append(
            {
                "layer": "mamba2", "length": length, "ours s": seconds[length], "transformers s": timings[best].median,
                "its best": best, "times transformers": timings["ours"].times_faster_than(timings[best]),
            }
        )  # fmt: skip
    if len(lengths) > 1:
        rows[-1] |= {"growth of seconds": growth(seconds)}
    return rows


def beside_peer(name: str, length: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """A row for a mixer of transformers' hybrids."""
    return [compare_peer(name, WIDTH, length, rounds, steps)]


def as_one(task: Callable[[], list[dict[str, Any]]]) -> dict[str, Any]:
    """The rows of a task as one that is kept."""
    return {"rows": task()}


def judge(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals of one row."""
    where = f"T {row['length']}"
    if "peer" in row:
        return []
    if row["layer"] == "mamba2":
        return [measure.goal(f"Mamba-2, {where}: times transformers' torch path", 3.0, row["times transformers"])]
    if row["share"] > 0.25:
        return []
    what = f"Taipan, {where}, {100 * row['share']:.0f} % chosen: sparse times dense"
    return [measure.goal(what, 1.0, row["sparse times dense"])]


def main() -> None:
    """Measure, judge the goals, save and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the short length alone, fewer rounds; nothing is saved")
    parser.add_argument("--lengths", type=int, nargs="+", choices=LENGTHS, default=LENGTHS, help="leave others out")
    parser.add_argument("--record", action="store_true", help=record.HELP)
    arguments = parser.parse_args()
    if arguments.quick and arguments.record:
        parser.error("--record goes without --quick, whose results are not saved")
    torch.set_num_threads(1)
    measure.require_green_tests(
        "tests/layers/test_taipan.py", "tests/layers/test_mamba2_peers.py", "tests/ops/test_state_space.py",
        "tests/ops/test_mamba2.py",
    )  # fmt: skip
    lengths, rounds = (LENGTHS[:1], 3) if arguments.quick else (tuple(sorted(set(arguments.lengths))), 5)
    settings = {
        "width": WIDTH, "heads": HEADS, "window": WINDOW, "state size": STATE, "batch": 1, "dtype": "float32",
        "step": "forward, backward", "seconds": "of one processor", "lengths": list(lengths),
    }  # fmt: skip
    kept = None if arguments.quick else Rows("hybrids_cpu", settings)
    tasks: dict[str, Callable[[], list[dict[str, Any]]]] = {
        f"taipan {share}": partial(compare_executions, share, lengths, rounds) for share in SHARES
    }
    tasks["mamba2"] = partial(compare_recurrences, lengths, rounds)
    steps = 10 if arguments.quick else 40
    tasks |= {name: partial(beside_peer, name, lengths[0], rounds, steps) for name in PEERS}
    rows: list[dict[str, Any]] = []
    for label, task in tasks.items():
        for row in task() if kept is None else kept.measured(label, partial(as_one, task))["rows"]:
            rows.append(row)
            sys.stdout.write(
                ", ".join(
                    f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                )
                + "\n"
            )
            sys.stdout.flush()
    goals = [line for row in rows for line in judge(row)]
    for line in goals:
        sys.stdout.write(f"{'reached' if line['reached'] else 'MISSED '}  {line['goal']}: {line['measured']}\n")
    if kept is not None:
        sys.stdout.write(record.finish(record.save("hybrids_cpu", rows, goals, settings), arguments.record))
        kept.forget()


if __name__ == "__main__":
    main()
