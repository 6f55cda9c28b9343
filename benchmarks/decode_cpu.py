"""Prefill and decoding beside Mistral's sliding cache, and decoding at 100M parameters beside the memory's bandwidth.

    python -m benchmarks.decode_cpu [--quick] [--record]

Both sides read the prompt in chunks, each of the size that serves it best, then decode greedily token by token under
inference_mode: ours by `decode_step`, Mistral by its forward with a DynamicCache, without `generate()` on either side.
The prompt is read once, in turns: a round is one segment of it by every candidate. A row is kept when it is measured,
and an interrupted run goes on after it.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, MistralForCausalLM

from benchmarks import measure, models, record
from benchmarks.rows import Rows
from swat_lm import SwatForCausalLM
from swat_lm.layers.base import InPlace
from swat_lm.model import cost

WIDTH, VOCABULARIES, BATCHES = 256, (256, 8192), (1, 16)
PROMPT, CHUNKS = 16384, (256, 512, 1024)
PEERS = ("mistral sdpa", "mistral eager")
# 98 million parameters without the input embedding's, which decoding does not read
LARGE_WIDTH, LARGE_LAYERS, LARGE_VOCABULARY = 768, 12, 16384


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    prompt: int = PROMPT
    segments: int = 8
    steps: int = 48
    rounds: int = 15


QUICK = Sizes(prompt=2048, segments=2, steps=16, rounds=3)


class Stream(Protocol):
    """B streams of one candidate."""

    def begin(self, batch: int) -> None:
        """Forget what was read; B streams from now on."""
        ...

    def read(self, tokens: Tensor, chunk: int) -> Tensor:
        """Go on with `[B, T]` of a prompt, in chunks; returns the logits after it, `[B, V]`."""
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

    def begin(self, batch: int) -> None:
        """An empty state."""
        self.state = self.model.init_state(batch)

    def read(self, tokens: Tensor, chunk: int) -> Tensor:
        """Go on with a prompt."""
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

    def begin(self, batch: int) -> None:
        """An empty cache, which takes any batch."""
        self.cache = DynamicCache(config=self.model.config)

    def read(self, tokens: Tensor, chunk: int) -> Tensor:
        """Go on with a prompt; of a chunk only the last place's logits are formed."""
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
    parser.add_argument("--record", action="store_true", help=record.HELP)
    arguments = parser.parse_args()
    if arguments.quick and arguments.record:
        parser.error("--record goes without --quick, whose results are not saved")
    torch.set_num_threads(arguments.threads)
    measure.require_green_tests(
        "tests/ops/test_step.py",
        "tests/model/test_conversion.py",
        "tests/model/test_streaming.py",
        "tests/model/test_decoding_plan.py",
    )
    sizes = QUICK if arguments.quick else Sizes()
    settings = {
        "width": WIDTH,
        "layers": models.LAYERS,
        "head_dim": models.HEAD_DIM,
        "window": models.WINDOW,
        "dtype": "float32",
        "prompt": sizes.prompt,
        "rounds": sizes.rounds,
        "steps_per_round": sizes.steps,
        "prefill_rounds": sizes.segments,
        "chunks_tried": list(CHUNKS),
    }
    tasks: dict[str, Callable[[], dict]] = {
        f"batch {batch}, vocabulary {vocabulary}": partial(against_mistral, batch, vocabulary, sizes)
        for vocabulary in VOCABULARIES
        for batch in BATCHES
    }
    tasks["100M parameters"] = partial(against_bandwidth, sizes)
    kept = None if arguments.quick else Rows("decode_cpu", settings)
    rows, goals = [], []
    with torch.inference_mode():
        for vocabulary in VOCABULARIES:
            check_same_function(vocabulary)
        for label, task in tasks.items():
            say(f"row {len(rows) + 1} of {len(tasks)}: {label}")
            row = task() if kept is None else kept.measured(label, task)
            report(row)
            if "decode times mistral" in row:
                goals.append(measure.goal(f"{label}: times Mistral's tokens/s", 2, row["decode times mistral"]))
                goals.append(measure.goal(f"{label}: times Mistral's prefill", 1, row["prefill times mistral"]))
            else:
                goals.append(measure.goal(f"{label}: share of the read bandwidth", 0.7, row["share of bandwidth"]))
            rows.append(row)
    for line in goals:
        say(f"{'reached' if line['reached'] else 'MISSED '}  {line['goal']}: {line['measured']}")
    if kept is not None:
        path = record.save("decode_cpu", rows, goals, settings)
        kept.forget()
        say(record.finish(path, arguments.record).rstrip())


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def report(row: dict) -> None:
    """Print one row as it is measured."""
    for key, value in row.items():
        say(f"  {key}: {value:.4g}" if isinstance(value, float) else f"  {key}: {value}")


