"""Streams: any chunking equals one pass, constant memory, to disk and back bit for bit; carries in training."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.layers.lean import Matrix
from swat_lm.model.cost import state_bytes
from swat_lm.model.state import load_state, save_state

from .models import VOCABULARY, close, tiny_model, tokens

KINDS = {"windowed": 4, "mixed": [3, None], "full": None}


def split(ids: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
    bounds = [0, *sorted(cut % ids.shape[1] for cut in cuts), ids.shape[1]]
    return [ids[:, start:end] for start, end in itertools.pairwise(bounds) if end > start]


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 1000), max_size=6),
    steps=st.integers(0, 20),
    kind=st.sampled_from(sorted(KINDS)),
    function=st.sampled_from(["sigmoid", "softmax"]),
)
def test_any_chunking_is_one_pass(length, cuts, steps, kind, function):
    model = tiny_model(sliding_window=KINDS[kind], score_function=function)
    ids = tokens(2, length + steps)
    with torch.no_grad():
        whole = model(ids).logits
    state = model.init_state(2)
    hidden = torch.cat([model.extend(part, state) for part in split(ids[:, :length], cuts)], dim=1)
    close(model.lm_head(hidden), whole[:, :length])
    for place in range(length, length + steps):
        close(model.decode_step(ids[:, place : place + 1], state), whole[:, place])


@pytest.mark.parametrize("window", [1, 2, 7, 64])
def test_token_by_token_is_one_pass(window):
    model = tiny_model(sliding_window=window)
    ids = tokens(2, 5 * window + 9)
    state = model.init_state(2)
    logits = torch.stack([model.decode_step(token, state) for token in ids.split(1, dim=1)], dim=1)
    with torch.no_grad():
        close(logits, model(ids).logits)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_ragged_streams_are_each_alone(chunk):
    model = tiny_model(sliding_window=[4, None])
    rows = [tokens(1, length, seed=length) for length in (2, 13, 7)]
    ids, mask = torch.zeros(3, 13, dtype=torch.long), torch.zeros(3, 13, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, 13 - row.shape[1] :], mask[index, 13 - row.shape[1] :] = row[0], 1
    together, more = model.init_state(3), tokens(3, 9)
    logits, _ = model.prefill(ids, together, chunk=chunk, attention_mask=mask)
    assert together.position.tolist() == [2, 13, 7]
    alone = [model.init_state(1) for _ in rows]
    close(logits, torch.cat([model.prefill(row, state)[0] for row, state in zip(rows, alone, strict=True)]))
    # a step, a chunk, and a step again, at three different positions
    for part in (more[:, :1], more[:, 1:8], more[:, 8:]):
        logits = model.decode_step(part, together) if part.shape[1] == 1 else model.prefill(part, together)[0]
        expected = [model.prefill(part[i : i + 1], state)[0] for i, state in enumerate(alone)]
        close(logits, torch.cat(expected))


def test_memory_is_constant():
    model = tiny_model(sliding_window=7)
    state = model.init_state(3, dtype=torch.bfloat16)
    size = state.num_bytes
    addresses = [ring.data_ptr() for layer in state.layers for ring in layer.values()]
    assert size == state_bytes(model.config, batch=3, dtype_bytes=2) + 3 * 8
    model = model.bfloat16()
    model.prefill(tokens(3, 100), state, chunk=64)
    for token in tokens(3, 20).split(1, dim=1):
        model.decode_step(token, state)
    assert state.num_bytes == size
    assert addresses == [ring.data_ptr() for layer in state.layers for ring in layer.values()]


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


def test_full_attention_state_grows_and_stays_right():
    model, ids = tiny_model(sliding_window=None), tokens(1, 300)
    state = model.init_state(1)
    before = state.num_bytes
    model.prefill(ids[:, :130], state, chunk=50)
    for token in ids[:, 130:].split(1, dim=1):
        logits = model.decode_step(token, state)
    close(logits, model(ids).logits[:, -1])
    assert state.num_bytes > before


def test_state_goes_to_disk_and_back_bit_for_bit(tmp_path):
    model, ids = tiny_model(sliding_window=[4, None]), tokens(2, 60)
    state = model.init_state(2)
    model.prefill(ids[:, :30], state, chunk=11)
    path = tmp_path / "stream.safetensors"
    save_state(state, path)
    loaded = load_state(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert loaded.num_bytes == state.num_bytes
    for token in ids[:, 30:].split(1, dim=1):
        assert torch.equal(model.decode_step(token, loaded), model.decode_step(token, state))


def test_damaged_and_foreign_states_are_refused(tmp_path):
    model, path = tiny_model(), tmp_path / "stream.safetensors"
    save_state(model.init_state(1), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="damaged"):
        load_state(path)
    with pytest.raises(OSError, match="nowhere"):
        load_state(tmp_path / "nowhere")
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="belongs to another model"):
        tiny_model(sliding_window=5).extend(tokens(1, 3), load_state(path))
    with pytest.raises(ValueError, match=r"expected \[1, tokens\]"):
        model.extend(tokens(2, 3), load_state(path))


def test_padding_after_a_stream_has_begun_is_a_hole():
    """Distances go on over it and nobody sees it; so does one pass over the same mask."""
    model, ids = tiny_model(), tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :2] = mask[0, 5] = mask[1, 7:9] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
    for chunk in (1, 3, 12):
        state = model.init_state(2)
        logits, _ = model.prefill(ids[:, :9], state, chunk=chunk, attention_mask=mask[:, :9])
        for place in range(9, 12):
            logits = model.decode_step(ids[:, place : place + 1], state)
            close(logits, whole[:, place])
        noisy = torch.where(mask == 1, ids, tokens(2, 12, seed=5))
        close(model(noisy, attention_mask=mask).logits[mask == 1], whole[mask == 1])


def test_bad_calls_of_streams_are_named():
    model = tiny_model()
    state = model.init_state(2)
    for name, call in {
        "chunk": lambda: model.prefill(tokens(2, 3), state, chunk=0),
        "input_ids": lambda: model.prefill(tokens(2, 0), state),
        "batch_size": lambda: model.init_state(0),
        "mode": lambda: model.init_carry("loose"),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            call()


def test_a_state_of_inference_mode_is_usable_outside():
    model, ids = tiny_model(), tokens(1, 8)
    with torch.inference_mode():
        state = model.init_state(1)
        model.prefill(ids, state)
    model.decode_step(ids[:, :1], state).div_(0.7)
    # and what was computed in between does not reach training
    model.train()(ids, labels=ids).loss.backward()


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


def test_a_stream_at_ten_million_is_as_exact_as_at_zero():
    model = tiny_model(sliding_window=5)
    ids = tokens(1, 20)
    start = model.init_state(1)
    far = model.init_state(1)
    far.position += 10**7
    far.num_columns = 10**7
    # the same rings, so that only the position differs: both streams begin with an empty past of zeros
    far.ragged = start.ragged
    for index in range(20):
        near_logits, far_logits = (model.decode_step(ids[:, index : index + 1], state) for state in (start, far))
    # past the window, the first tokens no longer matter, nor do the zeros before them
    assert near_logits.shape == (1, VOCABULARY)
    close(far_logits, near_logits, 2e-5)


def test_step_refuses_the_state_of_another_model():
    model, state = tiny_model(sliding_window=7), tiny_model(sliding_window=9).init_state(2)
    with pytest.raises(ValueError, match="belongs to another model"):
        model.decode_step(tokens(2, 1), state)
    with pytest.raises(ValueError, match=r"token: expected \[2, 1\], one per stream; got \[2, 2\]"):
        model.decode_step(tokens(2, 2), model.init_state(2))


@pytest.mark.parametrize("padded", [True, False])
def test_streams_do_not_end_with_32_bits(padded):
    model, ids = tiny_model(sliding_window=8, use_rotary=False), tokens(2, 20)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :3] = 0 if padded else 1
    near, far = model.init_state(2), model.init_state(2)
    for state in (near, far):
        model.prefill(ids[:, :12], state, attention_mask=mask)
    # a multiple of the window, so that the same places hold the same distances
    far.position += 2**31
    assert torch.equal(model.extend(ids[:, 12:], near), model.extend(ids[:, 12:], far))


def test_exact_carry_refuses_reentrant_checkpointing():
    model = tiny_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.forward_chunk(tokens(1, 4), model.init_carry("exact"))
    model.forward_chunk(tokens(1, 4), model.init_carry("detached"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.forward_chunk(tokens(1, 4), model.init_carry("exact"))


@pytest.mark.parametrize("is_arranged", [False, True])
def test_a_row_is_the_same_to_the_bit_whatever_its_mates_hold(is_arranged: bool):
    layers = [
        {"kind": "attention", "sliding_window": 6, "sinks": 2, "score_function": "softmax", "slopes": "none"},
        "mamba2",
        {"kind": "attention", "sliding_window": None},
        {"kind": "spade", "sliding_window": 6, "state_size": 8},
        {"kind": "sparsek", "k": 3, "sliding_window": 4, "score_function": "sigmoid"},
        {"kind": "ecp", "segment": 3, "score_function": "sigmoid"},
    ]
    torch.manual_seed(0)
    model = SwatForCausalLM(SwatConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, layers=layers,
    )).eval()  # fmt: skip
    if is_arranged:
        model.arrange_for_decoding()
    prompt = torch.randint(50, (1, 9))

    def logits(slots: list[int], lengths: list[int]) -> torch.Tensor:
        """Of four steps of one row among mates in these slots, which have read so much."""
        state = model.init_state(5)
        model.extend(prompt, state, slot=torch.tensor([slots[0]]))
        for slot, length in zip(slots[1:], lengths, strict=True):
            model.extend(torch.randint(50, (1, length)), state, slot=torch.tensor([slot]))
        found = []
        for _ in range(4):
            tokens = torch.randint(50, (3, 1))
            tokens[0] = 7
            found.append(model.decode_step(tokens, state, torch.tensor(slots), batch_invariant=True)[0])
        return torch.stack(found)

    alone = logits([0, 1, 2], [9, 9])
    for slots, lengths in (([0, 1, 2], [1, 30]), ([4, 0, 2], [3, 12]), ([1, 3, 0], [40, 2])):
        assert torch.equal(logits(slots, lengths), alone)
