"""ECP and Perceiver AR give the numbers of `local-attention` and `perceiver-ar-pytorch`, and how fast beside them.

Both packages are installed without what they depend on into a folder of their own, beside the PyTorch that is here.
"""

import json
import sys

from verification.workplace import REPOSITORY, Workplace, require

PEERS = ("local-attention", "perceiver-ar-pytorch")
# what they import beside PyTorch
PACKAGES = (*PEERS, "einops", "einops-exts", "hyper-connections", "torch-einops-utils")
PROGRAM = """
import json, statistics, sys, time
sys.path[:0] = sys.argv[1:3]
import torch
from importlib.metadata import version
from local_attention import LocalAttention
from perceiver_ar_pytorch.perceiver_ar_pytorch import CausalPrefixAttention, RotaryEmbedding
from swat_lm import SwatConfig
from swat_lm.layers.chunk import Chunk
from swat_lm.model.building import build_layers
from swat_lm.ops import window_attention

torch.set_num_threads(1)
torch.manual_seed(0)
WIDTH, HEADS, LENGTH, SEGMENT, LATENTS = 256, 8, 2048, 128, 1024
SIZE = WIDTH // HEADS
found = {"versions": {name: version(name) for name in ("local-attention", "perceiver-ar-pytorch", "torch")}}

# attention of segments, heads first for the peer: it takes whole segments before and its own, as ECP does
place = torch.arange(LENGTH)
first = ((place // SEGMENT - 1) * SEGMENT).clamp(min=0).int()[None]
peer = LocalAttention(window_size=SEGMENT, causal=True, look_backward=1, use_rotary_pos_emb=False)

def ours(query, key, value):
    return window_attention(
        query, key, value, window=2 * SEGMENT, score_function="softmax", first_visible=first, backend="auto")

def theirs(query, key, value):
    return peer(*(x.transpose(1, 2).contiguous() for x in (query, key, value))).transpose(1, 2)

mixer = build_layers(SwatConfig(
    vocab_size=8, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=HEADS,
    layers=[{"kind": "perceiver", "latents": LATENTS, "tied": False, "kv_norm": False}],
))[0][0].self_attn
prefix = CausalPrefixAttention(dim=WIDTH, dim_head=SIZE, heads=HEADS, max_heads_process=HEADS)
rotary = RotaryEmbedding(SIZE)
with torch.no_grad():
    prefix.to_q.weight.copy_(mixer.q_proj.weight)
    prefix.to_kv.weight.copy_(torch.cat((mixer.k_proj.weight, mixer.v_proj.weight)))
    prefix.to_out.weight.copy_(mixer.o_proj.weight)
    prefix.to_out.bias.zero_()

def latents(hidden):
    return mixer(torch.nn.functional.layer_norm(hidden, (WIDTH,)), Chunk(place[None])).hidden

def peers_latents(hidden):
    history = LENGTH - LATENTS
    return prefix(hidden[:, history:], hidden[:, :history], rotary_pos_emb=rotary(LENGTH, device="cpu"))

def compare(name, one, other, given):
    results, gradients = [], []
    for run in (one, other):
        inputs = [x.clone().requires_grad_() for x in given]
        output = run(*inputs)
        results.append(output.detach())
        gradients.append(torch.autograd.grad((output * along[: output.numel()].view(output.shape)).sum(), inputs))
    difference = (results[0] - results[1]).abs().max().item() / results[1].abs().max().item()
    apart = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*gradients))
    seconds = {one: [], other: []}
    for _ in range(5):
        for run in (one, other):
            inputs = [x.clone().requires_grad_() for x in given]
            begin = time.process_time()
            run(*inputs).sum().backward()
            seconds[run].append(time.process_time() - begin)
    ratio = statistics.median(b / a for a, b in zip(seconds[one], seconds[other]))
    found[name] = {
        "output": difference, "gradient": apart, "ours_s": statistics.median(seconds[one]), "times_faster": ratio}

along = torch.randn(LENGTH * WIDTH)
compare("segments", ours, theirs, [torch.randn(1, LENGTH, HEADS, SIZE) for _ in range(3)])
compare("latents", latents, peers_latents, [torch.randn(1, LENGTH, WIDTH)])
print("FOUND", json.dumps(found))
"""
LARGEST = 1e-4
"""Of the largest number, in float32."""


def check(place: Workplace) -> dict[str, str]:
    """Install, compare values and gradients, then time both in turns on one thread; returns the versions."""
    folder = place.folder / "peers"
    place.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *PACKAGES])
    said = place.run([sys.executable, "-c", PROGRAM, str(folder), str(REPOSITORY)])
    found = json.loads(said.rsplit("FOUND", 1)[1])
    words = {
        "segments": "attention of segments of 128 to themselves and the one before, as local-attention has it",
        "latents": "1,024 latents behind as much history, as perceiver-ar-pytorch's CausalPrefixAttention has it",
    }
    for name, what in words.items():
        row = found[name]
        for which in ("output", "gradient"):
            require(row[which] < LARGEST, f"{what}: {which} differs by {row[which]:.2e}, expected below {LARGEST:.0e}")
        place.done(
            f"{what}: output within {row['output']:.0e}, gradients within {row['gradient']:.0e}; forward and backward "
            f"of 2,048 tokens in {1000 * row['ours_s']:.0f} ms, {row['times_faster']:.2f} times as fast"
        )
    return found["versions"]
