"""ECP as a layer: what it equals, how far its layers see together, segments of documents and of long streams."""

import math

import pytest
import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.evaluate.windows import theoretical_reach
from swat_lm.layers.chunk import FARTHEST, Chunk
from swat_lm.layers.ecp_settings import EcpSettings
from swat_lm.model import cost
from swat_lm.model.building import layers_without_weights
from swat_lm.ops.rotary import apply_rotary

VOCABULARY, SEGMENT = 40, 4


def model(*layers, seed: int = 0, **changes) -> SwatForCausalLM:
    torch.manual_seed(seed)
    config = SwatConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=len(layers), layers=list(layers),
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, **changes,
    )  # fmt: skip
    return SwatForCausalLM(config).double().eval()


def ecp(**settings):
    return {"kind": "ecp", "segment": SEGMENT, **settings}


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_it_is_attention_under_a_mask(tied, score_function):
    """The mask {j <= i and floor(j / m) >= floor(i / m) - 1}, and another output projection for the first segment."""
    bias = 0.3 if score_function == "sigmoid" else 0.0
    layer = model(ecp(tied=tied, score_function=score_function, score_bias=bias)).model.layers[0]
    mixer, hidden = layer.self_attn, torch.randn(2, 19, 32, dtype=torch.float64)
    place = torch.arange(19)
    query, *items = (proj(hidden).unflatten(-1, (-1, 8)) for proj in
                     (mixer.q_proj, *((mixer.kv_proj,) if tied else (mixer.k_proj, mixer.v_proj))))  # fmt: skip
    angles = mixer.rotary.angles(place[None], torch.float64)
    query, items[0] = apply_rotary(query, *angles), apply_rotary(items[0], *angles)
    key, value = (one.repeat_interleave(2, dim=2) for one in (items[0], items[-1]))
    segment = place // SEGMENT
    seen = (place <= place[:, None]) & (segment >= segment[:, None] - 1)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(8) + bias
    if score_function == "softmax":
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    else:
        weights = scores.sigmoid() * seen
    heads = torch.einsum("bhij,bjhd->bihd", weights, value).flatten(2)
    expected = torch.where((segment < 1)[:, None], mixer.first_o_proj(heads), mixer.o_proj(heads))
    torch.testing.assert_close(mixer(hidden, Chunk(place[None])).hidden, expected, rtol=0, atol=1e-12)
    assert len(mixer.state_spec()) == (1 if tied else 2)


