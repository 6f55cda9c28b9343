"""SPARSEK as a layer: its limits, what it keeps far into a stream, its controls, and what cannot be set."""

import pytest
import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.layers.sparsek import SparsekLayer
from swat_lm.layers.sparsek_settings import SparsekSettings

VOCABULARY = 40


def model(*layers, seed: int = 0, **changes) -> SwatForCausalLM:
    torch.manual_seed(seed)
    config = SwatConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=len(layers), layers=list(layers),
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, **changes,
    )  # fmt: skip
    return SwatForCausalLM(config).double().eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("settings", "attention"),
    [
        # as many as there are: all of them, and a mask of ones
        ({"k": 30, "sliding_window": 0}, {"sliding_window": None}),
        ({"k": 26, "sliding_window": 4}, {"sliding_window": None}),
        # none: the window alone
        ({"k": 0, "sliding_window": 6}, {"sliding_window": 6}),
    ],
)
@pytest.mark.parametrize("masking", ["value", "both", "straight"])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_its_limits_are_attention(settings, attention, masking, score_function):
    mine = model({"kind": "sparsek", "masking": masking, "score_function": score_function, **settings})
    theirs = model({"kind": "attention", "slopes": "none", "score_function": score_function, **attention})
    missing = theirs.load_state_dict(mine.state_dict(), strict=False)
    assert not missing.missing_keys
    ids = tokens(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(mine(ids).logits, theirs(ids).logits, rtol=0, atol=1e-12)


def test_scores_have_a_gradient_and_decide():
    one = model({"kind": "sparsek", "k": 3, "sliding_window": 2})
    ids = tokens(2, 40)
    one(ids, labels=ids).loss.backward()
    weight = one.model.layers[0].self_attn.score_proj.weight
    assert weight.grad.abs().min() > 0
    before = one(ids).logits
    with torch.no_grad():
        weight.neg_()
    assert (one(ids).logits[:, :5] - before[:, :5]).abs().max() < 1e-12
    assert (one(ids).logits[:, 20:] - before[:, 20:]).abs().max() > 1e-3


def test_far_into_a_stream():
    """A stream at position 10^8: scores keep the steps of their slope, and the state its size."""
    layers = [{"kind": "sparsek", "k": 3, "candidates": 6, "sliding_window": 4, "position_slope": 1e-6}] * 2
    one, ids = model(*layers, use_rotary=False), tokens(1, 60)

    def read(position: int) -> tuple[torch.Tensor, int]:
        state = one.init_state(1)
        one.prefill(ids[:, :20], state)
        # what is scored from now on lies that far behind: old scores are moved along, so that only the slope acts
        state.position += position
        for layer in state.layers:
            for name in ("near_score", "top_score"):
                layer[name] += 1e-6 * position
        # a chunk, then steps
        chunk = one.lm_head(one.extend(ids[:, 20:30], state))
        steps = [one.decode_step(token, state) for token in ids[:, 30:].split(1, dim=1)]
        return torch.cat((chunk, torch.stack(steps, dim=1)), dim=1), state.num_bytes

    # a multiple of the ring's places, so that its items stay where they are
    near, far = read(0), read(10**8 - 10**8 % 5)
    torch.testing.assert_close(far[0], near[0], rtol=0, atol=1e-7)
    assert near[1] == far[1]


def test_training_tells_how_many_scores_are_free():
    one, ids = model({"kind": "sparsek", "k": 4, "sliding_window": 3}).train(), tokens(2, 30)
    told = one(ids, labels=ids).auxiliary[0].metrics
    assert told["free_scores"] == told["free_scores_0"]
    # close together at the start: most of the candidates; far apart: none, and scores learn no more
    assert told["free_scores"] > 3
    with torch.no_grad():
        one.model.layers[0].self_attn.score_proj.weight.mul_(1e4)
    assert one(ids, labels=ids).auxiliary[0].metrics["free_scores"] < 0.5
    assert one.eval()(ids, labels=ids).auxiliary is None


@pytest.mark.parametrize("selection", ["recent", "random"])
def test_controls_select_without_learning(selection):
    one = model({"kind": "sparsek", "k": 4, "sliding_window": 3, "selection": selection})
    assert one.model.layers[0].self_attn.score_proj is None
    ids = tokens(1, 30)
    embedded = one.model.embed_tokens(ids).detach().requires_grad_()
    one(inputs_embeds=embedded).logits[0, -1].sum().backward()
    seen = embedded.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    if selection == "recent":
        assert seen == list(range(23, 30))
    else:
        # each key/value head draws its own four of 27
        assert 3 < len(seen) <= 3 + 2 * 4
        assert seen[-3:] == [27, 28, 29]
        assert seen[0] < 20


def test_by_chance_each_row_and_each_seed_keeps_others():
    one = model({"kind": "sparsek", "k": 4, "sliding_window": 3, "selection": "random"}).train()
    embedded = one.model.embed_tokens(tokens(1, 40).expand(3, -1)).detach().requires_grad_()

    def kept(*seeds: int) -> list[list[int]]:
        embedded.grad = None
        one(inputs_embeds=embedded, noise_seed=torch.tensor(seeds)).logits[:, -1].sum().backward()
        return [row.abs().sum(-1).nonzero().flatten().tolist() for row in embedded.grad]

    first, second, third = kept(1, 2, 1)
    assert first == third != second
    assert kept(3, 1, 2) == [kept(3, 3, 3)[0], first, second]


def test_what_is_kept_is_bounded():
    layer = model({"kind": "sparsek", "k": 5, "sliding_window": 7}).model.layers[0]
    assert isinstance(layer, SparsekLayer)
    kept = {one.name: one.num_elements() for one in layer.state_spec()}
    # keys and values of the window, of the token that leaves it and of k others, and 4 k scores
    assert kept == {
        "near_key": 8 * 2 * 8, "near_value": 8 * 2 * 8, "near_score": 8 * 2,
        "top_score": 2 * 20, "top_key": 2 * 5 * 8, "top_value": 2 * 5 * 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": -1}, "k: expected 0 to"),
        ({"k": 0, "candidates": 4}, "candidates: nothing is selected"),
        ({"k": 0, "sliding_window": 0}, "k: nothing is selected and there is no window"),
        ({"k": 4, "candidates": 4}, r"candidates: expected more than are selected \(k is 4\), got 4"),
        ({"sliding_window": None}, "sliding_window: a window of all tokens leaves none to select"),
        ({"sliding_window": -2}, "sliding_window: expected 0 to"),
        ({"masking": "soft"}, "masking: expected 'value' or 'both' or 'straight', got 'soft'"),
        ({"selection": "best"}, "selection: expected 'learned' or"),
        ({"score_std": 0}, "score_std: expected a positive number"),
        ({"position_slope": -1}, "position_slope: expected a number of at least 0"),
        ({"score_bias": "-log(k)"}, "score_bias: expected a number or"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_key_value_heads: expected a divisor"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        SparsekSettings(**changes)


def test_a_backward_pass_may_stand_under_autocast():
    one, ids = model({"kind": "sparsek", "k": 3, "sliding_window": 4}).float().train(), tokens(2, 12)
    found = []
    for inside in (False, True):
        one.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = one(ids, labels=ids).loss
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        found.append(one.model.layers[0].self_attn.score_proj.weight.grad.clone())
    torch.testing.assert_close(*found, rtol=0.05, atol=0.01)
    assert found[0].any()


@pytest.mark.parametrize("selection", ["learned", "recent", "random"])
def test_what_is_selected_in_float32_is_so_step_by_step(selection: str):
    """A threshold that rounds to a score would drop a key of `random`, whose scores are far apart."""
    one = model({"kind": "sparsek", "k": 3, "sliding_window": 2, "selection": selection}).float()
    ids = tokens(2, 64)
    with torch.no_grad():
        whole = one(ids).logits
        state = one.init_state(2)
        steps = torch.stack([one.decode_step(ids[:, at : at + 1], state) for at in range(64)], dim=1)
        torch.testing.assert_close(steps, whole, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.double()(ids).logits.float(), whole, rtol=0, atol=1e-5)
