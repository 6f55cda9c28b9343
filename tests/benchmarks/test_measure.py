import pytest

from benchmarks import measure
from benchmarks.measure import DoesNotFitError, Timing, peak_memory, take_turns


def test_every_round_has_another_order_and_a_warm_up_comes_first():
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = take_turns(candidates, rounds=3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert list(timings) == ["a", "b", "c"]
    assert all(len(timing.seconds) == 3 and min(timing.seconds) > 0 for timing in timings.values())


def test_no_warm_up_where_the_caller_has_done_it():
    calls: list[str] = []
    take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=1, warm_up=False)
    assert calls == ["a", "b"]


def test_ratio_is_taken_round_by_round():
    # the machine is three times slower in the middle round, for both
    ours, peer = Timing((1.0, 3.0, 1.1)), Timing((2.0, 6.0, 2.2))
    assert ours.times_faster_than(peer) == pytest.approx(2.0)
    assert ours.median == 1.1


def test_ratio_refuses_unequal_rounds():
    with pytest.raises(ValueError, match="shorter"):
        Timing((1.0, 1.0)).times_faster_than(Timing((1.0,)))


def test_peak_memory_counts_what_is_taken_after_the_mark():
    # written to, since pages that are only asked for are not resident
    peak = peak_memory("x = b'1' * (20 * 2**20)\nmark()\ny = b'2' * (60 * 2**20)\n")
    assert 58 * 2**20 < peak < 80 * 2**20


def test_peak_memory_names_what_does_not_fit():
    with pytest.raises(DoesNotFitError, match="more memory than 1 GiB"):
        peak_memory("mark()\nx = bytearray(2 * 2**30)\n", limit=2**30)


def test_peak_memory_shows_other_failures():
    with pytest.raises(RuntimeError, match="ZeroDivisionError") as failure:
        peak_memory("1 / 0")
    assert not isinstance(failure.value, DoesNotFitError)


def test_goals_are_decided_by_the_numbers():
    assert measure.goal("x", 2, 2.0)["reached"] is True
    assert measure.goal("x", 2, 1.9996)["reached"] is False
