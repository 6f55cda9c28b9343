"""First tokens kept beside a window: against the definition, one query at a time, however the rows are read."""

import math

import pytest
import torch
from torch import Tensor

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.layers.attention import AttentionLayer
from swat_lm.layers.attention_settings import AttentionSettings
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.first_tokens import FirstTokens
from swat_lm.layers.window_attention import WindowAttention
from swat_lm.model.cache import SlotCache
from swat_lm.model.cost import plan_costs
from swat_lm.model.inputs import plan_chunk
from swat_lm.model.paged import check_paged

SINKS, WINDOW, LENGTH = 3, 5, 24
SOFTMAX = {"score_function": "softmax", "slopes": "none"}
VARIANTS = {
    "softmax": SOFTMAX,
    "softmax, absolute": {**SOFTMAX, "sink_positions": "absolute"},
    "softmax, learned sink": {**SOFTMAX, "learned_sink": True, "slopes": "negative"},
    "softmax, capped": {**SOFTMAX, "attn_logit_softcapping": 1.5, "attention_multiplier": 0.4},
    "softmax, no rotary": {**SOFTMAX, "use_rotary": False},
    "sigmoid": {"score_bias": "-log(window)"},
    "sigmoid, absolute": {"slopes": "none", "sink_positions": "absolute", "qk_norm": True, "output_norm": True},
}


def config(**changes: object) -> SwatConfig:
    return SwatConfig(**{
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "sliding_window": WINDOW,
        "sinks": SINKS, **changes,
    })  # fmt: skip


