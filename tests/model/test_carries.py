"""What training carries from chunk to chunk of a row: one pass in loss and gradients, or the past without gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .models import close, split, tiny_model, tokens

KINDS = {"windowed": 4, "mixed": [3, None], "full": None}


def losses_by_chunk(model, ids, mode, sizes, documents=None):
    carry, losses = model.init_carry(mode), []
    targets = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), dim=1)
    for part, target, documents_part in zip(
        ids.split(sizes, dim=1),
        targets.split(sizes, dim=1),
        [None] * len(sizes) if documents is None else documents.split(sizes, dim=1),
        strict=True,
    ):
        hidden, carry = model.forward_chunk(part, carry, documents_part)
        losses.append(model.loss(hidden, target, num_items=ids.shape[1]))
    return losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_exact_carry_is_one_pass_in_loss_and_all_gradients(kind, checkpointing):
    model = tiny_model(sliding_window=KINDS[kind]).double().train()
    ids = tokens(2, 30)
    expected = model(ids, labels=ids, num_items_in_batch=30).loss
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    if checkpointing:
        model.activation_checkpointing_enable()
    loss = torch.stack(losses_by_chunk(model, ids, "exact", [2, 9, 1, 18])).sum()
    close(loss, expected, 1e-10)
    loss.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, gradients[name], 1e-10)


def test_detached_carry_sees_the_past_but_sends_it_no_gradient():
    model, ids = tiny_model(sliding_window=6), tokens(1, 24)
    embedded = []
    model.model.embed_tokens.register_forward_hook(lambda *call: embedded.append(call[2]) or call[2].retain_grad())
    losses = losses_by_chunk(model, ids, "detached", [12, 12])
    close(sum(losses), torch.stack(losses_by_chunk(model, ids, "exact", [24])).sum())
    losses[1].backward()
    assert embedded[0].grad is None
    # the last token predicts nothing here
    assert embedded[1].grad[0, :-1].abs().sum(dim=-1).all()


def test_carry_is_functional_and_bounded():
    model, ids = tiny_model(sliding_window=[4, 1]), tokens(1, 12)
    _, carry = model.forward_chunk(ids, model.init_carry("detached"))
    kept = [past.kept["key"].clone() for past in carry.pasts]
    assert [key.shape[1] for key in kept] == [3, 0]
    first, _ = model.forward_chunk(ids, carry)
    second, _ = model.forward_chunk(ids, carry)
    assert torch.equal(first, second)
    for before, past in zip(kept, carry.pasts, strict=True):
        assert torch.equal(past.kept["key"], before)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    cuts=st.lists(st.integers(0, 1000), max_size=4),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_documents_over_chunk_borders_are_separate(lengths, cuts, kind):
    model = tiny_model(sliding_window=KINDS[kind])
    rows = [tokens(1, length, seed=index) for index, length in enumerate(lengths)]
    ids, documents = (
        torch.cat(rows, dim=1),
        torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))[None],
    )
    carry, parts = model.init_carry("exact"), []
    for part, document in zip(split(ids, cuts), split(documents, cuts), strict=True):
        hidden, carry = model.forward_chunk(part, carry, document)
        parts.append(model.lm_head(hidden))
    close(torch.cat(parts, dim=1), torch.cat([model(row).logits for row in rows], dim=1))
    with pytest.raises(ValueError, match="for every chunk of a stream or for none"):
        model.forward_chunk(ids, carry)


def test_exact_carry_refuses_reentrant_checkpointing():
    model = tiny_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.forward_chunk(tokens(1, 4), model.init_carry("exact"))
    model.forward_chunk(tokens(1, 4), model.init_carry("detached"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.forward_chunk(tokens(1, 4), model.init_carry("exact"))
