import itertools
import math

import pytest

from swat_lm.recipe import TrainRecipe
from swat_lm.train.schedule import learning_rate


def rates(**fields):
    train = TrainRecipe(learning_rate=2.0, **fields)
    return [learning_rate(step, train) for step in range(train.steps)]


def test_warm_up_is_linear_and_reaches_the_top():
    assert rates(steps=10, warmup_steps=4, schedule="constant") == [0.5, 1.0, 1.5, *[2.0] * 7]


def test_cosine_ends_at_the_final_ratio_and_is_half_way_in_the_middle():
    found = rates(steps=110, warmup_steps=10, final_learning_rate_ratio=0.1)
    assert max(found) == found[9] == 2.0
    assert found[-1] == pytest.approx(0.2)
    assert found[59] == pytest.approx((2.0 + 0.2) / 2)
    # a quarter of the way: cos(pi/4)
    assert found[34] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert all(before > after for before, after in itertools.pairwise(found[9:]))


def test_warmup_stable_decay():
    found = rates(steps=20, warmup_steps=5, schedule="wsd", decay_steps=10, final_learning_rate_ratio=0.0)
    assert found[4:10] == [2.0] * 6
    assert found[10:] == pytest.approx([2.0 * (9 - i) / 10 for i in range(10)])


def test_longer_run_has_the_same_start_under_warmup_stable_decay():
    short = rates(steps=20, warmup_steps=5, schedule="wsd", decay_steps=5)
    long = rates(steps=40, warmup_steps=5, schedule="wsd", decay_steps=5)
    assert short[:15] == long[:15]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_run_of_warm_up_only(schedule):
    assert rates(steps=3, warmup_steps=3, schedule=schedule)[-1] == 2.0


def test_rate_stays_final_after_the_last_step():
    train = TrainRecipe(steps=10, warmup_steps=0, learning_rate=1.0, final_learning_rate_ratio=0.25)
    assert learning_rate(9, train) == learning_rate(50, train) == pytest.approx(0.25)
