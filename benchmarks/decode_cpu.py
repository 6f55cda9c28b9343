"""Prefill and decoding beside Mistral's sliding cache, and decoding at 100M parameters beside the memory's bandwidth.

    python -m benchmarks.decode_cpu [--quick]

Both sides read the prompt in chunks, each of the size that serves it best, then decode greedily token by token under
inference_mode: ours by `decode_step`, Mistral by its forward with a DynamicCache, without `generate()` on either side.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, MistralForCausalLM

from benchmarks import measure, models
from swat_lm import SwatForCausalLM
from swat_lm.model import cost

WIDTH, VOCABULARIES, BATCHES = 256, (256, 8192), (1, 16)
PROMPT, CHUNKS = 16384, (128, 256, 512, 1024)
# 98 million parameters without the input embedding's, which decoding does not read
LARGE_WIDTH, LARGE_LAYERS, LARGE_VOCABULARY = 768, 12, 16384


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    prompt: int = PROMPT
    steps: int = 64
    rounds: int = 7
    prefill_rounds: int = 3


QUICK = Sizes(prompt=2048, steps=16, rounds=3, prefill_rounds=1)


class Stream(Protocol):
    """B streams of one candidate."""

    def prefill(self, tokens: Tensor, chunk: int) -> Tensor:
        """Begin anew with a prompt `[B, T]`; returns the logits after it, `[B, V]`."""
        ...

    def step(self, token: Tensor) -> Tensor:
        """Feed `[B, 1]`; returns the logits `[B, V]`."""
        ...

    def num_bytes(self) -> int:
        """Bytes kept of the past."""
        ...


class OurStream:
    """A SwatForCausalLM over its rings, its weights laid out as one does before decoding on a CPU."""

    def __init__(self, model: SwatForCausalLM) -> None:
        self.model = model.eval()
        self.model.arrange_for_decoding()

    def prefill(self, tokens: Tensor, chunk: int) -> Tensor:
        """Begin anew with a prompt."""
        self.state = self.model.init_state(tokens.shape[0])
        return self.model.prefill(tokens, self.state, chunk)[0]

    def step(self, token: Tensor) -> Tensor:
        """Feed one token per stream."""
        return self.model.decode_step(token, self.state)

    def num_bytes(self) -> int:
        """Rings and positions."""
        return self.state.num_bytes


class MistralStream:
    """Hugging Face's Mistral over its sliding DynamicCache."""

    def __init__(self, model: MistralForCausalLM) -> None:
        self.model = model.eval()

    def prefill(self, tokens: Tensor, chunk: int) -> Tensor:
        """Begin anew with a prompt; of a chunk only the last place's logits are formed."""
        self.cache = DynamicCache(config=self.model.config)
        logits = None
        for part in tokens.split(chunk, dim=1):
            logits = self.model(part, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        assert logits is not None
        return logits[:, -1]

    def step(self, token: Tensor) -> Tensor:
        """Feed one token per stream."""
        return self.model(token, past_key_values=self.cache, use_cache=True).logits[:, -1]

    def num_bytes(self) -> int:
        """Keys and values of all layers; what a slice keeps alive is counted by its storage."""
        tensors = [getattr(layer, name) for layer in self.cache.layers for name in ("keys", "values")]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


def main() -> None:
    """Measure, judge the goals, save and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short prompts, fewer rounds; results are not saved")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measure.require_green_tests(
        "tests/ops/test_step.py", "tests/model/test_conversion.py", "tests/model/test_streaming.py"
    )
    sizes = QUICK if arguments.quick else Sizes()
    rows, goals = [], []
    with torch.inference_mode():
        for vocabulary in VOCABULARIES:
            check_same_function(vocabulary)
            for batch in BATCHES:
                row = against_mistral(batch, vocabulary, sizes)
                where = f"batch {batch}, vocabulary {vocabulary}"
                goals.append(measure.goal(f"{where}: times Mistral's tokens/s", 2, row["decode times mistral"]))
                rows.append(row)
        rows.append(against_bandwidth(sizes))
    goals.append(measure.goal("100M parameters: share of the read bandwidth", 0.7, rows[-1]["share of bandwidth"]))
    for line in goals:
        sys.stdout.write(f"{'reached' if line['reached'] else 'MISSED '}  {line['goal']}: {line['measured']}\n")
    if not arguments.quick:
        settings = {
            "width": WIDTH,
            "layers": models.LAYERS,
            "head_dim": models.HEAD_DIM,
            "window": models.WINDOW,
            "dtype": "float32",
            "prompt": sizes.prompt,
            "steps_per_round": sizes.steps,
            "rounds": sizes.rounds,
            "prefill_rounds": sizes.prefill_rounds,
            "chunks_tried": list(CHUNKS),
        }
        sys.stdout.write(f"{measure.save('decode_cpu', rows, goals, settings)}\n")


def report(row: dict) -> None:
    """Print one row as it is measured."""
    for key, value in row.items():
        sys.stdout.write(f"  {key}: {value:.4g}\n" if isinstance(value, float) else f"  {key}: {value}\n")
    sys.stdout.write("\n")
    sys.stdout.flush()


def check_same_function(vocabulary: int, width: int = WIDTH, prompt: int = 3 * models.WINDOW + 5) -> None:
    """Our softmax window and Mistral, prefilled in unlike chunks and then stepped, give equal logits."""
    ours = OurStream(models.softmax_window(width, vocabulary))
    tokens = models.random_tokens(2, prompt + 4, vocabulary)
    for attention in ("sdpa", "eager"):
        peer = MistralStream(models.mistral(width, vocabulary, attention))
        expected = peer.prefill(tokens[:, :prompt], 100)
        models.check_equal("prefill", ours.prefill(tokens[:, :prompt], 150), expected)
        for token in tokens[:, prompt:].split(1, dim=1):
            models.check_equal("a decoding step", ours.step(token), peer.step(token))


def against_mistral(batch: int, vocabulary: int, sizes: Sizes, width: int = WIDTH) -> dict:
    """Prefill and decoding of B streams in turns with Mistral, by the better of its attentions."""
    streams: dict[str, Stream] = {
        "swat": OurStream(models.swat(width, vocabulary)),
        "softmax window": OurStream(models.softmax_window(width, vocabulary)),
        "mistral sdpa": MistralStream(models.mistral(width, vocabulary, "sdpa")),
        "mistral eager": MistralStream(models.mistral(width, vocabulary, "eager")),
    }
    tokens = models.random_tokens(batch, sizes.prompt, vocabulary)
    sample = tokens[:, : max(CHUNKS) * 2]
    chunks = {name: best_chunk(stream, sample) for name, stream in streams.items()}
    prefills = measure.take_turns(
        {name: partial(stream.prefill, tokens, chunks[name]) for name, stream in streams.items()},
        sizes.prefill_rounds,
        warm_up=False,
    )
    # every stream now stands after the whole prompt, and goes on from round to round
    decodes = measure.take_turns(
        {name: partial(decode, stream, tokens[:, -1:], sizes.steps) for name, stream in streams.items()}, sizes.rounds
    )
    peers = ("mistral sdpa", "mistral eager")
    prefill_peer = min(peers, key=lambda name: prefills[name].median)
    decode_peer = min(peers, key=lambda name: decodes[name].median)
    row: dict = {"batch": batch, "vocabulary": vocabulary, "prompt": sizes.prompt}
    for name, timing in prefills.items():
        row |= {f"{name} prefill tokens/s": batch * sizes.prompt / timing.median, f"{name} chunk": chunks[name]}
    for name, timing in decodes.items():
        row |= {
            f"{name} tokens/s": batch * sizes.steps / timing.median,
            f"{name} ms per step": timing.median / sizes.steps * 1e3,
            f"{name} state bytes": streams[name].num_bytes(),
        }
    for label, name in (("", "swat"), ("softmax ", "softmax window")):
        row[f"{label}prefill times mistral"] = prefills[name].times_faster_than(prefills[prefill_peer])
        row[f"{label}decode times mistral"] = decodes[name].times_faster_than(decodes[decode_peer])
    row |= {"best prefill peer": prefill_peer, "best decode peer": decode_peer}
    report(row)
    return row


def best_chunk(stream: Stream, tokens: Tensor) -> int:
    """The chunk size with which a stream reads a prompt fastest."""
    sizes = [size for size in CHUNKS if size <= tokens.shape[1]]
    candidates: dict[str, Callable] = {str(size): partial(stream.prefill, tokens, size) for size in sizes}
    timings = measure.take_turns(candidates, 2)
    return min(sizes, key=lambda size: min(timings[str(size)].seconds))


def decode(stream: Stream, token: Tensor, steps: int) -> None:
    """Go on greedily for a number of tokens."""
    for _ in range(steps):
        token = stream.step(token).argmax(dim=-1, keepdim=True)


def against_bandwidth(
    sizes: Sizes, width: int = LARGE_WIDTH, layers: int = LARGE_LAYERS, vocabulary: int = LARGE_VOCABULARY
) -> dict:
    """Batch 1 at 100M parameters: bytes a token has to read, over time, against how fast the same memory can be read.

    The read bandwidth is the best of several ways over a buffer of as many bytes. What PyTorch's matrix-vector
    products reach over the model's own matrices, and nothing else, is given beside it.
    """
    stream = OurStream(models.swat(width, vocabulary, layers))
    model = stream.model
    tokens = models.random_tokens(1, min(sizes.prompt, 4 * models.WINDOW), vocabulary)
    stream.prefill(tokens, 256)
    num_bytes = cost.decoding_bytes_per_token(model.config, tokens.shape[1], 1, weight_bytes=4, dtype_bytes=4)
    # a multiple of the width, so that it is also a matrix
    buffer = torch.randn(num_bytes // 4 // width * width)
    readers = {
        "sum": buffer.sum,
        "dot": partial(torch.dot, buffer, buffer),
        "matrix-vector": partial(torch.mv, buffer.view(-1, width), torch.randn(width)),
    }
    timings = measure.take_turns(
        {
            "decode": partial(decode, stream, tokens[:, -1:], 1),
            "products": products(model),
            **readers,
        },
        3 * sizes.rounds,
    )
    best = min(readers, key=lambda name: timings[name].median)
    row = {
        "parameters": cost.count_parameters(model.config).total,
        "bytes per token": num_bytes,
        "state bytes": stream.num_bytes(),
        "ms per token": timings["decode"].median * 1e3,
        "GB/s": num_bytes / timings["decode"].median / 1e9,
        "best reader": best,
        **{f"{name} GB/s": num_bytes / timings[name].median / 1e9 for name in readers},
        "products GB/s": num_bytes / timings["products"].median / 1e9,
        "share of bandwidth": timings["decode"].times_faster_than(timings[best]),
        "share of the products' rate": timings["decode"].times_faster_than(timings["products"]),
    }
    report(row)
    return row


def products(model: SwatForCausalLM) -> Callable[[], None]:
    """Every weight matrix times one vector, by torch's own linear, and nothing else."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    vectors = {size: torch.randn(1, 1, size) for size in {matrix.shape[1] for matrix in matrices}}

    def run() -> None:
        for matrix in matrices:
            F.linear(vectors[matrix.shape[1]], matrix)

    return run


if __name__ == "__main__":
    main()
