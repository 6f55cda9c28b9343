"""Checks of streams: sequences of any length in slots that they enter and leave as they like, against one pass each."""

import itertools
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from swat_lm import SwatForCausalLM
from swat_lm.layers.lean import LayerPlan
from swat_lm.model.packing import Reading, extend_packed
from swat_lm.model.slots import Slots
from tests.layers.at_once import masks
from tests.layers.subject import Check, Subject, close, grows, one_pass, tokens

History = tuple[tuple[int, bool], ...]
"""Of one sequence: every token, and whether somebody sees it."""


class Answer(NamedTuple):
    """Logits `[V]` that came out after all tokens of a history."""

    logits: Tensor
    history: History
    event: int
    """Which of the events it was."""


class Traffic:
    """A pool of slots, what each should hold, and events that change both; whatever comes out is compared."""

    def __init__(self, model: SwatForCausalLM, num_slots: int, seed: int, capacity: int | None = None) -> None:
        self.model, self.num_slots, self.random = model, num_slots, Random(seed)
        self.plain = model
        self.state: Slots = model.init_state(num_slots, capacity=capacity)
        self.other: Slots = model.init_state(2, capacity=capacity)
        self.held: list[History] = [()] * num_slots
        self.taken: list[tuple[History, dict[str, Tensor]]] = []
        self.longest = 26 if capacity is None else capacity - 6
        self.happened: list[str] = []
        self.answers: list[Answer] = []

    def run(self, events: list[str]) -> None:
        for event in events:
            self.happened.append(event)
            try:
                getattr(self, event)()
            except BaseException as error:
                error.add_note(f"after {self.happened}, {[len(one) for one in self.held]} tokens held")
                raise
            assert self.state.position.tolist() == [len(one) for one in self.held]
        self._compare()

    def _draw(self, count: int) -> list[int]:
        return [self.random.randrange(40) for _ in range(count)]

    def _some(self) -> list[int]:
        return self.random.sample(range(self.num_slots), self.random.randint(1, self.num_slots))

    def _came(self, logits: Tensor, slots: list[int]) -> None:
        """Logits `[B, V]` after all that these slots hold."""
        histories = (self.held[slot] for slot in slots)
        self.answers += map(Answer, logits.detach(), histories, itertools.repeat(len(self.happened)))

    def _compare(self) -> None:
        """All answers with one pass over the whole of each history, of which most begin another one."""
        histories = sorted({answer.history for answer in self.answers})
        longest = [one for one, after in zip(histories, [*histories[1:], ()], strict=True) if after[: len(one)] != one]
        # padding on the right changes nothing, see `padded_is_alone`
        width = max(map(len, longest), default=0)
        ids, mask = torch.zeros(2, len(longest), width, dtype=torch.long)
        for row, history in enumerate(longest):
            ids[row, : len(history)] = torch.tensor([token for token, _ in history])
            mask[row, : len(history)] = torch.tensor([int(seen) for _, seen in history])
        expected = one_pass(self.plain, ids, mask) if longest else None
        for answer in self.answers:
            assert expected is not None
            row = next(row for row, one in enumerate(longest) if one[: len(answer.history)] == answer.history)
            what = f"the last of {self.happened[: answer.event]}, {len(answer.history)} tokens"
            close(answer.logits, expected[row, len(answer.history) - 1], what)
        self.answers = []

    def _leave_full(self) -> None:
        for slot, history in enumerate(self.held):
            if len(history) > self.longest:
                self.state.reset(torch.tensor([slot]))
                self.held[slot] = ()

    def read(self) -> None:
        """Chunks of any lengths, none among them, into some slots in any order."""
        self._leave_full()
        some = self._some()
        lengths = [self.random.choice((0, 1, 2, 3, 6)) for _ in some]
        width = max(1, *lengths) + self.random.randrange(2)
        ids = torch.tensor([self._draw(width) for _ in some])
        chunk = self.random.choice((1, 2, 4, 100))
        logits, _ = self.model.prefill(
            ids, self.state, chunk=chunk, slot=torch.tensor(some), lengths=torch.tensor(lengths)
        )
        for row, (slot, length) in enumerate(zip(some, lengths, strict=True)):
            self.held[slot] += tuple((token, True) for token in ids[row, :length].tolist())
        real = [row for row, length in enumerate(lengths) if length]
        if real:
            self._came(logits[real], [some[row] for row in real])

    def read_with_holes(self) -> None:
        """Masks with holes at any place; what stands before a sequence's first token is padding."""
        self._leave_full()
        some, width = self._some(), self.random.randint(1, 6)
        ids = torch.tensor([self._draw(width) for _ in some])
        mask = torch.tensor([[int(self.random.random() > 0.4) for _ in range(width)] for _ in some])
        hidden = self.model.extend(ids, self.state, mask, slot=torch.tensor(some))
        logits = self.model.lm_head(hidden[:, -1])
        for row, slot in enumerate(some):
            for token, seen in zip(ids[row].tolist(), mask[row].tolist(), strict=True):
                if seen or self.held[slot]:
                    self.held[slot] += ((token, bool(seen)),)
        real = [row for row in range(len(some)) if mask[row, -1]]
        if real:
            self._came(logits[real], [some[row] for row in real])

    def read_all(self) -> None:
        """One chunk for all slots, none padded."""
        self._leave_full()
        ids = torch.tensor([self._draw(3) for _ in range(self.num_slots)])
        logits, _ = self.model.prefill(ids, self.state, chunk=2)
        for slot in range(self.num_slots):
            self.held[slot] += tuple((token, True) for token in ids[slot].tolist())
        self._came(logits, list(range(self.num_slots)))

    def read_packed(self) -> None:
        """Chunks of any lengths in one row, with tokens between that nobody reads, into some slots in any order."""
        self._leave_full()
        readings, places, end = [], [], 0
        for slot in self._some():
            found = Reading(self._draw(self.random.choice((1, 2, 3, 6))), slot, len(self.held[slot]))
            places.append(end + self.random.choice((0, 0, 2)))
            end = places[-1] + len(found.tokens)
            readings.append(found)
        hidden = extend_packed(self.model, readings, self.state, places, end + self.random.choice((0, 3)))
        for reading in readings:
            self.held[reading.slot] += tuple((token, True) for token in reading.tokens)
        self._came(self.model.lm_head(torch.stack([one[-1] for one in hidden])), [each.slot for each in readings])

    def step(self) -> None:
        """One token for some slots, in any order."""
        self._leave_full()
        some = self._some()
        ids = torch.tensor([self._draw(1) for _ in some])
        logits = self.model.decode_step(ids, self.state, slot=torch.tensor(some))
        for row, slot in enumerate(some):
            self.held[slot] += ((int(ids[row]), True),)
        self._came(logits, some)

    def step_all(self) -> None:
        """One token for every slot."""
        self._leave_full()
        ids = torch.tensor([self._draw(1) for _ in range(self.num_slots)])
        logits = self.model.decode_step(ids, self.state)
        for slot in range(self.num_slots):
            self.held[slot] += ((int(ids[slot]), True),)
        self._came(logits, list(range(self.num_slots)))

    def leave(self) -> None:
        """Some sequences end."""
        some = self._some()[:2]
        self.state.reset(torch.tensor(some))
        for slot in some:
            self.held[slot] = ()

    def fork(self) -> None:
        """Some slots take what others hold."""
        source, target = self.random.sample(range(self.num_slots), 2)
        self.state.copy(torch.tensor([source]), torch.tensor([target]))
        self.held[target] = self.held[source]

    def keep(self) -> None:
        """Take snapshots, to be put back later."""
        some = self._some()[:2]
        taken = self.state.snapshot(torch.tensor(some))
        for row, slot in enumerate(some):
            one = {name: tensor[row : row + 1] for name, tensor in taken.items()}
            self.taken.append((self.held[slot], one))

    def put_back(self) -> None:
        """Into any slot, by way of another pool now and then; bit for bit."""
        if not self.taken:
            return
        history, taken = self.random.choice(self.taken)
        slot = self.random.randrange(self.num_slots)
        if self.random.random() < 0.5:
            self.other.restore(torch.tensor([1]), taken)
            again = self.other.snapshot(torch.tensor([1]))
            same_past(again, taken, len(history))
            taken = again
        self.state.restore(torch.tensor([slot]), taken)
        same_past(self.state.snapshot(torch.tensor([slot])), taken, len(history))
        self.held[slot] = history