def test_two_segments_are_full_attention():
    plain = {"tied": False, "first_projection": False, "rotary_layers": "all"}
    mine = model(*[ecp(segment=10, **plain)] * 2)
    theirs = model(*[{"kind": "attention", "slopes": "none", "score_function": "softmax", "sliding_window": None}] * 2)
    theirs.load_state_dict(mine.state_dict())
    ids = tokens(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(mine(ids).logits, theirs(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("look_back", [0, 1, 2])
def test_context_moves_on_by_segments_per_layer(look_back):
    """After L layers the last token of a segment sees (L + 1) m tokens, and none to come; after a step of training."""
    num_layers, length = 3, 9 * SEGMENT
    one, ids = model(*[ecp(look_back=look_back)] * num_layers), tokens(2, length)
    optimizer = torch.optim.AdamW(one.parameters(), lr=0.02)
    one(ids, labels=ids).loss.backward()
    optimizer.step()
    assert cost.reach(one.config) == theoretical_reach(one) == (num_layers * look_back + 1) * SEGMENT
    for place in (0, 6, length - 5, length - 1):
        embedded = one.model.embed_tokens(ids).detach().requires_grad_()
        one(inputs_embeds=embedded).logits[0, place].pow(2).sum().backward()
        seen = embedded.grad[0].abs().sum(-1).nonzero().flatten().tolist()
        first = max(0, place // SEGMENT - num_layers * look_back) * SEGMENT
        assert seen == list(range(first, place + 1))


def test_segments_count_from_where_a_document_begins():
    """A document that begins in the middle of a segment, read in one row, in chunks and alone."""
    one, ids = model(ecp(), ecp()), tokens(1, 22)
    documents = torch.tensor([[0] * 6 + [1] * 16])
    with torch.no_grad():
        packed, alone = one(ids, document_ids=documents).logits[:, 6:], one(ids[:, 6:]).logits
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)
        changed = ids.clone()
        changed[0, 6:10] = (changed[0, 6:10] + 1) % VOCABULARY
        after = one(changed, document_ids=documents).logits[0, 6:]
    # two layers back from the document's fourth segment is its second
    assert (after[:12] - alone[0, :12]).abs().amax(-1).min() > 1e-3
    torch.testing.assert_close(after[12:], alone[0, 12:], rtol=0, atol=1e-12)


def test_far_into_a_stream():
    """At position 2 * 10^9, beyond 32 bits: segments end where they do at 0, in steps, chunks, rows of any slots."""
    one, ids = model(ecp(), ecp(), use_rotary=False), tokens(2, 30)

    def read(position: int) -> torch.Tensor:
        state = one.init_state(2)
        one.prefill(ids[:, :9], state)
        state.position += position
        parts = [one.decode_step(token, state) for token in ids[:, 9:20].split(1, dim=1)]
        read = one.extend(ids[:, 20:25], state)
        parts += list(one.lm_head(read).unbind(1))
        # slots that are named may stand apart, and what they see is cut to 32 bits
        parts.append(one.prefill(ids[:, 25:], state, slot=torch.tensor([0, 1]))[0])
        return torch.stack(parts, dim=1)

    torch.testing.assert_close(read(2 * 10**9), read(0), rtol=0, atol=1e-12)


def test_places_of_tokens_in_their_documents():
    first = torch.tensor([[-3, -3, 2, 2], [1, 1, 1, 4]], dtype=torch.int32)
    assert Chunk(torch.arange(4)[None], first).document_places.tolist() == [[3, 4, 0, 1], [-1, 0, 1, -1]]
    assert Chunk(torch.arange(7, 9)[None]).document_places.tolist() == [[7, 8]]
    # a caller's positions say nothing of where tokens stand, nor those that leave out hidden ones
    assert Chunk(torch.tensor([[7, 7]]), before=5).document_places.tolist() == [[5, 6]]
    far = Chunk(torch.zeros(2, 2), torch.full((2, 2), FARTHEST), before=torch.tensor([[2**40], [9 + 2**31]]))
    assert far.document_places.tolist() == [[2**40, 2**40 + 1], [9 + 2**31, 10 + 2**31]]
    assert far.tail(1).document_places.tolist() == [[2**40 + 1], [10 + 2**31]]


def test_what_is_kept_is_half_of_what_a_window_keeps():
    def held(layer) -> int:
        return cost.state_bytes(model(layer).config)

    assert 2 * held(ecp()) == held(ecp(tied=False)) == held({"kind": "attention", "sliding_window": 2 * SEGMENT})


def test_rotary_is_in_the_first_layer_of_the_kind():
    config = SwatConfig(
        vocab_size=8, hidden_size=32, num_attention_heads=2, num_hidden_layers=5,
        layers=["mamba2", {"kind": "ecp", "segment": 4}, {"kind": "ecp", "segment": 8, "repeat": 2}, "mamba2"],
    )  # fmt: skip
    rotary = [layer.self_attn.rotary is not None for layer in layers_without_weights(config)[1:4]]
    assert rotary == [True, False, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment": 0}, "segment: expected at least 1 token, got 0"),
        ({"segment": 2**30}, "segment: 2 segments of 1,073,741,824 tokens are 2,147,483,648, more than"),
        ({"look_back": -1}, "look_back: expected 0 to 1,024 segments"),
        ({"rotary_layers": "last"}, "rotary_layers: expected 'first' or 'all', got 'last'"),
        ({"score_function": "relu"}, "score_function: expected 'sigmoid' or 'softmax'"),
        ({"score_bias": "-log(m)"}, "score_bias: expected a number or '-log"),
        ({"score_bias": math.inf}, "score_bias: expected a finite number"),
        ({"head_dim": 7}, "head_dim: rotary needs an even head size, got 7"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_key_value_heads: expected a divisor"),
        ({"residual_multiplier": 0.0}, "residual_multiplier: expected a positive number"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected at least 1"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        EcpSettings(**changes)


def test_no_window_can_be_drawn_for_it():
    with pytest.raises(ValueError, match=r"layer 0 \(ecp\): it sees whole segments, so no window can be drawn"):
        model(ecp())(tokens(1, 5), windows=(3,), use_cache=False)
