"""LongVQ (reconstruction) as a layer: what it equals, its gates, what its codebook learns of and when, both ways."""

import math
import re
import warnings

import pytest
import torch
from torch import Tensor

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.codebook import BUFFERS, KeyCodebook
from swat_lm.layers.longvq import LongVqLayer
from swat_lm.layers.longvq_settings import LongVqSettings
from swat_lm.model.execution import run_layers
from swat_lm.ops.codebook import Seen
from swat_lm.train.objectives import NextToken
from tests.layers.in_training import packed_rows
from tests.layers.subject import close, one_pass, tokens

BLOCK = 3


def longvq(**settings):
    return {"kind": "longvq", "block": BLOCK, "key_size": 8, "state_size": 4, **settings}


def model(*layers, seed: int = 0, **changes) -> SwatForCausalLM:
    torch.manual_seed(seed)
    config = SwatConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=len(layers), layers=list(layers),
        initializer_range=0.2, **changes,
    )  # fmt: skip
    return SwatForCausalLM(config).double().eval()


def layer_of(one: SwatForCausalLM) -> LongVqLayer:
    (layer,) = one.model.layers
    assert isinstance(layer, LongVqLayer)
    return layer


def keys_of(layer: LongVqLayer, hidden: Tensor) -> Tensor:
    """Of one document, `[B, T, D]`."""
    normed, mixer = layer.input_layernorm(hidden), layer.mixer
    mixed = normed if mixer.ssm is None else mixer.ssm(normed, Chunk(torch.arange(hidden.shape[1])[None]), None)
    return mixer._project(normed, mixed).key


@pytest.mark.parametrize("both_ways", [False, True])
def test_with_a_code_for_every_key_it_is_full_attention(both_ways):
    """The control with keys as they are holds the same weights; in gradients of all but far keys too."""
    length, hidden = 17, torch.randn(1, 17, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    quantised = layer_of(model(longvq(codes=length, bidirectional=both_ways)))
    exact = layer_of(model(longvq(attention="exact", bidirectional=both_ways), seed=1))
    with torch.no_grad():
        quantised.mixer.codebook.codes.copy_(keys_of(quantised, hidden)[0])
    weights = {name: one for name, one in quantised.state_dict().items() if "codebook" not in name}
    exact.load_state_dict(weights)
    chunk = Chunk(torch.arange(length)[None])
    outputs = [run_layers([layer], hidden, chunk)[0] for layer in (quantised, exact)]
    close(outputs[0], outputs[1])
    one, other = (
        torch.autograd.grad(output.square().sum(), layer.mixer.v_proj.weight)[0]
        for output, layer in zip(outputs, (quantised, exact), strict=True)
    )
    close(one, other)
    # with fewer codes than keys it is not
    with torch.no_grad():
        quantised.mixer.codebook.codes[1:].fill_(1e3)
    assert (run_layers([quantised], hidden, chunk)[0] - outputs[1]).abs().max() > 0.1


def test_a_closed_update_gate_changes_nothing_and_a_closed_reset_gate_leaves_the_state_space():
    layer, hidden = layer_of(model(longvq(codes=5))), torch.randn(2, 9, 32, dtype=torch.float64)
    chunk = Chunk(torch.arange(9)[None])
    with torch.no_grad():
        layer.mlp.down_proj.weight.zero_()
        whole = run_layers([layer], hidden, chunk)[0]
        layer.mixer.in_proj.bias[:32] = -1e4
        assert torch.equal(run_layers([layer], hidden, chunk)[0], hidden)
        layer.mixer.in_proj.bias[:32] = 0
        layer.mixer.in_proj.weight[64 : 64 + 64] = 0
        layer.mixer.in_proj.bias[64 : 64 + 64] = 0
        without = run_layers([layer], hidden, chunk)[0]
        assert (without - whole).abs().max() > 1e-3
        alone = layer_of(model(longvq_without_attention(), seed=1))
        names = {"input_layernorm.weight", "post_attention_layernorm.weight"}
        kept = {name: one for name, one in layer.state_dict().items() if name in names or ".ssm." in name}
        alone.load_state_dict(kept, strict=False)
        alone.mixer.in_proj.weight.copy_(layer.mixer.in_proj.weight[:64])
        alone.mixer.in_proj.bias.copy_(layer.mixer.in_proj.bias[:64])
        alone.mlp.down_proj.weight.zero_()
        close(run_layers([alone], hidden, chunk)[0], without)


def longvq_without_attention():
    return {"kind": "longvq", "attention": "none", "state_size": 4}


def step_of(one: SwatForCausalLM, ids: Tensor, carry_cuts: list[int] | None = None, **given) -> list[dict[str, Tensor]]:
    """What the layers' codebooks are told in one pass of training, in parts that are added up where it is cut."""
    one.train()
    if carry_cuts is None:
        return [dict(said.statistics) for said in one(ids, labels=ids, noise_seed=3, **given).auxiliary]
    carry, found = one.init_carry("detached"), []
    for part in ids.split(carry_cuts, dim=1):
        output = one(part, shift_labels=part, num_items_in_batch=1, noise_seed=3, carry=carry)
        carry = output.carry
        parts = [said.statistics for said in output.auxiliary]
        found = parts if not found else [{k: a[k] + b[k] for k in a} for a, b in zip(found, parts, strict=True)]
    return found


def test_what_the_codebook_is_told_does_not_depend_on_how_layers_are_run():
    """One pass, checkpointing, chunks, a carry, rows one by one; nothing in evaluation, nothing of padding."""
    one, ids = model(longvq(codes=5), longvq(codes=4)), tokens(3, 22)
    expected = step_of(one, ids)
    assert [list(said) for said in expected] == [[f"codebook_{name}" for name in Seen._fields]] * 2
    assert [said["codebook_counts"].sum().item() for said in expected] == [66, 66]

    def same(found, wanted=expected, scale=1e-9):
        for said, told in zip(found, wanted, strict=True):
            for name, number in told.items():
                torch.testing.assert_close(said[name], number, rtol=scale, atol=1e-9)

    same(step_of(one, ids, carry_cuts=[7, 1, 14]))
    rows = [step_of(one, row) for row in ids.split(1)]
    same([{name: sum(row[i][name] for row in rows) for name in expected[i]} for i in range(2)])
    one.set_execution("chunks", chunk_size=8)
    same(step_of(one, ids))
    one.set_execution("plain")
    one.activation_checkpointing_enable()
    same(step_of(one, ids))
    output = one(ids, labels=ids, noise_seed=3)
    output.loss.backward()
    same([said.statistics for said in output.auxiliary])
    assert all(not said.statistics for said in one.eval()(ids, labels=ids).auxiliary)
    documents = packed_rows()
    packed = step_of(one, ids, document_ids=documents)
    assert [int(said["codebook_counts"].sum()) for said in packed] == [int((documents >= 0).sum())] * 2


def absorbing(one: SwatForCausalLM, said: list[dict[str, Tensor]]) -> None:
    for layer, statistics in zip(one.model.layers, said, strict=True):
        layer.absorb(statistics)


def test_codes_are_those_of_before_the_step_and_training_leaks_nothing_back():
    """Forward and backward change no buffer; and after a whole step the past still does not know of the future."""
    one, ids = model(longvq(codes=6), longvq(codes=6)), tokens(2, 20)
    before = {name: buffer.clone() for name, buffer in one.named_buffers()}
    optimizer = torch.optim.AdamW(one.parameters(), lr=0.01)
    one.train()
    output = one(ids, labels=ids, noise_seed=1)
    output.loss.backward()
    optimizer.step()
    assert all(torch.equal(buffer, before[name]) for name, buffer in one.named_buffers())
    absorbing(one, [dict(said.statistics) for said in output.auxiliary])
    assert not torch.equal(one.model.layers[0].mixer.codebook.codes, before["model.layers.0.mixer.codebook.codes"])
    one.eval()
    changed = ids.clone()
    changed[:, 11] = (ids[:, 11] + 1) % 40
    was, now = one_pass(one, ids), one_pass(one, changed)
    # products of other shapes round otherwise, so nearly is all that can be asked of what comes before
    close(now[:, :11], was[:, :11], tolerance=1e-12)
    assert (now[:, 11:] - was[:, 11:]).abs().max() > 1e-3


def test_it_learns_with_its_codes_in_use():
    """A few steps of the whole: loss and quantisation error fall, more than a quarter of the codes are in use."""
    one, ids = model(longvq(codes=16)), tokens(4, 40)
    optimizer = torch.optim.AdamW(one.parameters(), lr=0.01)
    codebook, losses, used, errors = layer_of(one).mixer.codebook, [], [], []
    codebook.decay = 0.8
    one.train()
    for step in range(12):
        output = one(ids, labels=ids, noise_seed=step)
        (said,) = output.auxiliary
        total, divisor = said.losses["commitment"]
        assert divisor == 160
        errors.append((total / divisor).item())
        losses.append(output.loss.item())
        (output.loss + total / divisor).backward()
        optimizer.step()
        optimizer.zero_grad()
        used.append(one.absorb(output.auxiliary)["codes_used_0"])
    assert losses[-1] < 0.6 * losses[0]
    assert errors[-1] < 0.6 * errors[0]
    assert used[-1] > 16 / 4


def test_a_code_that_nobody_uses_begins_anew_at_a_key():
    one, ids = model(longvq(codes=6, average_decay=0.5)).train(), tokens(3, 30)
    book = layer_of(one).mixer.codebook
    with torch.no_grad():
        # far from every key
        book.codes[4:] = 100.0
        book.counts.fill_(1.0)
        book.totals.copy_(book.codes)
    for step in range(8):
        one.absorb(one(ids, labels=ids, noise_seed=step).auxiliary)
    assert (book.codes.abs() < 10).all()
    used = one.absorb(one(ids, labels=ids, noise_seed=99).auxiliary)["codes_used_0"]
    assert used > 4
    # and stays where it is if nothing is to be revived
    still = model(longvq(codes=6, average_decay=0.5, dead_below=0.0)).train()
    with torch.no_grad():
        layer_of(still).mixer.codebook.codes[4:] = 100.0
    for step in range(5):
        still.absorb(still(ids, labels=ids, noise_seed=step).auxiliary)
    assert (layer_of(still).mixer.codebook.codes[4:] == 100.0).all()


def test_a_loop_of_ones_own_absorbs_the_passes_of_a_step_together():
    """Micro-batches are one step, in the codes, and in how many are in use, which is no mean over parts."""
    ids, books, used = tokens(3, 20), [], []
    for rows in (3, 1):
        one = model(longvq(codes=6), longvq(codes=4)).train()
        passes = [one(part, labels=part, noise_seed=3).auxiliary for part in ids.split(rows)]
        used.append(one.absorb(*passes))
        books.append({name: buffer.clone() for name, buffer in one.named_buffers()})
    assert used[1] == pytest.approx(used[0], rel=1e-6)
    assert 1 < used[0]["codes_used_0"] <= 6
    for name, buffer in books[0].items():
        torch.testing.assert_close(books[1][name], buffer, rtol=1e-6, atol=1e-9)
    assert one.eval().absorb(one(ids).auxiliary, None) == {}
    with pytest.raises(ValueError, match="statistics of layer 1 and the model has 1 layers"):
        model(longvq(codes=6)).absorb(passes[0])


def test_who_never_absorbs_is_told_once():
    one, ids = model(longvq(codes=6)).train(), tokens(1, 9)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(4):
            # two passes of a step are none
            for _ in range(2):
                one(ids, labels=ids).loss.backward()
            optimizer.step()
    (warning,) = told
    assert "model.absorb(outputs.auxiliary) after optimizer.step()" in str(warning.message)
    one = model(longvq(codes=6)).train()
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            output = one(ids, labels=ids)
            output.loss.backward()
            optimizer.step()
            one.absorb(output.auxiliary)


@pytest.mark.parametrize("name", BUFFERS)
def test_an_optimizer_that_would_train_the_codebook_is_refused(name):
    one, ids = model(longvq(codes=5)).train(), tokens(1, 6)
    codebook = layer_of(one).mixer.codebook
    (said,) = one(ids, labels=ids).auxiliary
    assert not {id(buffer) for buffer in codebook.buffers()} & {id(parameter) for parameter in one.parameters()}
    getattr(codebook, name).requires_grad_(True)
    for attempt in (lambda: one(ids), lambda: layer_of(one).absorb(said.statistics)):
        with pytest.raises(ValueError, match=f"longvq: the codebook's {name} ask for a gradient.*requires_grad_"):
            attempt()


def test_the_codebook_keeps_its_bits_in_a_narrow_model():
    one = model(longvq(codes=5)).bfloat16()
    codebook = layer_of(one).mixer.codebook
    assert {buffer.dtype for buffer in codebook.buffers()} == {torch.float32}
    output = one.train()(tokens(1, 9), labels=tokens(1, 9), noise_seed=0)
    output.loss.backward()
    layer_of(one).absorb(output.auxiliary[0].statistics)
    assert all(buffer.isfinite().all() for buffer in codebook.buffers())
    assert isinstance(codebook, KeyCodebook)


def test_both_ways_documents_and_padding_are_alone_and_no_past_goes_on():
    one, lengths = model(longvq(codes=5, bidirectional=True), longvq(codes=4, bidirectional=True)), (1, 9, 4, 14)
    rows = [tokens(1, length, seed=length) for length in lengths]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = one_pass(one, torch.cat(rows, dim=1), document_ids=documents)
    close(packed, torch.cat([one_pass(one, row) for row in rows], dim=1))
    ids, mask = tokens(1, 20), torch.ones(1, 20, dtype=torch.long)
    mask[:, :6] = 0
    close(one_pass(one, ids, mask)[:, 6:], one_pass(one, ids[:, 6:]))
    # every token sees every other
    embedded = one.model.embed_tokens(ids).detach().requires_grad_()
    one(inputs_embeds=embedded, use_cache=False).logits[0, 3].square().sum().backward()
    assert embedded.grad[0].any(dim=-1).all()
    with pytest.raises(ValueError, match="looks both ways"):
        one.init_state(1)
    reason = NextToken.refuses_layer(one.model.layers[0])
    assert "bidirectional" in str(reason)


def test_a_stream_has_no_end():
    """Blocks count from its beginning, counts are whole numbers, sums float64: far into a stream all is as before."""
    one, ids = model(longvq(codes=5)), tokens(2, 30)
    logits = []
    for shift in (0, 10**8 // (2 * BLOCK) * 2 * BLOCK):
        state = one.init_state(2)
        one.prefill(ids[:, :17], state)
        state.position += shift
        logits.append(torch.stack([one.decode_step(token, state) for token in ids[:, 17:].split(1, dim=1)]))
        assert state.layers[0]["code_totals"].dtype == torch.float64
        # two blocks but for one token are near
        assert state.layers[0]["code_counts"].sum(1).tolist() == [30 - 2 * BLOCK + 1] * 2
    close(logits[1], logits[0])
    close(logits[0].transpose(0, 1), one_pass(one, ids)[:, 17:])


def test_a_step_under_autocast_attends_as_precisely_as_a_chunk(monkeypatch):
    """Products of queries and keys are not narrowed by either."""
    widths, matmul = set(), torch.matmul

    def noted(one: Tensor, other: Tensor) -> Tensor:
        found = matmul(one, other)
        widths.add(found.dtype)
        return found

    one, ids = model(longvq(codes=5)).float(), tokens(2, 20)
    state = one.init_state(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one.prefill(ids[:, :19], state)
        monkeypatch.setattr(torch, "matmul", noted)
        one.decode_step(ids[:, 19:], state)
    assert widths == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codes": 0}, "codes: expected at least 1, got 0"),
        ({"codes": 2**17}, "codes: every token is compared with all of them, so expected at most 65,536"),
        ({"block": 0}, "block: expected at least 1, got 0"),
        ({"block": 2**31}, "block: two blocks of .* take shorter ones"),
        ({"key_size": 1}, "key_size: expected at least 2, got 1"),
        ({"attention": "some"}, "attention: expected 'quantised' or 'exact' or 'none', got 'some'"),
        ({"ssm": "lru"}, "ssm: expected 's4' or 's4d' or 'none', got 'lru'"),
        ({"ssm": "none", "attention": "none"}, "ssm: without attention and without a state space"),
        ({"average_decay": 1.0}, "average_decay: expected at least 0 and below 1"),
        ({"dead_below": math.nan}, "dead_below: expected a share"),
        ({"commitment_weight": -1.0}, "commitment_weight: expected a number of at least 0"),
        ({"state_size": 5}, "state_size: expected an even number"),
        ({"taps": "fft"}, "taps: expected 'powers' or 'cauchy'"),
    ],
)
def test_what_does_not_fit_is_named(settings, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        LongVqSettings(**settings)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"attention": "exact", "codes": 5}, "codes: has no meaning with attention: exact"),
        ({"attention": "none", "block": 5}, "block: has no meaning with attention: none"),
        ({"ssm": "none", "state_size": 4}, "state_size: has no meaning with ssm: none"),
    ],
)
def test_an_entry_says_nothing_without_a_meaning(entry, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SwatConfig(hidden_size=32, num_hidden_layers=1, layers=[{"kind": "longvq", **entry}]).plan()


def test_scores_of_all_pairs_that_do_not_fit_are_refused(monkeypatch):
    entry = {"kind": "longvq", "block": BLOCK, "key_size": 8, "attention": "exact", "ssm": "none"}
    one, ids = model(entry), tokens(1, 9)
    monkeypatch.setattr("swat_lm.ops.memory.available_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"longvq: scores of all pairs of 9 keys \(attention: exact\) need about"):
        one_pass(one, ids)