def same_past(ours: dict[str, Tensor], theirs: dict[str, Tensor], count: int) -> None:
    """Snapshots of one slot after `count` tokens hold the same, bit for bit; places that hold nothing may differ."""
    for name in ours.keys() | theirs.keys():
        if name not in theirs or name not in ours:
            assert name == "hidden"
            assert not (ours | theirs)[name].any()
            continue
        one, other = ours[name], theirs[name]
        if one.shape != other.shape:
            places = min(one.shape[1], other.shape[1])
            assert count <= places
            one, other = one[:, :places], other[:, :places]
        assert torch.equal(one, other), name


EVENTS = (
    "read", "read", "read_packed", "step", "step", "step_all", "read_all", "leave", "fork", "keep", "put_back",
)  # fmt: skip


def events(seed: int, count: int, *more: str) -> list[str]:
    """A random course of them."""
    return Random(seed).choices((*EVENTS, *more), k=count)


def any_chunking_is_one_pass(subject: Subject, folder: Path) -> None:
    """Every place of every row, whatever the chunks; token by token too."""
    model, ids = subject.model(), tokens(2, 20)
    whole = one_pass(model, ids)
    for cuts in ((1,) * 20, (3, 1, 8, 1, 1, 6), (13, 1, 6)):
        state, parts = model.init_state(2), ids.split(list(cuts), dim=1)
        for chunk in (None, 1):
            state.reset()
            if chunk is None:
                read = torch.cat([model.extend(part, state) for part in parts], dim=1)
                close(model.lm_head(read).detach(), whole, f"chunks of {cuts}")
            else:
                read = [model.decode_step(part, state) if part.shape[1] == 1 else model.prefill(part, state)[0]
                        for part in parts]  # fmt: skip
                ends = [end - 1 for end in itertools.accumulate(cuts)]
                close(torch.stack(read, dim=1).detach(), whole[:, ends], f"chunks and steps of {cuts}")


