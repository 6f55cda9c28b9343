"""Peak memory of a training pass grows with the row as predicted, from 4,096 to 262,144 tokens, however layers are run.

A narrow model, so that all of it fits and ends: what is judged is how many hidden states a token holds, which does not
depend on the width. Counted are bytes of live tensors beside weights and optimizer, gradients included.
"""

from typing import Any

import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.model.execution.live_bytes import LiveBytes
from swat_lm.model.execution.predicted import Predicted
from verification.workplace import Workplace, require

LENGTHS = (4096, 16_384, 65_536, 262_144)
WIDTH, LAYERS, WITHIN, MOST_BYTES = 32, 2, 0.2, 7 * 2**30
MODEL = {
    "vocab_size": 1024, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 1,
    "intermediate_size": 88, "sliding_window": 128,
}  # fmt: skip


def executions(folder: str) -> dict[str, dict[str, Any]]:
    """Every way to run layers with its settings."""
    return {
        "plain": {},
        "checkpoint": {},
        "blockwise": {"block_size": 1024},
        "chunks": {"chunk_size": 2048, "carries": "disk", "folder": folder},
    }


def check(place: Workplace) -> dict[str, str]:
    """Count peaks at every length that fits; raises CheckFailedError where one, or a slope, is not as predicted."""
    config = SwatConfig(**MODEL)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = SwatForCausalLM(config).train()
    for name, settings in executions(str(place.folder)).items():
        predicted = Predicted(config, name, settings)
        model.set_execution(name, **settings)
        needs, peaks = {}, {}
        for length in LENGTHS:
            need = predicted.need(length).one_pass
            if need > MOST_BYTES:
                place.done(f"{name}: {length} tokens would need {need / 2**30:.1f} GiB, and are left out")
                continue
            needs[length], peaks[length] = need, peak(model, length)
            off = peaks[length] / need - 1
            require(abs(off) <= WITHIN, f"{name}: {length} tokens took {peaks[length]} bytes, predicted were {need}")
        last, before = sorted(peaks)[:-3:-1]
        counted, expected = ((each[last] - each[before]) / (last - before) for each in (peaks, needs))
        # of what grows by less than a number a token no share is asked for
        off = abs(counted - expected) / max(expected, 4 * WIDTH)
        require(off <= WITHIN, f"{name}: a token takes {counted:.0f} bytes, predicted were {expected:.0f}")
        shown = ", ".join(f"{size / 2**20:.1f} MiB at {length}" for length, size in peaks.items())
        place.done(
            f"{name}: {shown}; from {before} on {counted:.0f} bytes a token, predicted {expected:.0f} "
            f"({counted / (4 * WIDTH * LAYERS):.2f} hidden states a layer)"
        )
    return {"torch": torch.__version__}


def peak(model: SwatForCausalLM, length: int) -> int:
    """Bytes of one pass."""
    tokens = torch.randint(MODEL["vocab_size"], (1, length), generator=torch.Generator().manual_seed(length))
    with LiveBytes() as live:
        model(tokens, labels=tokens).loss.backward()
    model.zero_grad(set_to_none=True)
    return live.peak