def check_same_function(vocabulary: int, width: int = WIDTH, prompt: int = 3 * models.WINDOW + 5) -> None:
    """Our softmax window and Mistral, prefilled in unlike chunks and then stepped, give equal logits."""
    ours = OurStream(models.softmax_window(width, vocabulary))
    tokens = models.random_tokens(2, prompt + 4, vocabulary)
    for attention in ("sdpa", "eager"):
        peer = MistralStream(models.mistral(width, vocabulary, attention))
        ours.begin(2)
        peer.begin(2)
        expected = peer.read(tokens[:, :prompt], 100)
        models.check_equal("prefill", ours.read(tokens[:, :prompt], 150), expected)
        for token in tokens[:, prompt:].split(1, dim=1):
            models.check_equal("a decoding step", ours.step(token), peer.step(token))


def against_mistral(batch: int, vocabulary: int, sizes: Sizes, width: int = WIDTH) -> dict:
    """Prefill and decoding of B streams in turns with Mistral, by the better of its attentions."""
    ours = OurStream(models.swat(width, vocabulary))
    streams: dict[str, Stream] = {
        "swat": ours,
        "softmax window": OurStream(models.softmax_window(width, vocabulary)),
        "mistral sdpa": MistralStream(models.mistral(width, vocabulary, "sdpa")),
        "mistral eager": MistralStream(models.mistral(width, vocabulary, "eager")),
    }
    tokens = models.random_tokens(batch, sizes.prompt, vocabulary)
    say("  choosing chunk sizes and the better of Mistral's attentions")
    chunks, reading = {}, {}
    for name, stream in streams.items():
        chunks[name], reading[name] = best_chunk(stream, tokens)
    first_steps = measure.take_turns({name: partial(decode, streams[name], tokens[:, -1:], 8) for name in PEERS}, 5)
    prefill_peer = min(PEERS, key=lambda name: reading[name])
    decode_peer = min(PEERS, key=lambda name: first_steps[name].median)
    streams = {
        name: stream for name, stream in streams.items() if name not in PEERS or name in (prefill_peer, decode_peer)
    }
    say("  reading the prompt")
    prefills = read_in_turns(streams, tokens, chunks, sizes.segments)
    say("  decoding")
    # every stream now stands after the whole prompt, and goes on from round to round
    stepping: dict[str, Callable[[], None]] = {
        name: partial(decode, stream, tokens[:, -1:], sizes.steps) for name, stream in streams.items()
    }
    stepping["products"] = products(ours.model, batch, sizes.steps)
    stepping["products and rings"] = products(ours.model, batch, sizes.steps, ours.state.step_pasts())
    decodes = measure.take_turns(stepping, sizes.rounds)
    row: dict = {"batch": batch, "vocabulary": vocabulary, "prompt": sizes.prompt}
    shown = {"swat": ("swat", "swat"), "softmax window": ("softmax window", "softmax window")}
    for name, (reader, stepper) in {**shown, "mistral": (prefill_peer, decode_peer)}.items():
        row |= {
            f"{name} prefill tokens/s": batch * sizes.prompt / sizes.segments / prefills[reader].median,
            f"{name} chunk": chunks[reader],
            f"{name} tokens/s": batch * sizes.steps / decodes[stepper].median,
            f"{name} ms per step": decodes[stepper].median / sizes.steps * 1e3,
            f"{name} state bytes": streams[stepper].num_bytes(),
        }
    for label, name in (("", "swat"), ("softmax ", "softmax window")):
        row[f"{label}prefill times mistral"] = prefills[name].times_faster_than(prefills[prefill_peer])
        row[f"{label}decode times mistral"] = decodes[name].times_faster_than(decodes[decode_peer])
    for alone in ("products", "products and rings"):
        row[f"swat ms per step, {alone} alone"] = decodes[alone].median / sizes.steps * 1e3
    row["times mistral, were nothing else to do"] = decodes["products and rings"].times_faster_than(
        decodes[decode_peer]
    )
    return row | {"best prefill peer": prefill_peer, "best decode peer": decode_peer}


def best_chunk(stream: Stream, tokens: Tensor) -> tuple[int, float]:
    """The chunk size with which a stream reads fastest beyond its first window, and its seconds for as many tokens."""
    sample = tokens[:, : max(CHUNKS)]
    sizes = [size for size in CHUNKS if size <= sample.shape[1]]
    stream.begin(tokens.shape[0])
    stream.read(tokens[:, : models.WINDOW], models.WINDOW)
    timings = measure.take_turns({str(size): partial(stream.read, sample, size) for size in sizes}, 2, warm_up=False)
    return min(((size, min(timings[str(size)].seconds)) for size in sizes), key=lambda found: found[1])


