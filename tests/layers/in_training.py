"""Checks of training: what a carry hands on in numbers and in gradients, under any way of running the layers."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swat_lm import SwatForCausalLM
from swat_lm.model.execution.chunks import ReverseChunks
from tests.exactness import assert_as_exact_as_pytorch
from tests.layers.subject import Check, Subject, close, gradients, one_pass, same_gradients, tokens, twin

LENGTH = 22
CUTS = [2, 9, 1, 1, 9]
IGNORED = -100


def targets_of(ids: Tensor, documents: Tensor | None = None) -> Tensor:
    """The next token of every place; none where a document or the row ends."""
    targets = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)), dim=1)
    if documents is not None:
        ends = torch.ones_like(ids, dtype=torch.bool)
        ends[:, :-1] = documents[:, 1:] != documents[:, :-1]
        targets = targets.masked_fill(ends | (documents < 0), IGNORED)
    return targets


def loss_by_chunks(
    model: SwatForCausalLM, ids: Tensor, targets: Tensor, cuts: list[int], mode: str, documents: Tensor | None = None
) -> Tensor:
    """The summed loss through the model's own forward, chunk after chunk."""
    carry, losses, start = model.init_carry(mode), [], 0
    for length in cuts:
        place = slice(start, start + length)
        outputs = model(
            ids[:, place],
            shift_labels=targets[:, place],
            num_items_in_batch=1,
            document_ids=None if documents is None else documents[:, place],
            carry=carry,
        )
        carry, start = outputs.carry, start + length
        losses.append(outputs.loss)
    assert start == ids.shape[1]
    return torch.stack(losses).sum()


def packed_rows() -> Tensor:
    """Documents over chunk borders, with padding anywhere: at the ends, between, over a border and a chunk long."""
    first = [0] * 5 + [-1, -1] + [7] * 4 + [-1] + [3] * 1 + [2] * 9
    second = [-1] * 3 + [5] * 6 + [-1] * 4 + [1] * 6 + [-1] * 3
    return torch.tensor([first, second, [4] * LENGTH])


def an_exact_carry_is_one_pass(subject: Subject, folder: Path) -> None:
    """In loss and all gradients; whole rows and packed ones; with and without activation checkpointing."""
    for documents in (None, packed_rows()):
        model, ids = subject.model().train(), tokens(3, LENGTH)
        targets = targets_of(ids, documents)
        whole = model(ids, shift_labels=targets, num_items_in_batch=1, document_ids=documents).loss
        expected = gradients(model, whole)
        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable()
                again = model(ids, shift_labels=targets, num_items_in_batch=1, document_ids=documents).loss
                same_gradients(gradients(model, again), expected)
            for cuts in (CUTS, [LENGTH], [1, 20, 1]):
                loss = loss_by_chunks(model, ids, targets, cuts, "exact", documents)
                close(loss, whole, f"loss of chunks {cuts}")
                same_gradients(gradients(model, loss), expected)


def reverse_chunks_are_one_pass(subject: Subject, folder: Path) -> None:
    """Recomputed from carries alone, chunk after chunk backwards: in loss and all gradients, or refused by name."""
    model, ids, documents = subject.model().train(), tokens(3, LENGTH), packed_rows()
    reason = ReverseChunks().refuses(model.model.stack)
    if reason is not None:
        with pytest.raises(ValueError, match=re.escape(reason)):
            model.set_execution("chunks")
        return
    inputs = {"shift_labels": targets_of(ids, documents), "document_ids": documents}
    whole = model(ids, **inputs).loss
    expected = gradients(model, whole)
    model.set_execution("chunks", chunk_size=8)
    loss = model(ids, **inputs).loss
    close(loss, whole)
    same_gradients(gradients(model, loss), expected)


def a_carry_keeps_documents_apart(subject: Subject, folder: Path) -> None:
    """Every token of packed rows is what its document alone makes of it, and no gradient crosses to another."""
    model, ids, documents = subject.model().train(), tokens(3, LENGTH), packed_rows()
    alone = torch.zeros(3, LENGTH, model.config.vocab_size, dtype=torch.float64)
    for row in range(3):
        for name in set(documents[row].tolist()) - {-1}:
            own = documents[row] == name
            alone[row, own] = one_pass(model, ids[row, own][None])[0]
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    carry, logits = model.init_carry("exact"), []
    for part, names in zip(embedded.split(CUTS, dim=1), documents.split(CUTS, dim=1), strict=True):
        outputs = model(inputs_embeds=part, document_ids=names, carry=carry)
        carry = outputs.carry
        logits.append(outputs.logits)
    found = torch.cat(logits, dim=1)
    assert found.isfinite().all()
    close(found[documents >= 0], alone[documents >= 0], "packed over a carry")
    for row, place in ((0, 21), (0, 8), (1, 17), (2, 21)):
        (gradient,) = torch.autograd.grad(found[row, place].pow(2).sum(), embedded, retain_graph=True)
        other = documents != documents[row, place]
        other[torch.arange(3) != row] = True
        other[row, place + 1 :] = True
        assert not gradient[other].any()
        assert gradient[row, place].any()
        assert gradient[row, place - 1].any()


