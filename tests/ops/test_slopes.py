"""Slope schedules: values by the papers, sides by the split, errors by name. Signs are tested in test_backends.py."""

import pytest

from swat_lm.ops.slopes import slopes_for


def test_the_papers_values():
    assert slopes_for(6, "balanced").tolist() == [-0.5, -0.25, -0.125, 0.5, 0.25, 0.125]
    assert slopes_for(3, "negative").tolist() == [-0.5, -0.25, -0.125]
    assert slopes_for(3, "positive").tolist() == [0.5, 0.25, 0.125]
    assert slopes_for(4, "3:1").tolist() == [-0.5, -0.25, -0.125, 0.5]
    assert slopes_for(3, "0:3").tolist() == slopes_for(3, "positive").tolist()
    assert slopes_for(5, "none") is None


def test_an_odd_head_goes_to_the_negative_side():
    assert slopes_for(5).tolist() == [-0.5, -0.25, -0.125, 0.5, 0.25]
    assert slopes_for(1).tolist() == [-0.5]


def test_alibis_own_schedule_on_each_side():
    assert slopes_for(8, "negative", "alibi").tolist() == [-(2.0**-k) for k in range(1, 9)]
    # ALiBi's published slopes for 12 heads: those of 8, then every other one of 16
    expected = [2.0**-k for k in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    assert slopes_for(12, "positive", "alibi").tolist() == pytest.approx(expected)
    assert slopes_for(4, "balanced", "alibi").tolist() == [-(2.0**-4), -(2.0**-8), 2.0**-4, 2.0**-8]


def test_slopes_by_the_window():
    assert slopes_for(3, "negative", "window", 64).tolist() == [-1.0, -0.25, -0.0625]
    assert slopes_for(3, "negative", "window", 64, 16.0).tolist() == [-0.25, -0.125, -0.0625]
    assert slopes_for(4, "3:1", "window", 128, 32.0).tolist() == [-0.25, -0.125, -0.0625, 0.25]
    # from a / window to b / window in equal ratios, over any number of heads
    assert slopes_for(3, "negative", "window", 16, (16, 1)).tolist() == [-1.0, -0.25, -0.0625]
    assert slopes_for(1, "negative", "window", 16, [8, 1]).tolist() == [-0.5]
    assert slopes_for(4, "2:2", "window", 16, 16, (1, 0.25)).tolist() == [-1.0, -0.5, 0.0625, 0.015625]
    # the oldest key of the window pays the same whatever the window
    paid = [slopes_for(8, "negative", "window", window) * window for window in (16, 1024)]
    assert paid[0].tolist() == paid[1].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, "3:2"), "the split '3:2' names 5 heads, the layer has 4"),
        ((4, "both"), "expected one of balanced, negative, positive, none or a split"),
        ((0, "balanced"), "num_heads: expected at least 1, got 0"),
        ((4, "balanced", "linear"), "schedule: expected one of swat, alibi, window; got 'linear'"),
        ((4, "negative", "window"), "slope_schedule: 'window' divides by the layer's window, and it has none"),
        ((4, "negative", "window", 8, -1.0), "slope_span: expected a positive number, or two as .*; got -1.0"),
        ((4, "negative", "window", 8, [1, 2, 3]), "slope_span: expected a positive number, or two"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        slopes_for(*arguments)
