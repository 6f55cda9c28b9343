"""Checks of one pass over whole rows: who sees whom, and what it costs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from swat_lm import SwatForCausalLM
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.selective_attention import SelectiveAttention
from swat_lm.model import cost
from swat_lm.model.execution import run_layers
from tests.layers.subject import Check, Subject, close, one_pass, tokens

LENGTH = 21


def masks(batch: int, length: int, *, left: bool = False, holes: bool = False, seed: int = 0) -> Tensor:
    """Masks `[B, T]` with padding on the left, holes anywhere, or both; the last token of every row is real."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.long)
    if holes:
        mask = (torch.rand(batch, length, generator=generator) > 0.3).long()
    if left:
        padding = torch.randint(0, length - 2, (batch,), generator=generator)
        padding[0] = 0
        mask[torch.arange(length) < padding[:, None]] = 0
    mask[:, -1] = 1
    return mask


def touched(model, ids: Tensor, row: int, place: int, **more) -> Tensor:
    """Which tokens `[B, T]` the logits at one place depend on: those with a gradient that is not exactly 0."""
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, use_cache=False, **more).logits[row, place].pow(2).sum().backward()
    model.zero_grad(set_to_none=True)
    return (embedded.grad != 0).any(dim=-1)


def with_open_gates(model: SwatForCausalLM) -> SwatForCausalLM:
    """A token that is not chosen sees itself alone; so that all that may be seen is, choose every one."""
    for mixer in model.modules():
        if isinstance(mixer, SelectiveAttention):
            mixer.gate.out_proj.bias.data += torch.tensor([-1e3, 1e3]).to(mixer.gate.out_proj.bias)
            mixer.taipan = replace(mixer.taipan, selection="gate")
    return model


def no_gradient_goes_to_the_future_or_other_rows(subject: Subject, folder: Path) -> None:
    model, ids = with_open_gates(subject.model()), tokens(2, LENGTH)
    reach, kept = cost.reach(model.config), cost.first_kept(model.config)
    # of aligned segments, the last token alone sees as far
    everywhere = all(layer.aligned_to() is None for layer in model.model.stack)
    for place in (0, 1, 9, LENGTH - 1):
        seen = touched(model, ids, 1, place)
        assert not seen[0].any()
        assert not seen[1, place + 1 :].any()
        first = 0 if reach is None else max(0, place + 1 - reach)
        assert seen[1, : min(kept, place + 1)].all(), f"does not see all {kept} first tokens"
        assert not seen[1, kept:first].any(), f"sees beyond its reach of {reach}"
        assert seen[1, place]
        assert not everywhere or seen[1, first : place + 1].all(), f"does not see all {reach} tokens of its reach"


def nobody_sees_padding_or_holes(subject: Subject, folder: Path) -> None:
    """Neither by a gradient nor by what stands there; and a hole's own output does not reach others either."""
    model, ids = subject.model(), tokens(3, LENGTH)
    for seed, left in enumerate((False, True)):
        mask = masks(3, LENGTH, left=left, holes=True, seed=seed)
        expected = one_pass(model, ids, mask)
        assert expected.isfinite().all()
        for other in (3, 4):
            noisy = torch.where(mask == 1, ids, tokens(3, LENGTH, seed=other))
            close(one_pass(model, noisy, mask)[mask == 1], expected[mask == 1])
        # not even what no embedding would be
        embedded = model.model.embed_tokens(ids).detach()
        embedded[mask == 0] *= 1e6
        with torch.no_grad():
            far = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits
        close(far[mask == 1], expected[mask == 1])
        for row in range(3):
            seen = touched(model, ids, row, LENGTH - 1, attention_mask=mask)
            assert not seen[mask == 0].any()


def a_hole_without_distances_is_not_there(subject: Subject, folder: Path) -> None:
    """Recurrences skip it: the row without it. Where distances count they stay, so only the mask's own rule holds."""
    model, ids = subject.model(), tokens(1, LENGTH)
    if any(one.kind != "summary" for layer in model.model.stack for one in layer.state_spec()):
        return
    mask = masks(1, LENGTH, holes=True, seed=5)
    real = mask[0] == 1
    close(one_pass(model, ids, mask)[:, real], one_pass(model, ids[:, real]))


def padded_is_alone(subject: Subject, folder: Path) -> None:
    """On the left and on the right, one row at a time and all together; and a row of padding alone harms nobody."""
    model = subject.model()
    rows = [tokens(1, length, seed=length) for length in (LENGTH, 1, 8, 2)]
    for on_left in (True, False):
        ids, mask = tokens(5, LENGTH, seed=9), torch.zeros(5, LENGTH, dtype=torch.long)
        places = []
        for index, row in enumerate(rows):
            count = row.shape[1]
            places.append(slice(LENGTH - count, None) if on_left else slice(0, count))
            ids[index, places[-1]], mask[index, places[-1]] = row[0], 1
        logits = one_pass(model, ids, mask)
        assert logits.isfinite().all()
        for index, row in enumerate(rows):
            close(logits[index : index + 1, places[index]], one_pass(model, row))


