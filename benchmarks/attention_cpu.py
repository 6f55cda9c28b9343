"""The operator on a CPU beside its peers and beside what the machine's own products and sigmoids allow.

    python -m benchmarks.attention_cpu [--quick] [--record]

Executed FLOPs count the pairs of every tile, useful ones the pairs inside the window. The roof is the time of the same
batched products on the same tile shapes plus torch.sigmoid over the same scores, measured in turn with the operator.
"""

import argparse
import sys
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import measure, record
from swat_lm.ops import window_attention
from swat_lm.ops.bands import Band
from swat_lm.ops.flops import attention_flops

HEADS, HEAD_DIM = 8, 64


def main() -> None:
    """Measure, judge the goals, save and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter sequences, fewer rounds; results are not saved")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", action="store_true", help=record.HELP)
    arguments = parser.parse_args()
    if arguments.quick and arguments.record:
        parser.error("--record goes without --quick, whose results are not saved")
    torch.set_num_threads(arguments.threads)
    measure.require_green_tests("tests/ops")
    length, rounds = (2048, 3) if arguments.quick else (8192, 7)
    rows, goals = [], []
    for window in (128, 256, 1024):
        row = against_the_roof(length, window, rounds)
        row |= against_flex(length, window, rounds)
        rows.append(row)
        report(row)
        goals += [
            measure.goal(f"forward, W {window}: share of the executed roof", 0.8, row["forward_share"]),
            measure.goal(f"backward, W {window}: share of its roof", 0.8, row["backward_share"]),
        ]
        if "times_flex" in row:
            goals.append(measure.goal(f"forward, W {window}: times FlexAttention", 1.5, row["times_flex"]))
    row = against_masks(2 * length, 128, max(3, rounds - 2))
    rows.append(row)
    report(row)
    goals.append(measure.goal("forward and backward, T 16384, W 128: times SDPA with a mask", 40, row["times_sdpa"]))
    if "times_local_attention" in row:
        goals.append(measure.goal("the same: times local-attention", 2, row["times_local_attention"]))
    memory = memory_by_length(() if arguments.quick else (8192, 16384, 32768))
    if memory:
        rows.append(memory)
        report(memory)
    for line in goals:
        sys.stdout.write(f"{'reached' if line['reached'] else 'MISSED '}  {line['goal']}: {line['measured']}\n")
    if not arguments.quick:
        settings = {"heads": HEADS, "head_dim": HEAD_DIM, "length": length, "rounds": rounds, "batch": 1}
        sys.stdout.write(record.finish(record.save("attention_cpu", rows, goals, settings), arguments.record))


def report(row: dict) -> None:
    """Print one row as it is measured."""
    sys.stdout.write(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()) + "\n")
    sys.stdout.flush()


def inputs(length: int) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output, the same for every candidate."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, length, HEADS, HEAD_DIM, generator=generator) for _ in range(4)]


def attend(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    """The operator with a single result."""
    output = window_attention(*tensors, **options)
    assert isinstance(output, torch.Tensor)
    return output


def against_the_roof(length: int, window: int, rounds: int) -> dict:
    """Forward and backward beside the products and sigmoids they cannot do without."""
    query, key, value, d_output = (t.requires_grad_() for t in inputs(length))
    slopes = torch.tensor([-(2.0**-k) for k in range(1, 5)] + [2.0**-k for k in range(1, 5)])
    output = attend(query, key, value, window=window, slopes=slopes)

    def forward() -> None:
        with torch.no_grad():
            attend(query, key, value, window=window, slopes=slopes)

    def backward() -> None:
        torch.autograd.grad(output, (query, key, value), d_output, retain_graph=True)

    roof = Roof(length, window)
    timings = measure.take_turns(
        {"forward": forward, "backward": backward, "forward roof": roof.forward, "backward roof": roof.backward}, rounds
    )
    useful = attention_flops(HEADS, HEAD_DIM, length, window)
    seconds = timings["forward"].median
    return {
        "window": window,
        "length": length,
        "forward_ms": seconds * 1e3,
        "backward_ms": timings["backward"].median * 1e3,
        "forward_share": timings["forward"].times_faster_than(timings["forward roof"]),
        "backward_share": timings["backward"].times_faster_than(timings["backward roof"]),
        "forward_gflops_executed": roof.pairs * 4 * HEAD_DIM / seconds / 1e9,
        "forward_gflops_useful": useful / seconds / 1e9,
        "backward_gflops_useful": 2.5 * useful / timings["backward"].median / 1e9,
    }


class Roof:
    """The products and sigmoids of one call, on tiles of the same shape that stay in cache, and nothing else."""

    def __init__(self, length: int, window: int) -> None:
        band = Band.of(length, length, window, torch.device("cpu"))
        tiles = [tile for span in band.cut(0, None, None, disjoint=False) for tile in span.batches]
        self.pairs = HEADS * sum(tile.count * tile.rows * tile.keys for tile in tiles)
        per_batch = band.tiles_per_batch
        self.repeats = round(self.pairs / (per_batch * band.rows * band.width))
        self.rows = torch.randn(per_batch, band.rows, HEAD_DIM)
        self.keys = torch.randn(per_batch, band.width, HEAD_DIM)
        self.scores = torch.randn(per_batch, band.rows, band.width)
        self.result = torch.empty_like(self.rows)
        self.key_result = torch.empty_like(self.keys)

    def forward(self) -> None:
        """Q K^T, sigmoid, P V."""
        for _ in range(self.repeats):
            torch.bmm(self.rows, self.keys.transpose(1, 2), out=self.scores)
            torch.sigmoid(self.scores, out=self.scores)
            torch.bmm(self.scores, self.keys, out=self.result)

    def backward(self) -> None:
        """Q K^T, sigmoid, dO V^T, P^T dO, dS K, dS^T Q."""
        for _ in range(self.repeats):
            torch.bmm(self.rows, self.keys.transpose(1, 2), out=self.scores)
            torch.sigmoid(self.scores, out=self.scores)
            torch.bmm(self.rows, self.keys.transpose(1, 2), out=self.scores)
            torch.bmm(self.scores.transpose(1, 2), self.rows, out=self.key_result)
            torch.bmm(self.scores, self.keys, out=self.result)
            torch.bmm(self.scores.transpose(1, 2), self.rows, out=self.key_result)


def against_flex(length: int, window: int, rounds: int) -> dict:
    """Forward beside compiled FlexAttention with a softmax window (it has no backward and no sigmoid on a CPU)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value, _ = (t.transpose(1, 2).contiguous() for t in inputs(length))

    def inside(b, h, q, k):
        return (q >= k) & (q - k < window)

    best = None
    for block in (64, 128):
        mask = create_block_mask(inside, None, None, length, length, device="cpu", BLOCK_SIZE=block)
        compiled = torch.compile(flex_attention)
        try:
            result = compiled(query, key, value, block_mask=mask)
        except RuntimeError as error:  # inductor's failures, a missing C++ compiler among them
            sys.stdout.write(f"FlexAttention, block {block}: not measured, {type(error).__name__}\n")
            continue
        layout = [t.transpose(1, 2).contiguous() for t in (query, key, value)]
        expected = attend(*layout, window=window, score_function="softmax").transpose(1, 2)
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            timings = measure.take_turns(
                {
                    "sigmoid": lambda layout=layout: attend(*layout, window=window),
                    "softmax": lambda layout=layout: attend(*layout, window=window, score_function="softmax"),
                    "flex": lambda compiled=compiled, mask=mask: compiled(query, key, value, block_mask=mask),
                },
                rounds,
            )
        if best is None or timings["flex"].median < best["flex"].median:
            best = timings
    if best is None:
        return {}
    return {
        "flex_ms": best["flex"].median * 1e3,
        "times_flex": best["sigmoid"].times_faster_than(best["flex"]),
        "softmax_times_flex": best["softmax"].times_faster_than(best["flex"]),
    }


