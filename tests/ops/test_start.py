"""What docs/mathematics.md says of the start: its table from its formulas, and the order of losses from its rule."""

import math
import re
from pathlib import Path

import pytest
import torch

from swat_lm.ops.slopes import slopes_for

WINDOW, HEADS, BIAS = 64, 4, -math.log(64)
PAGE = (Path(__file__).parents[2] / "docs" / "mathematics.md").read_text(encoding="utf-8")


def start(slopes: torch.Tensor, window: int, bias: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """S, G and n of every head, from the weights themselves."""
    weights = torch.sigmoid(slopes.double()[:, None] * torch.arange(window) + bias)
    answers = weights * (1 - weights)
    return weights.sum(1), answers.sum(1), answers.sum(1).square() / answers.square().sum(1)


def rows() -> list[tuple[str, str, str, list[float]]]:
    """Of the table: kind, schedule, span, and the numbers R, n, and the loss."""
    section = PAGE.split("## 18. ")[1]
    found = re.findall(r"^\| `(\w+)` \| (?:`(\w+)`)?,? ?([\d.]*) \| (.+?) \|$", section, re.MULTILINE)
    return [(kind, schedule, span, [float(x) for x in rest.split(" | ")[-3:]]) for kind, schedule, span, rest in found]


def of_row(kind: str, schedule: str, span: str) -> tuple[torch.Tensor, float, float]:
    """Sums by head, R and n of a row's slopes."""
    slopes = slopes_for(HEADS, kind, schedule or "swat", WINDOW, float(span or 16))
    sums, gradients, reach = start(torch.zeros(HEADS) if slopes is None else slopes, WINDOW, BIAS)
    return sums, float(gradients.sum() / sums.sum()), float(reach.mean())


def test_the_table_holds_what_the_formulas_give():
    assert len(rows()) == 9
    for kind, schedule, span, (selectivity, reach, _) in rows():
        sums, expected_selectivity, expected_reach = of_row(kind, schedule, span)
        assert (f"{selectivity:.3f}", f"{reach:.1f}") == (f"{expected_selectivity:.3f}", f"{expected_reach:.1f}")
        assert " ".join(f"{each:.2f}" for each in sums) in PAGE


def test_losses_are_in_the_order_that_the_page_says():
    measured = [(*of_row(kind, schedule, span)[1:], numbers[-1]) for kind, schedule, span, numbers in rows()]
    threshold = of_row("none", "", "")[1]
    saturated = sorted(row for row in measured if row[0] < threshold)
    selective = sorted((row for row in measured if row[0] >= threshold), key=lambda row: row[2])
    assert (len(saturated), len(selective)) == (3, 6)
    # the lower the selectivity, the higher the loss, and above all that are selective
    losses = [loss for *_, loss in saturated]
    assert losses == sorted(losses, reverse=True)
    assert min(losses) > selective[-1][-1]
    # among the others by how far, in powers of two, the reach is from a quarter of the window
    assert selective == sorted(selective, key=lambda row: abs(math.log2(row[1] / (WINDOW / 4))))


def test_biases_are_in_the_order_of_their_selectivity():
    slopes = slopes_for(HEADS, "negative", "swat", WINDOW)
    assert slopes is not None
    sum_to_one = -(slopes.double()[:, None] * torch.arange(WINDOW)).logsumexp(dim=1, keepdim=True)
    found = []
    for bias in (torch.zeros(1), sum_to_one, torch.tensor([BIAS])):
        weights = torch.sigmoid(slopes.double()[:, None] * torch.arange(WINDOW) + bias)
        found.append(float((weights * (1 - weights)).sum() / weights.sum()))
    section = " ".join(PAGE.split("## 18. ")[1].split())
    said = re.findall(r"`R = ([\d.]+)` and (?:came to )?([\d.]+\d)", section)
    assert [selectivity for selectivity, _ in said] == [f"{each:.3f}" for each in found[:2]]
    losses = [float(loss) for _, loss in said] + [rows()[-1][-1][-1]]
    assert found == sorted(found)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("slope", [-0.5, -0.125, -0.03, 0.25, 0.5])
@pytest.mark.parametrize("window", [64, 512])
def test_the_integrals_are_near_the_sums(slope: float, window: int):
    bias = -math.log(window)
    (total,), (gradient,), (reach,) = start(torch.tensor([slope]), window, bias)
    size = abs(slope)
    if slope < 0:
        assert total == pytest.approx(math.log1p(math.exp(bias)) / size, rel=0.3)
        assert gradient / total > 0.98
        assert reach == pytest.approx(2 / size * math.tanh(size * window / 2), rel=0.1)
    else:
        assert total == pytest.approx(window + bias / size, rel=0.02)
        assert gradient / total == pytest.approx(1 / (size * window + bias), rel=0.1)
