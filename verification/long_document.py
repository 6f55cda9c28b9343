"""One document of 1,000,000 tokens gives its exact gradient by reverse chunks, in nearly the memory of 16,384.

Counted are the bytes of live tensors beside weights and optimizer, gradients included; the process's size stands
beside. That the gradient is the one of a pass as a whole is checked where that fits. How far a step is, is said every
half minute: one of 1,000,000 tokens takes a good part of an hour on one core.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.model.execution.live_bytes import LiveBytes
from verification.workplace import Workplace, require

MODEL = {
    "vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 683,
    "sliding_window": 128,
}  # fmt: skip
CHUNK, SHORT, MOST = 2048, 16_384, 1.3
EVERY = 30
"""Seconds between two lines that say how far a step is."""


class Step(NamedTuple):
    """One optimizer step on one document."""

    peak: int
    """Bytes of tensors made in the step that lived at once."""
    loss: float
    seconds: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `long_document`."""
    parser.add_argument("--document-tokens", type=int, default=1_000_000, help="long_document: its length")


def check(place: Workplace, options: argparse.Namespace) -> dict[str, str]:
    """Train on documents short and long; raises CheckFailedError where the long one needs more than 1.3 times."""
    torch.manual_seed(0)
    model = SwatForCausalLM(SwatConfig(**MODEL)).train()  # type: ignore[arg-type]
    tokens = torch.randint(MODEL["vocab_size"], (1, options.document_tokens))
    settings = {"chunk_size": CHUNK, "carries": "disk", "folder": str(place.folder)}
    short = tokens[:, :SHORT]
    difference = compare(model, short, settings)
    require(difference < 1e-4, f"the gradient of {SHORT} tokens differs by {difference:.1e} of its norm")
    place.done(f"{SHORT} tokens: the gradient is that of one pass, but for {difference:.1e} of its norm")
    model.set_execution("chunks", **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # its state is there before anything is counted
    step(model, optimizer, tokens[:, :CHUNK])
    steps = {}
    for name, document in (("short", short), ("long", tokens)):
        steps[name] = found = step(model, optimizer, document, place.report)
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        place.done(
            f"{document.shape[1]} tokens: peak {found.peak / 2**20:.1f} MiB of tensors beside weights and optimizer, "
            f"process so far at most {size:.0f} MiB, loss {found.loss:.4f}, {found.seconds:.0f} s"
        )
    ratio = steps["long"].peak / steps["short"].peak
    place.done(f"{options.document_tokens} tokens need {ratio:.3f} times the memory of {SHORT}")
    require(ratio <= MOST, f"expected at most {MOST} times, measured {ratio:.3f}")
    return {"torch": torch.__version__}


def compare(model: SwatForCausalLM, tokens: Tensor, settings: dict[str, Any]) -> float:
    """How far the gradient of chunks is from that of one pass, as a share of its norm."""
    found = []
    for name, own in (("checkpoint", {}), ("chunks", settings)):
        model.set_execution(name, **own)
        model(tokens, labels=tokens).loss.backward()
        found.append(torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None]))
        model.zero_grad(set_to_none=True)
    return float((found[1] - found[0]).norm() / found[0].norm())


def step(
    model: SwatForCausalLM,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    say: Callable[[str], None] = lambda line: None,
) -> Step:
    """One step, counted; `say` hears every half minute how far it is."""
    began = time.perf_counter()
    with LiveBytes() as live:
        progress = Progress(-(-tokens.shape[1] // CHUNK), live, say)
        # the pass itself, then its chunks forward, then backward
        watching = model.register_forward_pre_hook(lambda module, given: progress.next())
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        watching.remove()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return Step(live.peak, loss.item(), time.perf_counter() - began)


class Progress:
    """How many chunks of a step have begun, and what lived at most so far."""

    def __init__(self, num_chunks: int, live: LiveBytes, say: Callable[[str], None]) -> None:
        self.num_chunks, self.live, self.say = num_chunks, live, say
        self.passes, self.said = -1, time.monotonic()

    def next(self) -> None:
        """One more pass of the model begins."""
        self.passes += 1
        if time.monotonic() - self.said < EVERY:
            return
        self.said = time.monotonic()
        back = self.passes - self.num_chunks
        at = f"{back} of {self.num_chunks} backward" if back > 0 else f"{self.passes} of {self.num_chunks} forward"
        self.say(f"chunk {at}, peak so far {self.live.peak / 2**20:.1f} MiB")
