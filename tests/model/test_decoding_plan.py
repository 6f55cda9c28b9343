"""Weights laid out for decoding: the same model, and one that has changed since is noticed."""

import pytest
import torch

from swat_lm.layers.lean import Matrix

from .models import close, tiny_model, tokens


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "sliding_window": [4, None]},
        {"score_function": "softmax", "learned_sink": True, "output_norm": True, "use_rotary": [True, False]},
        {"score_function": ["softmax", "sigmoid"], "attn_logit_softcapping": 0.3},
        {"layers": [{"kind": "attention", "norm": "rms"}], "norm": "layer"},
        {"qk_norm": True, "attention_bias": True},
    ],
)
def test_arranged_for_decoding_is_the_same_model(tmp_path, changes):
    model, ids = tiny_model(**changes), tokens(2, 20)
    expected, weights = model(ids).logits, {name: value.clone() for name, value in model.state_dict().items()}
    model.arrange_for_decoding()
    assert [plan is None for plan in model._decoding_plan.layers] == ["qk_norm" in changes] * 2
    assert model.lm_head.weight.is_contiguous() == ("tie_word_embeddings" in changes)
    close(model(ids).logits, expected)
    state = model.init_state(2)
    close(torch.stack([model.decode_step(token, state) for token in ids.split(1, dim=1)], dim=1), expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    # no byte is held twice
    storages = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage() for parameter in model.parameters()}
    assert sum(storage.nbytes() for storage in storages.values()) == sum(
        4 * value.numel() for value in model.parameters()
    )


def test_a_plan_notices_that_the_model_has_changed():
    model, ids = tiny_model(), tokens(2, 6)
    model.arrange_for_decoding()

    def served() -> list[bool]:
        return [plan is not None for plan in model._decoding_plan.serving(model.model.stack)]

    def decoded() -> torch.Tensor:
        state = model.init_state(2)
        return torch.stack([model.decode_step(token, state) for token in ids.split(1, dim=1)], dim=1)

    # in place: the plan reads the parameters' own memory
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(2.0)
    assert served() == [True, True]
    close(decoded(), model(ids).logits)
    replaced = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    # layer by layer: the other one is decoded by its plan still
    assert served() == [True, False]
    close(decoded(), model(ids).logits)
    model.model.layers[1].mlp.up_proj = replaced
    assert served() == [True, True]
    handle = replaced.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert served() == [True, False]
    close(decoded(), model(ids).logits)
    handle.remove()
    assert served() == [True, True]
    model.double()
    assert served() == [False, False]
    close(decoded(), model(ids).logits)
    model.arrange_for_decoding()
    close(decoded(), model(ids).logits, 1e-12)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 64])
@pytest.mark.parametrize("by_rows", [False, True])
def test_a_matrix_in_pieces_is_the_matrix(num_threads, by_rows):
    torch.manual_seed(0)
    weight = torch.randn(384, 40) if by_rows else torch.randn(40, 384).t()
    matrix, residual = Matrix(weight.t()), torch.randn(3, 384)
    matrix.cut(num_threads)
    rows = torch.randn(3, 40)
    for count in (1, 3):
        expected = torch.nn.functional.linear(rows[:count], weight)
        torch.testing.assert_close(matrix.times(rows[:count]), expected)
        torch.testing.assert_close(matrix.times_plus(rows[:count], residual[:count]), expected + residual[:count])


@pytest.mark.parametrize("by_rows", [False, True])
def test_a_matrix_in_panels_is_the_matrix_and_each_row_its_own(by_rows):
    torch.manual_seed(0)
    weight = torch.randn(384, 40) if by_rows else torch.randn(40, 384).t()
    matrix, rows, residual = Matrix(weight.t()), torch.randn(60, 40), torch.randn(60, 384)
    matrix.lay_out_panels()
    assert matrix.panel_bytes == 4 * weight.numel()
    for count in (1, 2, 16, 48, 49):
        expected = torch.nn.functional.linear(rows[:count], weight)
        torch.testing.assert_close(matrix.times(rows[:count]), expected)
        torch.testing.assert_close(matrix.times_plus(rows[:count], residual[:count]), expected + residual[:count])
    # to the bit, at any place among any mates
    assert torch.equal(matrix.times(torch.cat((rows[:1], rows[30:37])))[0], matrix.times(rows[:8])[0])
    assert torch.equal(*[matrix.times(rows[list(order)])[order.index(3)] for order in ((3, 9, 8, 7), (5, 6, 1, 3))])
    for outputs, in_panels in ((33, 64), (31, 0), (70, 96)):
        odd = Matrix(torch.randn(40, outputs))
        odd.lay_out_panels()
        assert odd.panel_bytes == 4 * 40 * in_panels
        found = odd.times(rows[:3])
        torch.testing.assert_close(found, rows[:3] @ odd.whole)
        if in_panels:
            assert torch.equal(odd.times(rows[[7, 2, 0]])[1:], found[[2, 0]])


def test_panels_are_made_where_all_fit():
    model, ids = tiny_model(), tokens(2, 6)
    state = model.init_state(2)
    expected = torch.stack([model.decode_step(token, state) for token in ids.split(1, dim=1)])
    needed = model.arrange_for_decoding(panel_bytes=2**30)
    assert needed > 0
    assert model.arrange_for_decoding(panel_bytes=needed - 1) == 0
    assert model.arrange_for_decoding() == 0
    assert model.arrange_for_decoding(panel_bytes=needed) == needed
    state = model.init_state(2)
    close(torch.stack([model.decode_step(token, state) for token in ids.split(1, dim=1)]), expected)


def test_panels_of_weights_that_changed_are_left_alone():
    model, other, ids = tiny_model(hidden_size=64), tiny_model(hidden_size=64), tokens(2, 6)
    assert model.arrange_for_decoding(panel_bytes=2**30)

    def decoded() -> torch.Tensor:
        state = model.init_state(2)
        return torch.cat([model.decode_step(token, state).view(2, 1, -1) for token in ids.split(1, dim=1)], dim=1)

    for change in ("all", "k_proj", "up_proj", "down_proj", "lm_head"):
        with torch.no_grad():
            for name, weight in other.named_parameters():
                if change == "all" or change in name:
                    weight.add_(torch.randn_like(weight), alpha=0.3)
            model.load_state_dict(other.state_dict())
            close(decoded(), model(ids).logits)
    # and made anew they serve again
    assert model.arrange_for_decoding(panel_bytes=2**30)
    close(decoded(), model(ids).logits)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_plan_serves_every_state(num_threads):
    """Streams that stand apart or together, and a ring that grows: as the layers do it one by one."""
    model = tiny_model(hidden_size=128, intermediate_size=256, sliding_window=[4, None])
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[1, :5] = 0
    states = [model.init_state(3) for _ in range(4)]
    for state, padding in zip(states, (mask, mask, None, None), strict=True):
        model.prefill(ids, state, chunk=15, attention_mask=padding)
    more = tokens(3, 60, seed=2).split(1, dim=1)
    expected = [torch.stack([model.decode_step(token, state) for token in more]) for state in states[::2]]
    model.arrange_for_decoding()
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        actual = [torch.stack([model.decode_step(token, state) for token in more]) for state in states[1::2]]
    finally:
        torch.set_num_threads(threads)
    assert model._decoding_plan.num_threads == num_threads
    assert states[1].common_position() is None
    assert states[3].common_position() == 80
    for ours, theirs in zip(actual, expected, strict=True):
        close(ours, theirs)
