"""Which calls are compared with the definition: those made on a GPU, one for every shipped tile, and random ones."""

import itertools
import math
import random
from typing import Any, NamedTuple

import torch

from tests.ops.triton.calls import Call
from tests.ops.triton.steps import Step

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = (32, 64, 96, 128, 256)
FORMS = ("two kernels", "five products")
# B, T, S, H, K, D
SHAPES = [(2, 300, 300, 4, 2, 64), (1, 130, 517, 4, 1, 128), (2, 1, 90, 2, 2, 32), (1, 257, 257, 3, 3, 80)]
WIDE = (1, 1300, 1300, 2, 1)
CAPABILITIES = ((9, 0), (8, 0), (8, 6), (12, 0))


class Case(NamedTuple):
    """A call or a step, and the GPU that it is made on."""

    call: Any
    capability: tuple[int, int] = (9, 0)
    # tiles are those of wide windows
    wide: bool = False

    def __str__(self) -> str:
        return f"{self.call}, capability {self.capability}{', wide' if self.wide else ''}"


def against_the_definition(shape: tuple, form: str, score_function: str, dtype: torch.dtype) -> list[Call]:
    """Windows with every kind of edge, and visibility of one's own."""
    call = Call(shape, None, dtype, score_function, form=form)
    windows = [call.replace(window=window) for window in (1, 64, 100, None)]
    return windows + [call.replace(window=70, visible=visible) for visible in ("first", "last", "both")]


def wide_windows(head_dim: int, precision: str, dtype: torch.dtype) -> list[Call]:
    """Both precisions, in tiles of wide windows and of narrow ones."""
    return [Call((*WIDE, head_dim), window, dtype, precision=precision) for window in (1024, 200)]


def rotary_and_skipping(head_dim: int, form: str) -> list[Call]:
    """What the kernels do besides attention."""
    shape, longer = (2, 300, 300, 4, 2, head_dim), (1, 600, 600, 4, 2, head_dim)
    steep = (-0.5, 0.5, -2.0, 0.0625)
    return [
        Call(shape, 100, rotary="shared", form=form),
        Call(shape, 100, rotary="own", visible="documents", form=form),
        Call(longer, 500, torch.float32, slopes=steep, skip_saturated=True, form=form),
        Call(longer, 500, slopes=steep, score_bias=0.0, skip_saturated=True, form=form),
    ]


def of_every_tile() -> list[Case]:
    """Calls long enough for tiles of every kind: masked at either edge, and seen by all their rows."""
    cases = []
    for capability, head_dim, (length, window, wide) in itertools.product(
        ((9, 0), (8, 0)), (64, 128, 256), ((230, 120, False), (390, 270, False), (390, 270, True))
    ):
        call = Call((1, length, length, 1, 1, head_dim), window, score_bias=0.0, form=FORMS[0])
        calls = [call, call.replace(form=FORMS[1], dtype=torch.float16, visible="documents")]
        if head_dim < 256:
            softmax = call.replace(score_function="softmax")
            calls += [softmax, softmax.replace(form=FORMS[1]), call.replace(rotary="shared")]
        cases += [Case(c, capability, wide) for c in calls]
    exact = Call((1, 130, 130, 1, 1, 64), 90, torch.float32, form=FORMS[0])
    cases += [Case(exact), Case(exact.replace(form=FORMS[1])), Case(exact.replace(shape=(1, 70, 70, 1, 1, 256)))]
    return cases


def at_random(seed: int) -> Case:
    """Draw from the whole contract."""
    draw = random.Random(seed)
    choose = lambda *choices: draw.choice(choices)  # noqa: E731
    heads = choose((1, 1), (2, 1), (2, 2), (4, 2), (3, 1), (3, 3))
    head_dim = choose(2, 7, 16, 24, 32, 48, 64, 64, 80, 96, 128, 128, 160, 256)
    num_queries = choose(1, draw.randint(2, 20), draw.randint(21, 200), draw.randint(21, 200), draw.randint(200, 420))
    visible = choose(None, None, None, None, "first", "last", "both", "documents", "padding")
    num_keys = num_queries + choose(0, 0, draw.randint(1, 150))
    if visible in ("last", "both") and choose(True, False):
        num_keys = draw.randint(1, num_queries)
    multiple = choose(16, 32, 64, 128) * choose(1, 1, 2)
    window = choose(
        None, 1, 2, draw.randint(1, num_keys), multiple, multiple + choose(-1, 1),
        max(1, num_keys + choose(-1, 0, 1)), 10**12,
    )  # fmt: skip
    dtype = choose(torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)
    score_function = choose("sigmoid", "sigmoid", "sigmoid", "softmax")
    rotates = num_keys == num_queries and visible not in ("last", "both") and head_dim % 2 == 0
    call = Call(
        (choose(1, 1, 2), num_queries, num_keys, *heads, head_dim), window, dtype, score_function,
        slopes=choose(None, (), (), tuple(_slope(draw) for _ in range(heads[0]))),
        score_bias=choose(None, None, 0.0, 0.0, -math.log(min(window or num_keys, num_keys)), -1.5, 5.0),
        scale=choose(None, None, None, 0.05, -0.2, 1.0), visible=visible,
        precision=choose("auto", "exact", *(("fast",) if dtype != torch.float32 else ())),
        skip_saturated=score_function == "sigmoid" and choose(True, False, False),
        rotary=choose(None, "shared", "own") if rotates else None,
        return_lse=score_function == "softmax" and choose(True, False),
        layout=choose("fresh", "heads first", "channels apart", "joined"), form=choose(None, *FORMS), seed=seed,
    )  # fmt: skip
    return Case(call, choose(*CAPABILITIES), choose(True, False))


def step_at_random(seed: int) -> Step:
    """Draw a step of decoding from the whole contract."""
    draw = random.Random(seed)
    choose = lambda *choices: draw.choice(choices)  # noqa: E731
    heads = choose((1, 1), (2, 1), (2, 2), (6, 2), (7, 1), (16, 1), (17, 1), (32, 1))
    window = choose(1, 2, draw.randint(3, 70), draw.randint(70, 400), choose(64, 128, 256) + choose(-1, 0, 1))
    positions = tuple(choose(0, draw.randrange(window), window - 1, window, draw.randrange(5 * window)) for _ in "123")
    return Step(
        (draw.randint(3, 5), window, *heads, choose(2, 8, 16, 24, 64, 80, 128, 256)),
        choose(*DTYPES), choose("sigmoid", "softmax"), choose(None, 1, 2, 3, 7), choose(True, False),
        choose(True, False), choose(None, (), tuple(_slope(draw) for _ in range(heads[0]))),
        choose(None, 0.0, -3.0), choose(None, 0.05, 1.0), positions, seed,
    )  # fmt: skip


def _slope(draw: random.Random) -> float:
    return draw.choice((0.0, 0.3, 2.0, 50.0, 2.0 ** -draw.randint(1, 8))) * draw.choice((-1, 1))