def against_masks(length: int, window: int, rounds: int) -> dict:
    """Forward and backward beside SDPA with a window mask and beside local-attention with an exact window."""
    query, key, value, d_output = (t.requires_grad_() for t in inputs(length))
    tensors = (query, key, value)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = (distance >= 0) & (distance < window)
    del distance

    def train(attend):
        torch.autograd.grad(attend(), tensors, d_output)

    def sdpa():
        heads_first = (t.transpose(1, 2) for t in tensors)
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)

    expected = attend(*tensors, window=window, score_function="softmax")
    torch.testing.assert_close(sdpa(), expected, atol=1e-4, rtol=1e-4)
    candidates = {
        "ours": lambda: train(lambda: attend(*tensors, window=window)),
        "sdpa": lambda: train(sdpa),
    }
    # its exact window of n * look_backward counts the query on top: one key more than ours of the same number
    for name, module in local_attention(window).items():
        result = run_local_attention(module, tensors)
        longer = attend(*tensors, window=window + 1, score_function="softmax")
        torch.testing.assert_close(result, longer, atol=1e-4, rtol=1e-4)
        candidates[name] = lambda module=module: train(lambda: run_local_attention(module, tensors))
    timings = measure.take_turns(candidates, rounds)
    row = {
        "length": length,
        "window": window,
        "train_ms": timings["ours"].median * 1e3,
        "sdpa_ms": timings["sdpa"].median * 1e3,
        "times_sdpa": timings["ours"].times_faster_than(timings["sdpa"]),
    }
    peers = {name: t for name, t in timings.items() if name.startswith("local-attention")}
    if peers:
        best = min(peers, key=lambda name: peers[name].median)
        row |= {
            "local_attention": best,
            "local_attention_ms": peers[best].median * 1e3,
            "times_local_attention": timings["ours"].times_faster_than(peers[best]),
        }
    return row


