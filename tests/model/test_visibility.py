"""What a token may depend on in the whole model: padding, packed documents, chunks. Legend: T tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from swat_lm.model.cache import SlotCache

from .models import close, tiny_model, tokens

WINDOWS = {"windowed": 4, "mixed": [3, None], "full": None}


def pad(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        part = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[index, part], mask[index, part] = row, 1
    return ids, mask


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_is_alone(kind, side):
    model = tiny_model(sliding_window=WINDOWS[kind])
    rows = [tokens(1, length, seed=length)[0] for length in (5, 17, 11)]
    ids, mask = pad(rows, side)
    logits = model(ids, attention_mask=mask).logits
    for index, row in enumerate(rows):
        close(logits[index][mask[index] == 1], model(row[None]).logits[0])
    # what stands at padded places does not matter
    noisy = torch.where(mask == 1, ids, tokens(*ids.shape, seed=9))
    close(model(noisy, attention_mask=mask).logits[mask == 1], logits[mask == 1])


def test_padding_gets_no_gradient():
    model = tiny_model(sliding_window=4)
    ids, mask = pad([tokens(1, 5)[0], tokens(1, 9)[0]], "left")
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, attention_mask=mask).logits[mask == 1].sum().backward()
    assert not embedded.grad[mask == 0].any()
    assert embedded.grad[mask == 1].abs().sum(dim=-1).all()


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    kind=st.sampled_from(sorted(WINDOWS)),
    given_as=st.sampled_from(["documents", "positions", "cu_seqlens"]),
    cached=st.booleans(),
)
def test_packed_is_separate(lengths, kind, given_as, cached):
    model = tiny_model(sliding_window=WINDOWS[kind])
    rows = [tokens(1, length, seed=index) for index, length in enumerate(lengths)]
    packed = torch.cat(rows, dim=1)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    extra = {
        "documents": {"document_ids": ids},
        "positions": {"position_ids": positions},
        "cu_seqlens": {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 12, "max_length_k": 12},
    }[given_as]
    # the trap: a cache that is made by default must not let documents leak into each other
    outputs = model(packed, **extra, use_cache=cached)
    separate = torch.cat([model(row).logits for row in rows], dim=1)
    close(outputs.logits, separate)
    assert outputs.past_key_values is None or len(lengths) == 1


def test_packed_rows_do_not_leak_by_gradient_in_training():
    model = tiny_model(sliding_window=6).train()
    ids = tokens(1, 12)
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    documents = torch.tensor([[0] * 5 + [1] * 7])
    model(inputs_embeds=embedded, document_ids=documents).logits[0, 5:].sum().backward()
    assert not embedded.grad[0, :5].any()


def test_padding_beside_documents():
    model = tiny_model(sliding_window=6)
    first, second = tokens(1, 4, seed=1), tokens(1, 3, seed=2)
    row = torch.cat((first, second, torch.zeros(1, 2, dtype=torch.long)), dim=1)
    expected = torch.cat((model(first).logits, model(second).logits), dim=1)
    negative = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1, -1]])
    close(model(row, document_ids=negative).logits[:, :7], expected)
    mask = (negative >= 0).long()
    close(model(row, document_ids=negative.clamp(min=0), attention_mask=mask).logits[:, :4], expected[:, :4])


def test_positions_only_matter_as_distances():
    model, ids = tiny_model(sliding_window=5), tokens(2, 20)
    shifted = torch.arange(20)[None] + 10**7
    close(model(ids, position_ids=shifted).logits, model(ids).logits, 1e-4)
    without = tiny_model(sliding_window=5, use_rotary=False)
    assert torch.equal(without(ids, position_ids=shifted).logits, without(ids).logits)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 2, 1]])}, "only 0 .padding. and 1"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask: expected \[2, 4\]"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, "four-dimensional masks"),
        ({"position_ids": torch.arange(5)[None]}, r"position_ids: expected \[2, 4\]"),
        ({"document_ids": torch.zeros(1, 4).long()}, r"document_ids: expected \[2, 4\]"),
        ({"document_ids": torch.tensor([[0, 1, 0, 1]] * 2)}, "returns to document"),
        ({"inputs_embeds": torch.zeros(2, 4, 32)}, "exactly one of input_ids"),
    ],
)
def test_bad_inputs_are_named(extra, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(tokens(2, 4), **extra)


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("make_cache", [lambda c: DynamicCache(config=c), SlotCache], ids=["stock", "slots"])
def test_decoding_after_right_padding_goes_on_over_a_hole(make_cache, kind, function):
    """What was refused: nobody sees the padding, and distances are those of one pass over the whole mask."""
    model = tiny_model(sliding_window=WINDOWS[kind], score_function=function)
    ids, mask = pad([tokens(1, 3)[0], tokens(1, 6)[0]], "right")
    longer, more = torch.cat((mask, torch.ones(2, 3, dtype=torch.long)), dim=1), tokens(2, 3)
    with torch.no_grad():
        whole = model(torch.cat((ids, more), dim=1), attention_mask=longer).logits
        cache = make_cache(model.config)
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        for place in range(3):
            part, seen = more[:, place : place + 1], longer[:, : 7 + place]
            stepped = model(part, attention_mask=seen, past_key_values=cache, use_cache=True).logits
            close(stepped[:, 0], whole[:, 6 + place])
    # and what stands in the hole does not matter
    noisy = torch.where(mask == 1, ids, tokens(2, 6, seed=8))
    close(model(torch.cat((noisy, more), dim=1), attention_mask=longer).logits[:, 6:], whole[:, 6:])


@pytest.mark.parametrize("make_cache", [lambda c: DynamicCache(config=c), SlotCache], ids=["stock", "ring"])
def test_packed_rows_do_not_enter_a_cache(make_cache):
    model = tiny_model()
    with torch.no_grad(), pytest.raises(ValueError, match="packed documents cannot be decoded from"):
        model(tokens(1, 4), document_ids=torch.tensor([[0, 0, 1, 1]]), past_key_values=make_cache(model.config))