def a_detached_carry_sends_no_gradient(subject: Subject, folder: Path) -> None:
    """It gives the numbers of an exact one; the older chunk's own loss is all that reaches it."""
    model, ids = subject.model().train(), tokens(2, LENGTH)
    targets = targets_of(ids)
    exact = loss_by_chunks(model, ids, targets, CUTS, "exact")
    close(loss_by_chunks(model, ids, targets, CUTS, "detached"), exact)
    for mode in ("exact", "detached"):
        embedded = model.model.embed_tokens(ids).detach().requires_grad_()
        old = model(inputs_embeds=embedded[:, :12], carry=model.init_carry(mode))
        kept = [tensor for past in old.carry.pasts for tensor in past.tensors() if tensor.is_floating_point()]
        assert all(tensor.requires_grad == (mode == "exact") for tensor in kept)
        new = model(inputs_embeds=embedded[:, 12:], carry=old.carry)
        new.logits[:, 0].pow(2).sum().backward()
        assert embedded.grad[:, 12].any()
        assert embedded.grad[:, :12].any() == (mode == "exact")
        model.zero_grad(set_to_none=True)


def a_carry_is_functional(subject: Subject, folder: Path) -> None:
    """It can be used again, and row by row as often as asked for; chunks change nothing in it."""
    model, ids, more = subject.model(), tokens(2, 9), tokens(3, 5, seed=2)
    carry = model(ids, carry=model.init_carry("detached")).carry
    kept = [tensor.clone() for past in carry.pasts for tensor in past.tensors()]
    order = torch.tensor([0, 1, 1])
    expected = one_pass(model, torch.cat((ids[order], more), dim=1))[:, 9:]
    for _ in range(2):
        with torch.no_grad():
            repeated = model(more, carry=carry.repeated(torch.tensor([1, 2]))).logits
        close(repeated, expected)
    assert all(map(torch.equal, (tensor for past in carry.pasts for tensor in past.tensors()), kept))
    with pytest.raises(ValueError, match=rf"carry: expected {len(model.model.layers)} layers, it holds 1"):
        model(ids, carry=type(carry)("exact", carry.pasts[:1]))


def bfloat16_is_as_exact_as_one_pass(subject: Subject, folder: Path) -> None:
    """Streams, slots and carries round no worse than PyTorch does in one pass at the same precision."""
    model, ids = subject.model(torch.bfloat16), tokens(2, 40)
    exact = one_pass(twin(model).double(), ids)
    plain = one_pass(model, ids)
    state = model.init_state(2)
    steps = torch.stack([model.decode_step(token, state) for token in ids.split(1, dim=1)], dim=1)
    assert_as_exact_as_pytorch(steps, plain, exact, "token by token")
    state = model.init_state(2)
    chunks = torch.cat([model.extend(part, state) for part in ids.split([7, 1, 20, 12], dim=1)], dim=1)
    with torch.no_grad():
        assert_as_exact_as_pytorch(model.lm_head(chunks), plain, exact, "chunk by chunk")
        carry, parts = model.init_carry("exact"), []
        for part in ids.split([7, 1, 20, 12], dim=1):
            outputs = model(part, carry=carry)
            carry = outputs.carry
            parts.append(outputs.logits)
    assert_as_exact_as_pytorch(torch.cat(parts, dim=1), plain, exact, "with a carry")
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded = one_pass(model, ids, mask)[0, 5:]
    assert_as_exact_as_pytorch(
        padded, one_pass(model, ids[:1, 5:])[0], one_pass(twin(model).double(), ids, mask)[0, 5:]
    )


def a_reentrant_checkpoint_is_refused(subject: Subject, folder: Path) -> None:
    """It would lose the gradients that flow through an exact carry; a detached one it may have."""
    model, ids = subject.model().train(), tokens(2, 6)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(ids, carry=model.init_carry("exact"))
    model(ids, carry=model.init_carry("detached"))


CHECKS: tuple[Check, ...] = (
    an_exact_carry_is_one_pass,
    reverse_chunks_are_one_pass,
    a_carry_keeps_documents_apart,
    a_detached_carry_sends_no_gradient,
    a_carry_is_functional,
    bfloat16_is_as_exact_as_one_pass,
    a_reentrant_checkpoint_is_refused,
)
