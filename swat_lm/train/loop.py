"""A training run from recipe to exported model, one optimizer step after another.

What comes before is in setup.py, what is distributed in engine.py, what a step minimises in objectives/. Everything
random is a function of (seed, step, process), so a checkpoint needs weights, optimizer, objective and step only.
"""

import math
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swat_lm.data import Batch, Progress
from swat_lm.interruption import Interruption
from swat_lm.recipe import Recipe
from swat_lm.train.auxiliary import StepAuxiliary, count_divisors
from swat_lm.train.checkpoint import Checkpoint, checkpoint_folder, save_checkpoint
from swat_lm.train.engine import Engine
from swat_lm.train.evaluation import HeldOutLoss
from swat_lm.train.events import DivergedError, Event, EventKind, RunResult
from swat_lm.train.export import export_model
from swat_lm.train.metrics import open_writers
from swat_lm.train.optimizer import set_hyperparameters
from swat_lm.train.run_folder import hold_folder
from swat_lm.train.schedule import learning_rate
from swat_lm.train.setup import Training, check_beforehand, set_up

__all__ = ["Run", "run"]


def run(recipe: Recipe, on_event: Callable[[Event], None] | None = None) -> RunResult:
    """Train as the recipe says, continuing what its `out` folder holds; under torchrun, every process calls it.

    SIGINT, SIGTERM and SIGHUP end it after the current step with a checkpoint and `RunResult.interrupted`.
    Raises ValueError for a recipe, data or checkpoint that cannot be used, OSError for a folder that cannot be
    written, DivergedError for a loss that is not finite. None of them harms what the folder held.
    """

    def on_progress(progress: Progress) -> None:
        if on_event is not None:
            on_event(Event("prepare", step=0, steps=recipe.train.steps, tokens=0, preparing=progress))

    with ExitStack() as stack:
        engine = Engine(recipe.train)
        check_beforehand(engine, recipe)
        lock = engine.on_main_only(lambda: hold_folder(Path(recipe.out), recipe.data.cache))
        if lock is not None:
            stack.callback(lock.release)
        training = set_up(engine, recipe, on_progress)
        first = training.start.step if training.start else 0
        writers = engine.on_main_only(lambda: open_writers(recipe, first)) or []
        for writer in writers:
            stack.callback(writer.close)
        return Run(training, on_event, [writer.write for writer in writers], stack.enter_context(Interruption())).go()