def read_in_turns(
    streams: dict[str, Stream], tokens: Tensor, chunks: dict[str, int], rounds: int
) -> dict[str, measure.Timing]:
    """Every stream reads the whole prompt from its beginning, one segment a round; seconds of the segments."""

    def segments(stream: Stream, chunk: int) -> Iterator[Tensor]:
        for part in tokens.chunk(rounds, dim=1):
            yield stream.read(part, chunk)

    reading = {}
    for name, stream in streams.items():
        stream.begin(tokens.shape[0])
        reading[name] = partial(next, segments(stream, chunks[name]))
    return measure.take_turns(reading, rounds, warm_up=False)


def decode(stream: Stream, token: Tensor, steps: int) -> None:
    """Go on greedily for a number of tokens."""
    for _ in range(steps):
        token = stream.step(token).argmax(dim=-1, keepdim=True)


def against_bandwidth(
    sizes: Sizes, width: int = LARGE_WIDTH, layers: int = LARGE_LAYERS, vocabulary: int = LARGE_VOCABULARY
) -> dict:
    """Batch 1 at 100M parameters: bytes a token has to read, over time, against how fast the same memory can be read.

    The read bandwidth is the best of several ways over a buffer of as many bytes. What the products with the weights
    reach alone, as decoding does them and as torch's linear does them one by one, is given beside it.
    """
    stream = OurStream(models.swat(width, vocabulary, layers))
    model = stream.model
    tokens = models.random_tokens(1, min(sizes.prompt, 4 * models.WINDOW), vocabulary)
    stream.begin(1)
    stream.read(tokens, 256)
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
            "plain products": plain_products(width, models.feed_forward_width(width), layers, vocabulary),
            **readers,
        },
        3 * sizes.rounds,
    )
    best = min(readers, key=lambda name: timings[name].median)
    return {
        "parameters": cost.count_parameters(model.config).total,
        "bytes per token": num_bytes,
        "state bytes": stream.num_bytes(),
        "ms per token": timings["decode"].median * 1e3,
        "GB/s": num_bytes / timings["decode"].median / 1e9,
        "best reader": best,
        **{f"{name} GB/s": num_bytes / timings[name].median / 1e9 for name in readers},
        "products GB/s": num_bytes / timings["products"].median / 1e9,
        "plain products GB/s": num_bytes / timings["plain products"].median / 1e9,
        "share of bandwidth": timings["decode"].times_faster_than(timings[best]),
        "share of the products' rate": timings["decode"].times_faster_than(timings["products"]),
    }


def products(
    model: SwatForCausalLM, batch: int = 1, steps: int = 1, pasts: Sequence[InPlace] = ()
) -> Callable[[], None]:
    """Every weight matrix times B vectors as `decode_step` does it, and nothing else, for a number of tokens.

    With the layers' pasts also the two products of a query with its ring's keys and of weights with its values.
    """
    plan = model._decoding_plan
    assert plan is not None
    assert plan.head is not None
    matrices = [matrix for layer in plan.layers if layer is not None for matrix in layer.matrices()] + [plan.head]
    vectors = {size: torch.randn(batch, size) for size in {matrix.whole.shape[0] for matrix in matrices}}
    rings = [
        (
            past.kept["key"].transpose(1, 2).flatten(0, 1).transpose(1, 2),
            past.kept["value"].transpose(1, 2).flatten(0, 1),
        )
        for past in pasts
    ]
    queries = [torch.randn(values.shape[0], 1, values.shape[2]) for _, values in rings]

    def run() -> None:
        for _ in range(steps):
            for matrix in matrices:
                matrix.times(vectors[matrix.whole.shape[0]])
            for query, (keys, values) in zip(queries, rings, strict=True):
                torch.bmm(torch.bmm(query, keys), values)

    return run


def plain_products(width: int, feed_forward: int, layers: int, vocabulary: int) -> Callable[[], None]:
    """The same with matrices as they are before they are laid out, one by one, by torch's linear."""
    shapes = [*[(width, width)] * 4, *[(feed_forward, width)] * 2, (width, feed_forward)] * layers
    matrices = [torch.randn(shape) for shape in [*shapes, (vocabulary, width)]]
    vectors = {size: torch.randn(1, size) for size in (width, feed_forward)}

    def run() -> None:
        for matrix in matrices:
            F.linear(vectors[matrix.shape[1]], matrix)

    return run


if __name__ == "__main__":
    main()