def streams_with_holes_are_one_pass(subject: Subject, folder: Path) -> None:
    """Left padding and holes, in chunks of any size that may end in a hole or be one."""
    model, ids = subject.model(), tokens(3, 20)
    for seed, left in enumerate((False, True)):
        mask = masks(3, 20, left=left, holes=True, seed=seed)
        mask[1, 6:11] = 0
        mask[2, 13:18] = 0
        whole = one_pass(model, ids, mask)
        for cuts in ((3, 1, 8, 1, 1, 6), (1,) * 20 if left else (6, 5, 9)):
            state = model.init_state(3)
            parts = zip(ids.split(list(cuts), dim=1), mask.split(list(cuts), dim=1), strict=True)
            hidden = torch.cat([model.extend(part, state, shown) for part, shown in parts], dim=1)
            close(model.lm_head(hidden)[mask == 1].detach(), whole[mask == 1], f"chunks of {cuts}")
            # and on, without a mask
            more = tokens(3, 3, seed=8)
            after = one_pass(model, torch.cat((ids, more), dim=1), torch.cat((mask, torch.ones_like(more)), dim=1))
            close(model.decode_step(more[:, :1], state), after[:, 20], "a step after holes")
            close(model.prefill(more[:, 1:], state)[0].detach(), after[:, 22], "a chunk after holes")


def slots_in_any_order_are_each_alone(subject: Subject, folder: Path) -> None:
    model = subject.model()
    # what a fresh pool meets first
    for seed, first in enumerate(("step", "fork", "put_back", "read", "read_packed")):
        Traffic(model, 3, seed).run([first, "read_all", "step_all", "read", "read_packed"])
    for seed in range(3):
        Traffic(model, 4, seed).run(events(seed, 25))
        Traffic(model, 3, seed).run(["read", "keep", "read_with_holes", *events(seed, 25, "read_with_holes")])


def a_bounded_pool_serves_any_number_of_sequences(subject: Subject, folder: Path) -> None:
    """What was read before a sequence does not count, nor what others hold; too much is refused, nothing changes."""
    model = subject.model()
    Traffic(model, 3, seed=1, capacity=16).run(events(5, 30))
    state = model.init_state(2, capacity=8)
    model.prefill(tokens(1, 6), state, slot=torch.tensor([1]))
    before = state.snapshot(torch.tensor([0, 1]))
    if grows(model):
        for call in (
            lambda: model.prefill(tokens(1, 3), state, slot=torch.tensor([1])),
            lambda: model.prefill(tokens(2, 3), state, chunk=2),
        ):
            with pytest.raises(ValueError, match="8"):
                call()
            after = state.snapshot(torch.tensor([0, 1]))
            assert all(torch.equal(after[name], before[name]) for name in before)
    else:
        model.prefill(tokens(2, 30), state)


