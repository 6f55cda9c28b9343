"""LongVQ's codebook chooses, commits and follows averages as that of `vector-quantize-pytorch`, and how fast beside it.

The package is installed without PyTorch into a folder of its own, beside the PyTorch that is here.
"""

import json
import sys

from verification.workplace import REPOSITORY, Workplace, require

# with what it imports beside PyTorch
PACKAGES = ("vector-quantize-pytorch", "einops", "einx", "frozendict", "loguru", "torch-einops-utils")
PROGRAM = """
import json, statistics, sys, time
sys.path[:0] = sys.argv[1:3]
import torch
from importlib.metadata import version
from vector_quantize_pytorch import VectorQuantize
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.codebook import KeyCodebook

torch.set_num_threads(1)
torch.manual_seed(0)
ROWS, LENGTH, CODES, SIZE, DECAY, STEPS = 4, 512, 256, 64, 0.9, 5
found = {"versions": {name: version(name) for name in ("vector-quantize-pytorch", "torch")}}
peer = VectorQuantize(
    dim=SIZE, codebook_size=CODES, decay=DECAY, commitment_weight=1.0, threshold_ema_dead_code=0, eps=1e-12,
    rotation_trick=False, kmeans_init=False,
).train()
book = peer._codebook
ours = KeyCodebook(CODES, SIZE, 0, DECAY, 0.0, 1.0).train()
with torch.no_grad():
    book.embed.normal_()
    # as if each code had had one key, which is itself: both then average the same
    book.cluster_size.fill_(1.0)
    book.embed_avg.copy_(book.embed)
    ours.codes.copy_(book.embed[0])
    ours.counts.fill_(1.0)
    ours.totals.copy_(book.embed[0])
chunk = Chunk(torch.arange(LENGTH)[None].expand(ROWS, -1))
along = torch.randn(ROWS, LENGTH, SIZE)

def our_step(key):
    output, code = ours(key)
    said = ours.say(key, code, chunk)
    total, divisor = said.losses["commitment"]
    loss = total / divisor
    gradient = torch.autograd.grad((output * along).sum() + loss, key)[0]
    ours.absorb(said.statistics)
    return output, code, loss, gradient

def their_step(key):
    output, code, commitment = peer(key)
    # theirs is a mean over the channels too
    loss = SIZE * commitment.sum()
    gradient = torch.autograd.grad((output * along).sum() + loss, key)[0]
    return output, code, loss, gradient

apart = {"output": 0.0, "loss": 0.0, "gradient": 0.0, "codes": 0.0}
same = True
def far(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()
for _ in range(STEPS):
    key = torch.randn(ROWS, LENGTH, SIZE)
    mine, theirs = (step(key.clone().requires_grad_()) for step in (our_step, their_step))
    same &= bool((mine[1] == theirs[1]).all())
    for name, place in (("output", 0), ("loss", 2), ("gradient", 3)):
        apart[name] = max(apart[name], far(mine[place].detach(), theirs[place].detach()))
    apart["codes"] = max(apart["codes"], far(ours.codes, book.embed[0]))
seconds = {our_step: [], their_step: []}
for _ in range(7):
    key = torch.randn(ROWS, LENGTH, SIZE)
    for step, spent in seconds.items():
        given = key.clone().requires_grad_()
        begin = time.process_time()
        step(given)
        spent.append(time.process_time() - begin)
ratio = statistics.median(b / a for a, b in zip(seconds[our_step], seconds[their_step]))
print("FOUND", json.dumps({**found, "same": same, "apart": apart, "times_faster": ratio,
                           "ours_s": statistics.median(seconds[our_step])}))
"""
LARGEST = 1e-4
"""Of the largest number, in float32."""


def check(place: Workplace) -> dict[str, str]:
    """Install, compare five steps, then time both in turns on one thread; returns the versions."""
    folder = place.folder / "peers"
    place.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *PACKAGES])
    said = place.run([sys.executable, "-c", PROGRAM, str(folder), str(REPOSITORY)])
    found = json.loads(said.rsplit("FOUND", 1)[1])
    require(found["same"], "vector-quantize-pytorch chooses other codes")
    for name, difference in found["apart"].items():
        require(difference < LARGEST, f"{name} differ by {difference:.2e}, expected below {LARGEST:.0e}")
    largest = max(found["apart"].values())
    place.done(
        "five steps of a codebook of 256 codes, 2,048 keys each, as vector-quantize-pytorch has it: the same codes, "
        f"outputs, commitment, gradients and averages within {largest:.0e}; a step in {1000 * found['ours_s']:.0f} ms, "
        f"{found['times_faster']:.2f} times as fast"
    )
    return found["versions"]
