"""Requests share slots: by examples, and for every policy whatever happens."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from swat_lm.serve.requests import Fork, Limits, Piece, Request, RequestError, Row, Step
from swat_lm.serve.scheduler import SCHEDULERS, Choice, FirstCome, Scheduler
from tests.serve.any_engine import Engine

LIMITS = Limits(num_slots=3, token_budget=11, prefill_chunk=4, most_waiting=4)


def scheduler(*requests: Request, **limits: Any) -> FirstCome:
    made = FirstCome(replace(LIMITS, **limits))
    for request in requests:
        made.add(request)
    return made


def run(made: Scheduler) -> Iterator[Step]:
    """Steps that go well, until nothing is left to do."""
    while step := made.plan():
        yield step
        made.report()


def keys(step: Step) -> str:
    """Whose pieces are read, then whose rows decode."""
    return "".join(piece.key for piece in step.pieces) + " " + "".join(row.key for row in step.rows)


def test_a_prompt_is_read_once_and_forked():
    made = scheduler(Request("a", num_tokens=6, new_tokens=3, samples=2), Request("b", num_tokens=1, new_tokens=1))
    steps = list(run(made))
    assert steps == [
        Step((Piece("a", 0, 0, 4, False), Piece("b", 2, 0, 1, True))),
        # the first tokens come with the prompt, so two decoded ones make three
        Step((Piece("a", 0, 4, 2, True),), (Fork("a", 0, (1,)),)),
        Step(rows=(Row("a", 0, 0), Row("a", 1, 1))),
        Step(rows=(Row("a", 0, 0), Row("a", 1, 1))),
    ]
    assert [step.num_tokens for step in steps] == [5, 2, 2, 2]
    assert (made.free_slots, made.running, made.waiting) == (3, 0, 0)


def test_the_drawing_in_the_documents():
    made = scheduler(Request("A", 10, 3), Request("B", 3, 2, samples=2), Request("C", 2, 1), token_budget=8)
    columns = [["      ", "slot 0", "slot 1", "slot 2"]]
    for number, step in enumerate(run(made), 1):
        cells = {row.slot: f"{row.key} +" for row in step.rows}
        for piece in step.pieces:
            cells[piece.slot] = f"{piece.key} {piece.start}-{piece.start + piece.count - 1}"
        cells |= {slot: f"{fork.key} =" for fork in step.forks for slot in fork.targets}
        columns.append([f"step {number}", *(cells.get(slot, "") for slot in range(3))])
    lines = ["    " + "".join(f"{cell:<9}" for cell in row).rstrip() for row in zip(*columns, strict=True)]
    page = Path(__file__).parents[2] / "docs" / "serving.md"
    assert "\n\n" + "\n".join(lines) + "\n\n" in page.read_text(encoding="utf-8"), "\n".join(lines)


def test_texts_to_score_are_packed():
    made = scheduler(*(Request(key, num_tokens=3) for key in "abcd"))
    assert [keys(step) for step in run(made)] == ["abc ", "d "]


def test_a_prompt_is_cut_alike_whatever_else_runs():
    made = scheduler(Request("a", num_tokens=1, new_tokens=9), Request("b", num_tokens=10), token_budget=9)
    made.add(Request("c", num_tokens=7))
    pieces = [piece for step in run(made) for piece in step.pieces if piece.key == "b"]
    assert [(piece.start, piece.count) for piece in pieces] == [(0, 4), (4, 4), (8, 2)]


def test_who_ends_early_frees_its_slot_at_once():
    made = scheduler(Request("a", 2, new_tokens=9, samples=2), Request("b", 2, new_tokens=9), Request("c", 2))
    step = made.plan()
    assert keys(step) == "ab "
    assert (made.free_slots, made.running, made.waiting, made.lacking_slots) == (0, 2, 1, 1)
    assert made.report(ended={("a", 1)}) == [("a", 1)]
    assert made.free_slots == 1
    step = made.plan()
    assert step.pieces == (Piece("c", 1, 0, 2, True),)
    assert made.report(ended={("b", 0)}) == [("b", 0), ("c", 0)]
    assert made.plan() == Step(rows=(Row("a", 0, 0),))


def test_nobody_overtakes_the_first_in_line():
    made = scheduler(Request("a", 2, new_tokens=3), Request("b", 2, new_tokens=2, samples=3), Request("c", 2))
    assert made.lacking_slots == 0
    # c would fit beside a
    assert [keys(step) for step in run(made)] == ["a ", " a", " a", "b ", " bbb", "c "]


def test_a_long_prompt_and_many_rows_do_not_stop_each_other():
    made = scheduler(*(Request(key, 1, new_tokens=4) for key in "abc"), num_slots=4, token_budget=5)
    assert keys(made.plan()) == "abc "
    made.report()
    made.add(Request("d", 12))
    assert [keys(step) for step in run(made)] == ["d a", "d b", "d c", " abc", " abc"]


def test_a_kept_slot_goes_on():
    made = scheduler(Request("a", 2, new_tokens=2, keep=True), Request("b", 2, new_tokens=9), num_slots=2, capacity=10)
    steps = run(made)
    assert [keys(next(steps)), keys(next(steps))] == ["ab ", " ab"]
    made.report(ended={("b", 0)})
    assert made.free_slots == 1
    with pytest.raises(RequestError) as refused:
        made.add(Request("c", 2, new_tokens=6, held=4, slot=0))
    assert refused.value.kind == "capacity"
    # the first in line waits for the very slot that c brings
    made.add(Request("b", 1, new_tokens=2, samples=2))
    made.add(Request("c", 2, new_tokens=2, held=3, slot=0))
    made.add(Request("d", 1))
    with pytest.raises(RequestError, match="slot: 0 is in use") as refused:
        made.add(Request("e", 2, held=3, slot=0))
    assert refused.value.kind == "slot"
    with pytest.raises(ValueError, match="slot: 0 is in use"):
        made.release(0)
    # who has not started leaves it as it was
    assert made.abort("c")
    assert made.kept == {0: 3}
    with pytest.raises(RequestError, match="held: expected 3, the tokens that slot 0 has read; got 4") as refused:
        made.add(Request("c", 2, new_tokens=2, held=4, slot=0))
    assert refused.value.kind == "invalid"
    made.add(Request("c", 2, new_tokens=2, held=3, slot=0))
    assert [keys(step) for step in run(made)] == ["c ", " c"]
    assert (made.lacking_slots, made.free_slots) == (1, 1)
    made.release(0)
    assert [keys(step) for step in run(made)] == ["b ", " bb", "d "]
    assert made.free_slots == 2


def test_a_slot_that_was_filled_from_outside_goes_on_at_once():
    made = scheduler()
    made.adopt(1, 7)
    assert (made.kept, made.free_slots) == ({1: 7}, 2)
    with pytest.raises(ValueError, match="slot: expected one that is free, got 1"):
        made.adopt(1, 7)
    # nothing is to be read before the first draw
    made.add(Request("a", 0, new_tokens=2, held=7, slot=1))
    assert made.plan() == Step(pieces=(Piece("a", 1, 0, 0, True),))
    assert [keys(step) for step in run(made)] == ["a ", " a"]
    assert made.kept == {1: 8}
    made.release(1)
    made.add(Request("b", 1, samples=3, new_tokens=1))
    assert next(run(made)).forks == (Fork("b", 0, (1, 2)),)


def test_a_slot_that_nobody_knows_is_not_kept():
    made = scheduler(Request("a", 6, new_tokens=2, keep=True), num_slots=1, capacity=20)
    made.plan()
    made.report()
    assert made.abort("a")
    assert (made.kept, made.free_slots) == ({}, 1)
    made.add(Request("a", 1, new_tokens=2, keep=True))
    list(run(made))
    assert made.kept == {0: 2}
    made.add(Request("b", 6, held=2, slot=0))
    made.plan()
    # a step that broke off
    made.abandon()
    made.abandon()
    assert (made.kept, made.free_slots, made.running) == ({}, 1, 0)


def test_one_request_fails_and_the_others_go_on():
    made = scheduler(Request("a", 2, new_tokens=9), Request("b", 6), Request("c", 2))
    before = made.plan()
    assert made.abort("a")
    # a call that read a, b and c threw before it changed anything
    made.report(undone={"b", "c"})
    assert made.plan() == Step(tuple(piece for piece in before.pieces if piece.key != "a"))


def test_a_step_under_way_says_nothing_of_a_later_request_with_the_same_key():
    made = scheduler(Request("a", 2, new_tokens=9))
    step = made.plan()
    assert made.abort("a")
    assert not made.abort("a")
    assert made.free_slots == 3
    made.add(Request("a", 3, new_tokens=9))
    assert made.plan() is step
    assert made.report(ended={("a", 0)}) == []
    assert made.plan() == Step((Piece("a", 0, 0, 3, True),))


def test_an_idle_plan_needs_no_report():
    made = scheduler()
    assert not made.plan()
    made.add(Request("a", 1))
    assert made.plan()


@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        ({"num_tokens": 0}, "invalid", "num_tokens: expected at least 1, got 0"),
        ({"num_tokens": 0, "slot": 0, "new_tokens": 0}, "invalid", "num_tokens: expected at least 1, got 0"),
        ({"new_tokens": -1}, "invalid", "new_tokens: expected at least 0"),
        ({"samples": 0}, "invalid", "samples: expected at least 1"),
        ({"held": -1}, "invalid", "held: expected at least 0"),
        ({"samples": 2, "new_tokens": 0}, "invalid", "nothing is drawn"),
        ({"samples": 2, "keep": True}, "invalid", "a kept slot"),
        ({"samples": 4}, "samples", "samples: expected at most 3"),
        ({"num_tokens": 9, "new_tokens": 9, "held": 4}, "capacity", "held 4, prompt 9, new 9"),
        ({"key": "known"}, "key", "'known' is a request that has not ended"),
        ({"slot": 2}, "slot", "slot: 2 is in use or not kept"),
        ({}, "queue", "1 requests are waiting"),
    ],
)
def test_refusals(request_: dict, kind: str, message: str):
    made = scheduler(Request("known", 1), most_waiting=1, capacity=20)
    with pytest.raises(RequestError, match=message) as refused:
        made.add(Request(**{"key": "a", "num_tokens": 9, "new_tokens": 9, **request_}))
    assert refused.value.kind == kind
    assert (made.waiting, made.running, made.free_slots) == (1, 0, 3)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"num_slots": 0}, "num_slots: expected at least 1"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"most_waiting": 0}, "most_waiting"),
        ({"capacity": 0}, "capacity"),
        ({"token_budget": 4}, "token_budget: expected above prefill_chunk"),
        ({"num_slots": 2.5}, "num_slots: expected a whole number, got 2.5"),
        ({"num_slots": "3"}, "num_slots: expected a whole number, got '3'"),
        ({"prefill_chunk": True}, "prefill_chunk: expected a whole number, got True"),
        ({"token_budget": None}, "token_budget: expected a whole number, got None"),
        ({"most_waiting": None}, "most_waiting: expected a whole number, got None"),
    ],
)
def test_bad_limits(limits: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(LIMITS, **limits)


def test_wrong_reports_change_nothing():
    made = scheduler(Request("a", 9, new_tokens=2), Request("b", 1, new_tokens=2))
    with pytest.raises(ValueError, match="no step is planned"):
        made.report()
    step = made.plan()
    for ended, undone, message in (
        ([("a", 0)], [], "no samples that drew"),
        ([("b", 1)], [], "no samples that drew"),
        ([], ["c"], "no part in this step"),
        ([("b", 0)], ["b"], "are said to have ended too"),
    ):
        with pytest.raises(ValueError, match=message):
            made.report(ended, undone)
    assert made.plan() is step


def test_a_policy_that_breaks_the_rules_is_stopped():
    class Greedy(FirstCome):
        def choose(self) -> Choice:
            return Choice([*self.reading.values(), *self.queue.values()], list(self.decoding))

    for requests in ([Request("a", 1, 9, samples=3), Request("b", 1)], [Request(key, 4) for key in "abc"]):
        made = Greedy(LIMITS)
        for request in requests:
            made.add(request)
        with pytest.raises(AssertionError):
            made.plan()
        assert (made.waiting, made.free_slots) == (len(requests), 3)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_anything_may_happen(name: str):
    kind = type("EngineWith", (Engine,), {"kind": SCHEDULERS[name]})
    kind.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
    kind.TestCase("runTest").runTest()
