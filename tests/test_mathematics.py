"""Drawings and tables of docs/mathematics.md against the code that they explain."""

import math
import re

import pytest
import torch

from swat_lm.model import cost
from swat_lm.model.recipe_fields import config_from_recipe
from swat_lm.ops.bands import Band
from swat_lm.ops.reference import distances
from swat_lm.ops.segments import documents_of
from swat_lm.ops.slopes import slopes_for
from swat_lm.ops.state_space import state_space_scan
from tests.docs_modules import ROOT

MATHEMATICS = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")


def draw(num_queries: int, num_keys: int, window: int, first=None, last=None) -> tuple[list[str], list[str]]:
    """Rows of the picture of visible keys and of that of distances."""
    first, last = (None if x is None else torch.tensor([x], dtype=torch.int32) for x in (first, last))
    distance, visible = distances(1, num_queries, num_keys, first, last, window, torch.device("cpu"))
    seen = [" ".join(str(int(one)) for one in row) for row in visible[0]]
    far = [
        " ".join(str(int(d)) if v else "." for d, v in zip(*rows, strict=True))
        for rows in zip(distance[0], visible[0], strict=True)
    ]
    return seen, far


def beside(left: list[str], right: list[str], gap: int) -> str:
    return "".join(f"    {a}{' ' * gap}{b}\n" for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("arguments", [(5, 5, 3), (2, 5, 3), (3, 5, 2, None, [0, 2, 3])], ids=str)
def test_drawn_windows(arguments):
    assert beside(*draw(*arguments), gap=8) in MATHEMATICS


def test_drawn_documents_and_padding():
    packed, _ = draw(5, 5, 3, first=[0, 0, 2, 2, 2])
    padded, _ = draw(5, 5, 3, first=[2, 2, 2, 2, 2])
    assert beside(packed, padded, gap=8) in MATHEMATICS


def test_drawn_biases():
    distance, visible = distances(1, 5, 5, None, None, 3, torch.device("cpu"))
    pictures = []
    for slope in (-0.5, 0.5):
        bias = slope * distance[0] + 0.0
        rows = zip(bias, visible[0], strict=True)
        pictures.append([" ".join(f"{b:4.1f}" if v else "   ." for b, v in zip(*row, strict=True)) for row in rows])
    assert beside(*pictures, gap=8) in MATHEMATICS


def test_drawn_rings():
    window, columns = 4, []
    for position in (2, 5):
        held = {place: position - (position - place) % window for place in range(window)}
        rows = [f"position {position}", "place      " + " ".join(map(str, range(window)))]
        rows.append("holds      " + " ".join(str(one) if one >= 0 else "-" for one in held.values()))
        far = [str(position - one) if one >= 0 else "." for one in held.values()]
        columns.append([*rows, "distance   " + " ".join(far)])
    lines = "".join(f"    {a:<32}{b}\n" for a, b in zip(*columns, strict=True))
    assert lines in MATHEMATICS


def test_drawn_decays():
    pictures = []
    logs = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    ones = torch.ones_like(logs)
    for segments in (None, torch.tensor([[0, 0, 1, 1]])):
        # what entered at token s is the s-th number of a value
        output, _ = state_space_scan(
            ones.view(1, 4, 1, 1), ones.view(1, 4, 1, 1), torch.eye(4, dtype=torch.float64)[None, :, None],
            logs.view(1, 4, 1), ones.view(1, 4, 1), segments=segments,
        )  # fmt: skip
        exponents = output[0, :, 0].log()
        pictures.append([" ".join(f"{x:2.0f}" if x > -math.inf else " ." for x in row.tolist()) for row in exponents])
    assert beside(*[[row.replace("-0", " 0") for row in picture] for picture in pictures], gap=8) in MATHEMATICS


def test_drawn_segments():
    rows = [re.search(rf"^    {name} +(.+)$", MATHEMATICS, re.MULTILINE) for name in ("segments", "real", "document")]
    examples = zip(*(re.split(r"  +", row[1]) for row in rows if row is not None), strict=True)
    for segments, real, document in (
        [torch.tensor([[int(one) for one in text.split()]]) for text in example] for example in examples
    ):
        assert torch.equal(documents_of(segments, real != 0), document)


@pytest.mark.parametrize("num_heads", [2, 3, 4, 8, 12])
def test_slope_table(num_heads: int):
    slopes = slopes_for(num_heads)
    assert slopes is not None
    shown = ", ".join(f"{'-' if slope < 0 else '+'}1/{round(1 / abs(slope))}" for slope in slopes.tolist())
    assert f"| {num_heads} | {shown} |\n" in MATHEMATICS


def test_how_far_a_head_sees():
    row = re.search(r"^\| distance \| (.+) \|$", MATHEMATICS, re.MULTILINE)
    assert row is not None
    for exponent, shown in enumerate(map(int, row[1].split(" | ")), 1):
        assert shown == round(math.log(99) * 2**exponent)
        weight = torch.sigmoid(torch.tensor(-(2.0**-exponent) * shown))
        assert 0.0095 < weight < 0.0115


@pytest.mark.parametrize("name", ["swat-248m", "swat-340m", "swat-760m"])
def test_cost_table(name: str):
    config = config_from_recipe({"preset": name})
    row = (
        f"| {name} | {cost.count_parameters(config).total:,} | {cost.reach(config):,} "
        f"| {cost.training_flops_per_token(config, 4096):.3g} | {cost.state_bytes(config):,} bytes |"
    )
    assert row in MATHEMATICS


@pytest.mark.parametrize("window", [64, 128, 256, 1024])
def test_executed_over_useful(window: int):
    band = Band.of(8192, 8192, window, torch.device("cpu"))
    assert band.width == band.rows * (1 + math.ceil((window - 1) / band.rows))
    assert f"| {window} | {band.rows} | {band.width} | {band.width / window:.2f} |" in MATHEMATICS


def test_formula_of_pairs():
    for tokens, window in ((16, 5), (16, 16), (40, 7)):
        assert cost.visible_pairs(tokens, window) == tokens * window - window * (window - 1) // 2