class Run:
    """The state of a run in progress: how far it is, and what it measured since the last line of metrics."""

    def __init__(
        self,
        training: Training,
        on_event: Callable[[Event], None] | None,
        writers: list[Callable[[int, dict[str, float]], None]],
        interruption: Interruption,
    ) -> None:
        self.training, self.recipe, self.engine = training, training.recipe, training.engine
        self.on_event = on_event if self.engine.is_main else None
        self.writers = writers
        self.interruption = interruption
        self.objective = training.objective
        self.has_auxiliary: bool | None = None
        self.checkpoint = start = training.start
        self.step = self.first_step = start.step if start else 0
        self.tokens = start.tokens if start else 0
        self.seconds_before = start.seconds if start else 0.0
        self.began = time.perf_counter()
        self.recent_tokens, self.recent_read, self.recent_seconds = 0, 0, 0.0
        self.loss: float | None = None
        self.held_out: HeldOutLoss | None = None

    def go(self) -> RunResult:
        """Do the remaining steps, save, evaluate and export."""
        train, start = self.recipe.train, self.training.start
        self.tell("start", path=start.folder if start else None)
        interrupted = False
        with closing(self.batches()) as batches:
            for batch in batches:
                measured, interrupted = self.take_step(batch)
                last = self.step == train.steps
                if self.is_due(train.evaluate_every, last) and not interrupted:
                    measured |= self.evaluate()
                self.log(measured, last or interrupted)
                if interrupted or self.is_due(train.save_every, last) or last:
                    self.save()
                if interrupted:
                    break
        export = self.export() if train.export else None
        self.tell("interrupt" if interrupted else "finish")
        return RunResult(
            out=Path(self.recipe.out),
            last_step=self.step,
            last_loss=self.loss,
            held_out_loss=self.held_out.loss if self.held_out else None,
            checkpoint=self.checkpoint.folder if self.checkpoint else None,
            export=export,
            interrupted=interrupted,
        )

    def batches(self) -> Generator[Batch, None, None]:
        """This process's rows of each remaining step, read one step ahead."""
        rows = self.engine.rows()
        with ThreadPoolExecutor(max_workers=1) as reader:
            ahead = reader.submit(self.training.source.batch, self.step, rows)
            for step in range(self.step, self.recipe.train.steps):
                batch = ahead.result()
                ahead = reader.submit(self.training.source.batch, step + 1, rows)
                yield batch

    def take_step(self, batch: Batch) -> tuple[dict[str, float], bool]:
        """One optimizer step. Returns its numbers and whether any process was asked to stop.

        Raises DivergedError if loss or gradient is not finite.
        """
        engine, model, optimizer, train = self.engine, self.training.model, self.training.optimizer, self.recipe.train
        began = time.perf_counter()
        # one of its own for each step of each process
        torch.manual_seed(((self.recipe.seed * 1_000_003 + self.step) * 1_000_003 + engine.rank) % 2**63)
        rate = learning_rate(self.step, train)
        set_hyperparameters(optimizer, train, rate)

        # the loss is per target of the whole step: counted over all processes and micro-batches before any backward
        targets = int(engine.sum(torch.tensor(self.objective.num_targets(batch))))
        metrics, auxiliary = self.accumulate_gradients(engine.micro_batches(batch), targets)
        norm = engine.clip_gradients(model, train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        metrics |= auxiliary.absorb(model)

        stop = torch.tensor(float(self.interruption.requested), device=engine.device)
        sums = engine.sum(torch.stack([*metrics.values(), stop])).tolist()
        shown, stops, grad_norm = dict(zip(metrics, sums, strict=False)), sums[-1], norm.item()
        if not targets:
            # long prompts may leave a step without marked tokens: nothing was learnt, and 0 would look like much
            if self.loss is None:
                raise ValueError(
                    f"step {self.step + 1}: its rows hold nothing for {self.objective.name} to predict: raise "
                    "data.sequence_length or train.batch_size"
                )
            shown["loss"] = self.loss
        mean_loss = shown["loss"]
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            raise DivergedError(self.describe_divergence(f"loss {mean_loss}, gradient norm {grad_norm}"))
        self.step, self.tokens, self.loss = self.step + 1, self.tokens + targets, mean_loss
        self.recent_tokens += targets
        # what is only read costs as much as what is learnt
        self.recent_read += batch.input_ids.numel() * engine.num_processes
        self.recent_seconds += time.perf_counter() - began
        self.tell("step", loss=mean_loss, learning_rate=rate)
        return {**shown, "grad_norm": grad_norm, "learning_rate": rate}, stops > 0

    def accumulate_gradients(self, parts: list[Batch], targets: int) -> tuple[dict[str, Tensor], StepAuxiliary]:
        """The gradient of a step, over all its micro-batches.

        Returns its numbers, which must be summed over processes, with the loss first, and what layers said beside.
        """
        engine, model, objective = self.engine, self.training.model, self.objective
        divisors = None
        if len(parts) > 1:
            # nobody knows before the first step whether layers have auxiliary losses
            divisors = {} if self.has_auxiliary is False else count_divisors(engine, objective, model, parts)
            self.has_auxiliary = bool(divisors)
        auxiliary = StepAuxiliary(engine, objective.settings.auxiliary_weights, divisors)
        total = torch.zeros((), device=engine.device)
        metrics: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            engine.accumulate(model, last=index == len(parts) - 1)
            with engine.autocast():
                # gradients are averaged over processes, hence the share
                found = objective.loss(model, part, num_targets=max(targets, 1) / engine.num_processes)
            added = auxiliary.add(found.auxiliary)
            (found.loss if added is None else found.loss + added).backward()
            total += found.loss.detach()
            for name, value in found.metrics.items():
                share = value.detach().float() / (len(parts) * engine.num_processes)
                metrics[name] = metrics[name] + share if name in metrics else share
        return {"loss": total / engine.num_processes, **metrics, **auxiliary.metrics()}, auxiliary

    def describe_divergence(self, numbers: str) -> str:
        """The sentence for a run that cannot go on."""
        good = f"the last good checkpoint is {self.checkpoint.folder}" if self.checkpoint else "no checkpoint yet"
        return (
            f"training diverged in step {self.step + 1}: {numbers}; {good}. Try a lower train.learning_rate or more "
            "train.warmup_steps in a run with another `out`"
        )

    def is_due(self, every: int, last: bool) -> bool:
        """Whether something done every so many steps, and at the end, happens now; never if `every` is 0."""
        return every > 0 and (last or self.step % every == 0)

    def evaluate(self) -> dict[str, float]:
        """Loss on the held-out rows; raises DivergedError if it is not finite."""
        if self.training.held_out is None:
            return {}
        self.held_out = self.training.held_out.evaluate(self.engine, self.training.model, self.objective)
        if not math.isfinite(self.held_out.loss):
            raise DivergedError(self.describe_divergence(f"held-out loss {self.held_out.loss}"))
        self.tell("evaluate", held_out_loss=self.held_out.loss)
        return self.held_out.metrics()

    def log(self, measured: dict[str, float], last: bool) -> None:
        """One line of metrics, if this step has one: every `log_every` steps, the first, the last, evaluations."""
        if not (self.is_due(self.recipe.train.log_every, last) or self.step == 1 or "held_out_loss" in measured):
            return
        record = {
            "tokens": self.tokens,
            **measured,
            "tokens_per_second": self.recent_tokens / self.recent_seconds,
            "flops_per_second": self.recent_read / self.recent_seconds * self.training.flops_per_token,
            "seconds": self.seconds(),
        }
        memory = self.engine.peak_memory_bytes()
        if memory is not None:
            record["peak_memory_bytes"] = memory
        for write in self.writers:
            write(self.step, record)
        self.recent_tokens, self.recent_read, self.recent_seconds = 0, 0, 0.0

    def seconds(self) -> float:
        """Wall-clock seconds of training, over all parts of the run."""
        return self.seconds_before + time.perf_counter() - self.began

    def save(self) -> None:
        """Write a checkpoint; raises OSError."""
        training = self.training
        checkpoint = Checkpoint(
            folder=checkpoint_folder(Path(self.recipe.out), self.step),
            step=self.step,
            tokens=self.tokens,
            seconds=self.seconds(),
            recipe=asdict(self.recipe),
            model=training.config,
            data=training.data,
        )
        save_checkpoint(
            self.engine, training.model, training.optimizer, checkpoint, self.recipe.train.keep,
            self.objective.state_dict(),
        )  # fmt: skip
        self.checkpoint = checkpoint
        self.tell("save", path=checkpoint.folder)

    def export(self) -> Path:
        """Write the `save_pretrained` folder; raises OSError."""
        folder = export_model(
            self.engine, self.training.model, self.training.tokenizer, self.recipe, self.step, self.tokens,
            self.held_out.loss if self.held_out else None,
        )  # fmt: skip
        self.tell("export", path=folder)
        return folder

    def tell(self, kind: EventKind, **details: Any) -> None:
        """Send an event to whoever watches the main process."""
        if self.on_event is None:
            return
        steps, done, elapsed = self.recipe.train.steps, self.step - self.first_step, time.perf_counter() - self.began
        if done:
            details["seconds_left"] = elapsed / done * (steps - self.step)
        if self.recent_seconds:
            details["tokens_per_second"] = self.recent_tokens / self.recent_seconds
        self.on_event(Event(kind=kind, step=self.step, steps=steps, tokens=self.tokens, **details))