def packed_is_separate(subject: Subject, folder: Path) -> None:
    """By document ids, also with padding between documents, by positions, and by lengths; exactly so in gradients."""
    model = subject.model()
    lengths = (1, 7, 3, 1, 9)
    rows = [tokens(1, length, seed=index) for index, length in enumerate(lengths)]
    ids = torch.cat(rows, dim=1)
    documents = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))[None]
    expected = torch.cat([one_pass(model, row) for row in rows], dim=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    for given in ({"document_ids": documents}, {"position_ids": positions}, {"cu_seq_lens_q": ends}):
        close(one_pass(model, ids, **given), expected, f"packed by {next(iter(given))}")
    for place in (0, 7, 8, 20):
        seen = touched(model, ids, 0, place, document_ids=documents)
        assert not seen[documents != documents[0, place]].any()
    # rows of their own documents, padding at the ends and between; ids need not be in order
    padded, spread = tokens(2, 26, seed=7), torch.full((2, 26), -1)
    for row, (start, names) in enumerate(((3, (9, 2, 5, 0, 1)), (0, (4, 7, 1, 3, 2)))):
        for index, one in enumerate(rows):
            padded[row, start : start + lengths[index]], spread[row, start : start + lengths[index]] = one, names[index]
            start += lengths[index] + (1 if index == row else 0)
    logits = one_pass(model, padded, document_ids=spread)
    assert logits.isfinite().all()
    for row in range(2):
        close(logits[row, spread[row] >= 0], expected[0], "packed with padding between")


def parameters_and_bytes_are_those_of_the_formulas(subject: Subject, folder: Path) -> None:
    for dtype, size in ((torch.float64, 8), (torch.bfloat16, 2)):
        model = subject.model(dtype)
        counted = sum(parameter.numel() for parameter in model.parameters())
        assert cost.count_parameters(model.config).total == counted
        state = model.init_state(3)
        # what grows begins with room for 64
        assert cost.state_bytes(model.config, batch=3, context=64, dtype_bytes=size) == state.num_bytes - 3 * 8
        plan = cost.plan_costs(model.config, 64)
        assert [one.parameters for one in plan] == [
            sum(parameter.numel() for parameter in layer.parameters()) for layer in model.model.stack
        ]


def products_are_those_of_the_formula(subject: Subject, folder: Path) -> None:
    """FLOPs of matrix products, forward and backward, as PyTorch's own counter has them."""
    model, ids = subject.model(), tokens(2, LENGTH)
    if any(getattr(entry.settings, "execution", None) == "sparse" for entry in model.config.plan()):
        # what is computed then depends on the text; the formula counts the budget
        return
    expected = cost.forward_flops(model.config, LENGTH)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(ids, use_cache=False)
    assert forward.get_total_flops() == 2 * expected, forward.get_flop_counts()
    model.train()
    with FlopCounterMode(display=False) as training:
        model(ids, labels=ids).loss.backward()
    assert training.get_total_flops() == 6 * expected, training.get_flop_counts()


def what_is_refused_is_named(subject: Subject, folder: Path) -> None:
    """A prefix that is read in both directions: either a layer says why not, or the prefix is read so."""
    model = subject.model()
    hidden = torch.randn(2, 9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    last = torch.arange(9, dtype=torch.int32).clamp(min=4).expand(2, -1).contiguous()
    chunk = Chunk(torch.arange(9)[None], last=last)
    for layer in model.model.stack:
        reason = layer.refuses(chunk)
        if reason is None:
            hidden.requires_grad_(True)
            output = run_layers([layer], hidden, chunk)[0]
            (gradient,) = torch.autograd.grad(output[:, 1].pow(2).sum(), hidden)
            assert gradient[:, :5].any(dim=-1).all()
            assert not gradient[:, 5:].any()
        else:
            assert reason.strip()
            assert "\n" not in reason
            with pytest.raises(ValueError, match=rf"^layer 0 \({layer.name}\): ") as caught:
                run_layers([layer], hidden, chunk)
            assert reason in str(caught.value)
    with pytest.raises(ValueError, match=rf"windows: expected one per layer \({len(model.model.layers)}\), got 1"):
        model(tokens(1, 3), windows=(None,), use_cache=False)


CHECKS: tuple[Check, ...] = (
    no_gradient_goes_to_the_future_or_other_rows,
    nobody_sees_padding_or_holes,
    a_hole_without_distances_is_not_there,
    padded_is_alone,
    packed_is_separate,
    parameters_and_bytes_are_those_of_the_formulas,
    products_are_those_of_the_formula,
    what_is_refused_is_named,
)
