"""One layer forward and backward on a CPU: what the benchmarks of kinds of layers share.

Width 256, four heads, fp32, one thread. Seconds are the processor's own, without those that a step waits for a core, so
that a machine that others use can be measured on; ratios are of candidates that took turns.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure, record
from benchmarks.rows import Rows
from swat_lm import SwatConfig
from swat_lm.layers import Layer
from swat_lm.layers.chunk import Chunk
from swat_lm.model.building import build_layers, shared_by

WIDTH, FEED_FORWARD, HEADS = 256, 704, 4

Row = dict[str, Any]


def built(entry: dict[str, Any], **fields: Any) -> Layer:
    """A layer as a model has it, started alike each time and ready to train; `fields` are the configuration's."""
    torch.manual_seed(0)
    config = SwatConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=FEED_FORWARD, num_hidden_layers=1,
        num_attention_heads=HEADS, layers=[entry], **fields,
    )  # fmt: skip
    layer = build_layers(config)[0][0]
    assert isinstance(layer, Layer)
    layer.init_weights(shared_by(config))
    return layer.train()


class LayerStep:
    """Forward and backward over rows of one length; what a layer of ours adds to the loss is part of it."""

    def __init__(self, module: nn.Module, length: int, batch: int = 1) -> None:
        self.module = module
        generator = torch.Generator().manual_seed(1)
        self.hidden = torch.randn(batch, length, WIDTH, generator=generator).requires_grad_()
        self.chunk = Chunk(torch.arange(length)[None])

    def __call__(self) -> None:
        """Gradients of everything, and none kept."""
        self._loss().backward()
        self.module.zero_grad(set_to_none=True)
        self.hidden.grad = None

    def _loss(self) -> Tensor:
        if not isinstance(self.module, Layer):
            return self.module(self.hidden).sum()
        output = self.module(self.hidden, self.chunk, None)
        added = [loss / divisor for loss, divisor in output.auxiliary.losses.values()]
        return torch.stack([output.hidden.sum(), *added]).sum() if added else output.hidden.sum()


def take_turns(steps: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, measure.Timing]:
    """Seconds of the processor, candidate by candidate."""
    return measure.take_turns(steps, rounds, clock=measure.processor_clock)


def peak(script: str, making: str, length: int, batch: int = 1) -> int:
    """Bytes that a step adds to a process that holds layer and rows and has made a step over a short one.

    `making` calls a function of a benchmark's `script`, and gives a layer.
    """
    code = (
        f"from benchmarks.{script} import *\nfrom benchmarks.layer_steps import LayerStep\nmodule = {making}\n"
        f"LayerStep(module, 256)()\nstep = LayerStep(module, {length}, {batch})\nmark()\nstep()\n"
    )
    return measure.peak_memory(code, threads=1)


def growth(values: Mapping[int, float]) -> float:
    """The exponent between the least and the greatest length: of what goes as T to the power of it."""
    short, long = min(values), max(values)
    return math.log(values[long] / values[short]) / math.log(long / short)


@dataclass(frozen=True)
class Script:
    """A benchmark of layers: what it measures, over which lengths, and the goals that judge it."""

    name: str
    doc: str | None
    tests: tuple[str, ...]
    """Which must be green."""
    settings: Row
    lengths: tuple[int, ...]
    tasks: Callable[[tuple[int, ...], bool], Mapping[str, Callable[[], list[Row]]]]
    """Of some lengths, quick or not: what gives rows, by label; what is measured is kept label by label."""
    judge: Callable[[list[Row]], list[Row]]
    quick_lengths: tuple[int, ...] = (1024,)

    def main(self) -> None:
        """Measure, judge the goals, save and print."""
        arguments = self.parsed()
        torch.set_num_threads(1)
        measure.require_green_tests(*self.tests)
        lengths = self.quick_lengths if arguments.quick else tuple(sorted(set(arguments.lengths)))
        settings = {
            "width": WIDTH, "heads": HEADS, "dtype": "float32", "step": "forward, backward", **self.settings,
            "seconds": "of one processor", "lengths": list(lengths),
        }  # fmt: skip
        kept = None if arguments.quick else Rows(self.name, settings)
        rows: list[Row] = []
        for label, task in self.tasks(lengths, arguments.quick).items():
            found = task() if kept is None else kept.measured(label, partial(as_one, task))["rows"]
            rows += found
            sys.stdout.writelines(f"{line}\n" for line in map(shown, found))
            sys.stdout.flush()
        goals = self.judge(rows)
        for line in goals:
            sys.stdout.write(f"{'reached' if line['reached'] else 'MISSED '}  {line['goal']}: {line['measured']}\n")
        if kept is not None:
            sys.stdout.write(record.finish(record.save(self.name, rows, goals, settings), arguments.record))
            kept.forget()

    def parsed(self) -> argparse.Namespace:
        """The command line."""
        parser = argparse.ArgumentParser(description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="one short length, fewer rounds; nothing is saved")
        parser.add_argument(
            "--lengths", type=int, nargs="+", choices=self.lengths, default=self.lengths, help="leave others out"
        )
        parser.add_argument("--record", action="store_true", help=record.HELP)
        arguments = parser.parse_args()
        if arguments.quick and arguments.record:
            parser.error("--record goes without --quick, whose results are not saved")
        return arguments


def as_one(task: Callable[[], Sequence[Row]]) -> Row:
    """The rows of a task as one that is kept."""
    return {"rows": task()}


def shown(row: Row) -> str:
    """A row on one line."""
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )
