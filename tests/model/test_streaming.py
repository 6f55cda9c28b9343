"""Streams: any chunking equals one pass, constant memory, to disk and back bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.model.cost import state_bytes
from swat_lm.model.state import load_state, save_state

from .models import VOCABULARY, close, split, tiny_model, tokens

KINDS = {"windowed": 4, "mixed": [3, None], "full": None}


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


@pytest.mark.parametrize("is_arranged", [False, True])
def test_a_row_is_the_same_to_the_bit_whatever_its_mates_hold(is_arranged: bool):
    layers = [
        {"kind": "attention", "sliding_window": 6, "sinks": 2, "score_function": "softmax", "slopes": "none"},
        "mamba2",
        {"kind": "attention", "sliding_window": None},
        {"kind": "spade", "sliding_window": 6, "state_size": 8},
        {"kind": "sparsek", "k": 3, "sliding_window": 4, "score_function": "sigmoid"},
        {"kind": "ecp", "segment": 3, "score_function": "sigmoid"},
        {"kind": "longvq", "codes": 4, "block": 3, "key_size": 16, "state_size": 4},
        {"kind": "taipan", "sliding_window": 6},
    ]
    torch.manual_seed(0)
    model = SwatForCausalLM(SwatConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=len(layers), num_attention_heads=4,
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