def local_attention(window: int) -> dict:
    """The peer at its candidate settings; empty, and said so, where it is not installed."""
    try:
        from local_attention import LocalAttention
    except ImportError:
        sys.stdout.write("local-attention: not measured, install it with `pip install local-attention`\n")
        return {}
    return {
        f"local-attention {window // n} x {n}": LocalAttention(
            window // n, causal=True, look_backward=n, exact_windowsize=True, use_rotary_pos_emb=False
        )
        for n in (1, 2)
    }


def run_local_attention(module, tensors) -> torch.Tensor:
    """Call it in its own layout, [B * H, T, D]."""
    flat = [t.transpose(1, 2).reshape(HEADS, -1, HEAD_DIM) for t in tensors]
    return module(*flat).view(1, HEADS, -1, HEAD_DIM).transpose(1, 2)


def memory_by_length(lengths: tuple[int, ...]) -> dict:
    """Peak memory of forward and backward above the inputs, in a process of its own per length; bytes per token."""
    if not lengths:
        return {}
    code = (
        "import torch\nfrom swat_lm.ops import window_attention\n"
        "x=[torch.randn(1,{t},8,64,requires_grad=True) for _ in range(3)]\n"
        "y=[torch.randn(1,256,8,64,requires_grad=True) for _ in range(3)]\n"
        "window_attention(*y,window=128).sum().backward()\nmark()\nwindow_attention(*x,window=128).sum().backward()\n"
    )
    peaks = [measure.peak_memory(code.format(t=t)) for t in lengths]
    slopes = [(b - a) / (m - n) for a, b, n, m in zip(peaks, peaks[1:], lengths, lengths[1:], strict=False)]
    return {
        "memory_lengths": list(lengths),
        "peak_mib": [round(p / 2**20, 1) for p in peaks],
        "bytes_per_token": [round(s) for s in slopes],
        "bytes_per_token_of_one_tensor": HEADS * HEAD_DIM * 4,
    }


if __name__ == "__main__":
    main()