def built(**changes: object) -> SwatForCausalLM:
    torch.manual_seed(0)
    model = SwatForCausalLM(config(**changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def turned(x: Tensor, attention: WindowAttention, place: int) -> Tensor:
    """One head `[D]` rotated to a place."""
    if attention.rotary is None:
        return x
    cos, sin = (angle[0] for angle in attention.rotary.angles(torch.tensor([place]), torch.float64))
    first, second = x.chunk(2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin))


def defined(attention: WindowAttention, hidden: Tensor, real: list[bool]) -> Tensor:
    """The output `[T, M]` for one document `[T, M]`, of which some tokens are hidden."""
    settings: AttentionSettings = attention.settings
    query, key, value = (part[0] for part in attention.project(hidden[None]))
    slopes, group = attention._slopes, settings.num_attention_heads // settings.num_key_value_heads
    position = [sum(real[:place]) for place in range(len(real))]
    firsts = [place for place in range(len(real)) if real[place]][:SINKS]
    rows = []
    for place in range(len(real)):
        inside = [one for one in range(max(0, place - WINDOW + 1), place + 1) if real[one]]
        gone = [one for one in firsts if one <= place - WINDOW]
        heads = []
        for head in range(settings.num_attention_heads):
            scores, values = [], []
            slope = 0.0 if slopes is None else float(slopes[head])
            for number, one in enumerate(gone + inside):
                own, other, distance = position[place], position[one], place - one
                if number < len(gone) and settings.sink_positions == "cache":
                    # the last of those that have gone stands right before the window
                    own, other = WINDOW - 1 + len(gone), number
                    distance = own - other
                left, right = query[place, head], key[one, head // group]
                product = attention.scale * turned(left, attention, own) @ turned(right, attention, other)
                if settings.attn_logit_softcapping is not None:
                    product = settings.attn_logit_softcapping * (product / settings.attn_logit_softcapping).tanh()
                scores.append(product + slope * distance + attention.bias())
                values.append(value[one, head // group])
            if not scores:
                heads.append(torch.zeros_like(value[0, 0]))
                continue
            score = torch.stack(scores)
            if settings.score_function == "sigmoid":
                weights = score.sigmoid()
            elif attention.sink is None:
                weights = score.softmax(0)
            else:
                weights = torch.cat((score, attention.sink[head : head + 1])).softmax(0)[:-1]
            heads.append(weights @ torch.stack(values))
        output = torch.stack(heads)
        rows.append((output if attention.output_norm is None else attention.output_norm(output)).flatten())
    return attention.o_proj(torch.stack(rows))


def mixer_of(model: SwatForCausalLM) -> WindowAttention:
    layer = model.model.stack[0]
    assert isinstance(layer, AttentionLayer)
    return layer.self_attn


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_what_the_definition_says(variant: str):
    attention = mixer_of(built(**VARIANTS[variant]))
    hidden = torch.randn(1, LENGTH, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = defined(attention, hidden[0], [True] * LENGTH)
        found = attention(hidden, Chunk(torch.arange(LENGTH)[None])).hidden[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ["softmax", "sigmoid", "sigmoid, absolute"])
def test_every_document_has_its_own(variant: str):
    attention = mixer_of(built(**VARIANTS[variant]))
    sizes = [[2, 9, 1, 12], [13, 11]]
    ids = torch.tensor([[number for number, size in enumerate(row) for _ in range(size)] for row in sizes])
    hidden = torch.randn(2, LENGTH, 32, dtype=torch.float64)
    with torch.no_grad():
        found = attention(hidden, plan_chunk(2, LENGTH, 0, ids.device, document_ids=ids)).hidden
        for row, row_sizes in enumerate(sizes):
            parts = [defined(attention, part, [True] * len(part)) for part in hidden[row].split(row_sizes)]
            torch.testing.assert_close(found[row], torch.cat(parts), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ["softmax", "softmax, absolute", "sigmoid"])
def test_padding_and_hidden_tokens_are_never_among_them(variant: str):
    attention = mixer_of(built(**VARIANTS[variant]))
    hidden = torch.randn(3, LENGTH, 32, dtype=torch.float64)
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    mask[1, :4] = 0
    mask[2, [1, 2, 9]] = 0
    with torch.no_grad():
        found = attention(hidden, plan_chunk(3, LENGTH, 0, mask.device, attention_mask=mask)).hidden
        for row, start in ((0, 0), (1, 4), (2, 0)):
            real = mask[row, start:].bool()
            expected = defined(attention, hidden[row, start:], real.tolist())
            torch.testing.assert_close(found[row, start:][real], expected[real], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_and_steps_of_streams_that_stand_apart_are_one_pass(variant: str):
    model = built(**VARIANTS[variant])
    ids = torch.randint(40, (3, LENGTH))
    lengths = torch.tensor([LENGTH, 9, 1])
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for arranged in (False, True):
        if arranged:
            model.arrange_for_decoding()
        state = model.init_state(3)
        model.extend(ids[:, :13], state, lengths=lengths.clamp(max=13))
        model.extend(ids[:, 13:], state, lengths=(lengths - 13).clamp(min=0))
        kept = state.snapshot(torch.arange(3))
        other = model.init_state(3)
        other.restore(torch.tensor([2, 0, 1]), kept)
        for step in range(12):
            # every row by itself reads on where it stands
            place = (lengths + step)[[1, 2]]
            slot = torch.tensor([0, 1])
            found = model.decode_step(ids[[1, 2], place][:, None], other, slot)
            torch.testing.assert_close(found, whole[[1, 2], place], rtol=1e-9, atol=1e-9)


def test_streams_side_by_side_decode_as_one_pass():
    model = built(**SOFTMAX)
    ids = torch.randint(40, (2, 40))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for arranged in (False, True):
        if arranged:
            model.arrange_for_decoding()
        state = model.init_state(2)
        for place in range(39):
            found = model.decode_step(ids[:, place : place + 1], state)
            torch.testing.assert_close(found, whole[:, place], rtol=1e-9, atol=1e-9)
        # steps are counted where chunks look
        last = model.lm_head(model.extend(ids[:, 39:], state))[:, 0]
        torch.testing.assert_close(last, whole[:, 39], rtol=1e-9, atol=1e-9)


def test_a_stream_of_a_million_tokens_keeps_its_size_and_its_first_tokens():
    model = built(
        **SOFTMAX, num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1
    ).float()
    ids = torch.randint(40, (1, 2**15))
    state = model.init_state(1)
    size = None
    for _ in range(31):
        model.extend(ids, state)
        size = size or state.num_bytes
        assert state.num_bytes == size
    assert int(state.position[0]) > 10**6
    # behind a million tokens what is seen is what is seen behind a few: one layer reaches no farther
    near = model.init_state(1)
    model.extend(torch.cat((ids[:, :SINKS], ids[:, -2 * WINDOW :]), dim=1), near)
    token = torch.tensor([[7]])
    torch.testing.assert_close(model.decode_step(token, state), model.decode_step(token, near), rtol=1e-4, atol=1e-4)


def test_within_window_and_first_tokens_it_is_full_attention():
    model, full = built(**SOFTMAX), built(**SOFTMAX, sliding_window=None, sinks=0)
    full.load_state_dict(model.state_dict())
    ids = torch.randint(40, (2, WINDOW + SINKS))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, full(ids).logits, rtol=1e-10, atol=1e-10)


def test_what_cannot_be_is_refused():
    for changes, message in (
        ({"sinks": -1}, "expected a number of first tokens"),
        ({"sinks": 10**6}, "expected at most 65,536 first tokens"),
        ({"sliding_window": None}, "no layer has one"),
        ({"layers": [{"kind": "attention", "sliding_window": None, "sinks": 2}]}, "give it a sliding_window"),
        ({"layers": ["mamba2"]}, "no layer has one"),
        ({"layers": [{"kind": "mamba2", "sinks": 4}]}, "is a setting of attention.*, not of mamba2"),
        ({"sink_positions": "absolute"}, "a slope has no bound"),
        ({"layers": [{"kind": "attention", "sink_positions": "there"}]}, "expected 'cache' or 'absolute', got 'there'"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**changes)
    # a layer of full attention among windows sees all anyway
    mixed = config(sliding_window=[WINDOW, None])
    assert [entry.settings.sinks for entry in mixed.plan()] == [SINKS, 0]
    assert math.isclose(mixed.attention_settings(0).bias(), 0.0)


def test_what_has_no_place_for_them_says_so():
    model = built(**SOFTMAX)
    ids = torch.randint(40, (1, 12))
    with pytest.raises(ValueError, match=r"keeps first tokens \(sinks\) of its past, which cannot be taken back"):
        model.generate(ids, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="keeps 3 first tokens beside its window"):
        check_paged(model.config)
    cache = SlotCache(model.config)
    model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
    # the first token is kept: it cannot be hidden any more
    later = torch.ones(1, 13, dtype=torch.int64)
    later[0, 0] = 0
    with pytest.raises(ValueError, match="hides tokens that were read"):
        model(torch.ones(1, 2, dtype=torch.int64), attention_mask=torch.nn.functional.pad(later, (0, 1)),
              past_key_values=cache)  # fmt: skip
    assert plan_costs(model.config, 100)[0].words == "window 5 and the first 3"


def test_padding_behind_a_document_sees_nothing_of_it():
    attention = mixer_of(built(**SOFTMAX))
    hidden = torch.randn(1, LENGTH, 32, dtype=torch.float64)
    ids = torch.tensor([[0] * 9 + [-1] * 3 + [1] * 9 + [-1] * 3])
    with torch.no_grad():
        found = attention(hidden, plan_chunk(1, LENGTH, 0, ids.device, document_ids=ids)).hidden[0]
        expected = [defined(attention, hidden[0, part], [True] * 9) for part in (slice(0, 9), slice(12, 21))]
    torch.testing.assert_close(found[ids[0] >= 0], torch.cat(expected), rtol=1e-10, atol=1e-10)
    assert not found[ids[0] < 0].any()


def test_a_row_is_the_same_to_the_bit_at_any_place_of_a_batch():
    model = built(sinks=3).float()
    prompt, found = torch.randint(40, (1, 11)), []
    for place in range(4):
        state = model.init_state(4)
        for slot in range(4):
            text = prompt if slot == place else torch.randint(40, (1, 9 + slot))
            model.extend(text, state, slot=torch.tensor([slot]), num_past=0)
        tokens = torch.randint(40, (4, 1))
        tokens[place] = 5
        found.append(model.decode_step(tokens, state, torch.arange(4), batch_invariant=True)[place])
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("changes", [{"sinks": 3}, SOFTMAX], ids=["sigmoid", "softmax"])
def test_a_row_inside_its_window_does_not_notice_who_is_behind_theirs(changes):
    # on a CPU first tokens are attended to only where some row has one behind its window
    model, found = built(**changes).float(), []
    for length in (2, WINDOW - 2, 30):
        state = model.init_state(2)
        for slot, text in enumerate((torch.arange(2)[None], torch.arange(length)[None])):
            model.extend(text, state, slot=torch.tensor([slot]), num_past=0)
        # the first token of these that is decoded is one to keep, and later ones come to stand behind the window
        steps = [
            model.decode_step(torch.full((2, 1), token), state, torch.arange(2), batch_invariant=True)[0]
            for token in range(9)
        ]
        found.append(torch.stack(steps))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("changes", [{"sinks": 3}, SOFTMAX], ids=["sigmoid", "softmax"])
def test_a_chunk_inside_its_window_attends_to_no_first_tokens(changes, monkeypatch):
    model, found, ids = built(**changes), [], torch.randint(40, (1, WINDOW + 9))

    def refuse(*_):
        raise AssertionError("first tokens were attended to")

    for cuts in ((2, WINDOW - 2, 9), (WINDOW + 9,)):
        state, parts = model.init_state(1), []
        for part in ids.split(cuts, dim=1):
            with monkeypatch.context() as patch:
                if int(state.position) + part.shape[1] <= WINDOW:
                    patch.setattr(FirstTokens, "_operator", refuse)
                parts.append(model.extend(part, state))
        found.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_graphs_serve_lengths_on_either_side_of_the_window():
    model = built(**SOFTMAX).float()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=512)
    ids = torch.randint(40, (2, 12))
    exported = torch.export.export(
        Logits(model), (ids, torch.ones_like(ids)), dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}),
        strict=False,
    ).module()  # fmt: skip
    for rows, size in ((3, 4), (2, 30)):
        ids = torch.randint(40, (rows, size))
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(exported(ids, mask)[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)


class Logits(torch.nn.Module):
    """A model as a function of ids and mask."""

    def __init__(self, model: SwatForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids, attention_mask=mask, use_cache=False).logits


def test_what_a_chunk_is_told_of_its_past_is_checked():
    model = built(**SOFTMAX)
    state = model.init_state(2)
    assert model.extend(torch.zeros(2, 0, dtype=torch.int64), state).shape == (2, 0, 32)
    model.extend(torch.randint(40, (2, 7)), state)
    for wrong in (0, 50, -3):
        with pytest.raises(ValueError, match=f"num_past: the row that has read most has read 7 tokens, got {wrong}"):
            model.extend(torch.randint(40, (2, 2)), state, num_past=wrong)
    state._hold_holes()
    with pytest.raises(ValueError, match="batch_invariant: tokens are hidden in these slots"):
        model.decode_step(torch.zeros(2, 1, dtype=torch.int64), state, batch_invariant=True)
