"""Layers of hybrids, forward and backward: Taipan's two executions, and Mamba-2 beside the torch paths of transformers.

    python -m benchmarks.hybrids_cpu [--quick] [--lengths 2048] [--record]

One layer of width 256 in fp32, batch 1, on one thread and by its processor's seconds. Taipan's chosen tokens are drawn
by chance, so that their share is what is asked for. Of Mamba-2 transformers' path is taken at each chunk size that fits
its memory, and the best counts; the mixers of its hybrids stand beside ours in `benchmarks/hybrid_peers.py`. Growth is
the exponent between the two lengths: of seconds, or bytes, that go as T to the power of it.
"""

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Block

from benchmarks import measure
from benchmarks.hybrid_peers import PEERS, compare_peer
from benchmarks.layer_steps import WIDTH, LayerStep, Row, Script, built, growth, peak, take_turns
from swat_lm.layers import Layer

WINDOW, STATE = 1024, 128
SHARES, CHUNKS = (0.5, 0.25, 0.15, 0.1), (8, 16, 32, 64, 128)
# of transformers' largest intermediate tensor, of which its backward keeps several
LARGEST = 2**30


def taipan(execution: str, share: float) -> Layer:
    """Selective attention for a share of the tokens."""
    entry = {"kind": "taipan", "selection": "random", "capacity": share, "execution": execution}
    return built(entry, sliding_window=WINDOW, score_function="softmax", slopes="none")


def theirs(chunk: int) -> nn.Module:
    """A block of transformers' Mamba2 with the same sizes."""
    return Mamba2Block(
        Mamba2Config(
            hidden_size=WIDTH, num_heads=2 * WIDTH // 64, head_dim=64, state_size=STATE, n_groups=1, chunk_size=chunk,
            expand=2, num_hidden_layers=1,
        ),
        layer_idx=0,
    )  # fmt: skip


def compare_executions(share: float, lengths: tuple[int, ...], rounds: int) -> list[Row]:
    """A row for each length."""
    rows, seconds, bytes_ = [], {}, {}
    for length in lengths:
        steps: dict[str, Callable[[], None]] = {
            name: LayerStep(taipan(name, share), length) for name in ("dense", "sparse")
        }
        timings = take_turns(steps, rounds)
        seconds[length] = timings["sparse"].median
        bytes_[length] = peak("hybrids_cpu", f"taipan('sparse', {share})", length)
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


def compare_recurrences(lengths: tuple[int, ...], rounds: int) -> list[Row]:
    """A row for each length."""
    rows, seconds = [], {}
    for length in lengths:
        heads = 2 * WIDTH // 64
        fitting = [chunk for chunk in CHUNKS if 4 * length * chunk * heads * STATE <= LARGEST]
        steps: dict[str, Callable[[], None]] = {
            "ours": LayerStep(built({"kind": "mamba2", "state_size": STATE}), length)
        }
        steps |= {f"chunk {chunk}": LayerStep(theirs(chunk), length) for chunk in fitting}
        timings = take_turns(steps, rounds)
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


def beside_peer(name: str, length: int, rounds: int, steps: int) -> list[Row]:
    """A row for a mixer of transformers' hybrids."""
    return [compare_peer(name, WIDTH, length, rounds, steps)]


def judge(rows: list[Row]) -> list[Row]:
    """Of our layers."""
    found = []
    for row in rows:
        where = f"T {row['length']}"
        if row.get("layer") == "mamba2":
            what = f"Mamba-2, {where}: times transformers' torch path"
            found.append(measure.goal(what, 3.0, row["times transformers"]))
        elif row.get("share", 1.0) <= 0.25:
            what = f"Taipan, {where}, {100 * row['share']:.0f} % chosen: sparse times dense"
            found.append(measure.goal(what, 1.0, row["sparse times dense"]))
    return found


def tasks(lengths: tuple[int, ...], quick: bool) -> Mapping[str, Callable[[], list[Row]]]:
    """Each share of tokens, the recurrence, and the mixers of hybrids at the shortest length."""
    rounds, steps = (3, 10) if quick else (5, 80)
    found: dict[str, Callable[[], list[Row]]] = {
        f"taipan {share}": partial(compare_executions, share, lengths, rounds) for share in SHARES
    }
    found["mamba2"] = partial(compare_recurrences, lengths, rounds)
    return found | {name: partial(beside_peer, name, lengths[0], rounds, steps) for name in PEERS}


main = Script(
    "hybrids_cpu", __doc__,
    (
        "tests/layers/test_taipan.py", "tests/layers/test_mamba2_peers.py", "tests/ops/test_state_space.py",
        "tests/ops/test_mamba2.py",
    ),
    {"window": WINDOW, "state size": STATE, "batch": 1}, (2048, 16384), tasks, judge, quick_lengths=(2048,),
).main  # fmt: skip

if __name__ == "__main__":
    main()