def decoding_arranged_for_a_cpu_is_the_same(subject: Subject, folder: Path) -> None:
    """With plans for all layers that have one, then with one layer that lost it, and after a step of training."""
    model = subject.model()
    plain = subject.model()
    model.arrange_for_decoding()
    traffic = Traffic(model, 3, seed=11)
    traffic.plain = plain
    traffic.run(["step_all", "step_all", *events(11, 10)])
    plans = model._decoding_plan.serving(model.model.stack)
    assert [isinstance(one, LayerPlan) for one in plans] == [one is not None for one in plans]
    for layer in (model.model.stack[0], model.model.stack[-1]):
        linear = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))
        handle = linear.register_forward_hook(lambda module, inputs, output: output * 1.0)
        served = model._decoding_plan.serving(model.model.stack)
        assert served[list(model.model.stack).index(layer)] is None
        traffic.run(["step_all", "step", "read", "step_all"])
        handle.remove()
    train_once(model)
    traffic = Traffic(model, 2, seed=12)
    traffic.run(["read", "step", "step_all", "step_all", "read_all"])


def train_once(model: SwatForCausalLM) -> None:
    """A real step of an optimizer, which changes every parameter."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    ids = tokens(2, 16, seed=5)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval().zero_grad(set_to_none=True)
    same = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not same, f"a step leaves {same} as they were"


def it_holds_after_a_step_of_training(subject: Subject, folder: Path) -> None:
    """Nothing that was made before the step, for a stream say, goes on serving after it."""
    model = subject.model()
    Traffic(model, 2, seed=3).run(["read_all", "step_all", "read"])
    train_once(model)
    Traffic(model, 3, seed=4).run(["read", "step", "step_all", "read_all", "step"])


def bad_rows_are_named(subject: Subject, folder: Path) -> None:
    """One sentence each, and nothing is read."""
    model = subject.model()
    state = model.init_state(3)
    model.prefill(tokens(3, 4), state)
    before = state.snapshot(torch.arange(3))
    other = subject.model(num_hidden_layers=len(model.model.stack) + 1, layers=[*subject.layers, subject.layers[0]])

    def slots(*numbers: int) -> Tensor:
        return torch.tensor(numbers)

    calls = {
        "slot: expected different numbers from 0 to 2": [
            lambda: model.prefill(tokens(2, 3), state, slot=slots(1, 1)),
            lambda: model.prefill(tokens(2, 3), state, slot=slots(0, 3)),
            lambda: model.prefill(tokens(1, 3), state, slot=slots(-1)),
            lambda: model.decode_step(tokens(2, 1), state, slot=slots(1, 1)),
            lambda: model.decode_step(tokens(2, 1), state, slot=slots(0, 3)),
            lambda: model.decode_step(tokens(1, 1), state, slot=slots(-1)),
        ],
        r"expected \[2, ": [
            lambda: model.prefill(tokens(3, 3), state, slot=slots(0, 1)),
            lambda: model.decode_step(tokens(3, 1), state, slot=slots(0, 1)),
            lambda: model.decode_step(tokens(2, 2), state, slot=slots(0, 1)),
        ],
        "lengths": [
            lambda: model.prefill(tokens(2, 3), state, slot=slots(0, 1), lengths=slots(1, 4)),
            lambda: model.prefill(tokens(2, 3), state, slot=slots(0, 1), lengths=slots(-1, 2)),
            lambda: model.prefill(tokens(2, 3), state, slot=slots(0, 1), lengths=slots(1)),
            lambda: model.prefill(
                tokens(3, 3), state, lengths=slots(1, 1, 1), attention_mask=torch.ones(3, 3, dtype=torch.long)
            ),
        ],
        "of another model|belongs to another model": [
            lambda: other.prefill(tokens(3, 3), state),
            lambda: other.decode_step(tokens(3, 1), state),
            lambda: other.init_state(3).restore(slots(0), state.snapshot(slots(0))),
        ],
    }
    for message, bad in calls.items():
        for number, call in enumerate(bad):
            with pytest.raises(ValueError, match=message) as caught:
                call()
            assert "\n" not in str(caught.value), number
            after = state.snapshot(torch.arange(3))
            assert all(torch.equal(after[name], before[name]) for name in before), f"{message}, {number}"


CHECKS: tuple[Check, ...] = (
    any_chunking_is_one_pass,
    streams_with_holes_are_one_pass,
    slots_in_any_order_are_each_alone,
    a_bounded_pool_serves_any_number_of_sequences,
    decoding_arranged_for_a_cpu_is_the_same,
    it_holds_after_a_step_of_training,
    bad_rows_are_named,
)
