"""What only SPADE's layers do: reach, training and decoding afterwards, what is kept, documents, both ways."""

import copy

import pytest
import torch
from torch import Tensor, nn

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.layers import structured_state
from swat_lm.layers.chunk import Chunk
from swat_lm.model.fingerprint import fingerprint
from swat_lm.ops import long_convolution as convolving
from swat_lm.recipe import TrainRecipe
from swat_lm.train.optimizer import make_optimizer
from tests.exactness import assert_as_exact_as_pytorch
from tests.layers.subject import close, one_pass, tokens

BASE = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "sliding_window": 4, "score_function": "softmax", "slopes": "none",
    "use_rotary": False, "initializer_range": 0.2,
}  # fmt: skip


def plan(**settings) -> list:
    """SPADE at the bottom, windows above it, one relative bias for all."""
    return [{"kind": "spade", "state_size": 8, **settings}, {"kind": "attention", "relative_bias": "shared"}]


def model(layers=None, seed=0, **changes) -> SwatForCausalLM:
    torch.manual_seed(seed)
    return SwatForCausalLM(SwatConfig(**{**BASE, "layers": plan() if layers is None else layers, **changes})).double()


def train(one: SwatForCausalLM, steps: int, length: int, **recipe) -> torch.optim.Optimizer:
    """Some steps of the trainer's own optimizer."""
    optimizer = make_optimizer(one, TrainRecipe(**{"learning_rate": 0.01, "weight_decay": 0.3, **recipe}))
    one.train()
    for step in range(steps):
        ids = tokens(2, length, seed=step)
        one(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    one.eval()
    return optimizer


def ssm_of(one: SwatForCausalLM):
    return one.model.layers[0].self_attn.ssm


def test_it_reaches_what_no_window_does():
    """With the branch a far token counts, far above the rounding that reaches future ones; without it not at all."""
    length, whole = 200, model(plan(time_step_min=0.005, time_step_max=0.02)).eval()
    branchless = copy.deepcopy(whole)
    branchless.model.layers[0].self_attn.fuse.weight.data[:, :32] = 0
    for one, is_far in ((whole, True), (branchless, False)):
        embedded = one.model.embed_tokens(tokens(1, length)).detach().requires_grad_()
        logits = one(inputs_embeds=embedded, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits[0, 150].square().sum(), embedded)
        floor = gradient[0, 151:].abs().max()
        assert floor < 1e-12
        far = gradient[0, 0].abs().max()
        assert far > 1e-5 if is_far else far <= floor


@pytest.mark.parametrize("settings", [{}, {"ssm": "s4d", "taps": "cauchy", "fusion": "stack"}, {"transition_rate": 0.0,
                                      "entry_rate": 0.0, "step_rate": 0.0, "fusion": "add"}], ids=str)  # fmt: skip
def test_it_decodes_after_training_and_beyond_the_trained_length(settings, monkeypatch):
    """Chunks, steps and a longer row than any that was trained on give the same; rows by FFT and tap by tap."""
    one = model(plan(**settings))
    train(one, steps=3, length=12)
    ids = tokens(2, 90, seed=9)
    whole = one_pass(one, ids)
    monkeypatch.setattr(convolving, "DIRECT", 0)
    close(one_pass(one, ids), whole, "by FFT")
    state = one.init_state(2)
    read = [one.prefill(ids[:, :70], state, chunk=33)[0]]
    read += [one.decode_step(token, state) for token in ids[:, 70:].split(1, dim=1)]
    close(torch.stack(read, dim=1).detach(), whole[:, 69:], "prefill and steps")
    again = one.generate(ids[:, :80], max_new_tokens=5, do_sample=False)
    assert torch.equal(again[:, 80], whole[:, 79].argmax(-1))
    half, state = copy.deepcopy(one).float(), one.float().init_state(2)
    steps = torch.stack([one.decode_step(token, state) for token in ids.split(1, dim=1)], dim=1)
    assert_as_exact_as_pytorch(steps, one_pass(half, ids), whole, summed=0.1)


def test_a_document_in_the_middle_of_a_long_row_never_sees_the_one_before():
    """Far beyond the rows that go tap by tap; padding between; exactly no gradient and no number crosses."""
    one = model().eval()
    lengths = (150, 90, 1, 200)
    rows = [tokens(1, length, seed=length) for length in lengths]
    filler = tokens(1, 7, seed=3)
    ids = torch.cat((rows[0], filler, *rows[1:]), dim=1)
    names = torch.repeat_interleave(torch.tensor([0, -1, 1, 2, 3]), torch.tensor([150, 7, 90, 1, 200]))
    documents = names[None]
    expected = torch.cat([one_pass(one, row) for row in rows], dim=1)
    close(one_pass(one, ids, document_ids=documents)[documents >= 0], expected[0])
    embedded = one.model.embed_tokens(ids).detach().requires_grad_()
    logits = one(inputs_embeds=embedded, document_ids=documents, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits[0, 240].square().sum(), embedded)
    assert not gradient[documents != 1].any()
    assert gradient[0, 157].abs().max() > 0
    # and from a carry: the second chunk ends one document and begins others
    carry, parts = one.init_carry("exact"), []
    for part, names in zip(ids.split([80, 100, 268], dim=1), documents.split([80, 100, 268], dim=1), strict=True):
        outputs = one(part, document_ids=names, carry=carry)
        carry = outputs.carry
        parts.append(outputs.logits)
    close(torch.cat(parts, dim=1)[documents >= 0].detach(), expected[0], "with a carry")


def test_rates_freeze_slow_down_and_never_decay():
    one = model(plan(transition_rate=0.0, entry_rate=0.5))
    ssm = ssm_of(one)
    before = {name: value.clone() for name, value in ssm.state_dict().items()}
    assert {name for name, _ in ssm.named_buffers()} == {"log_decay", "angle", "low_rank"}
    # a gradient of zero leaves nothing but weight decay
    optimizer = make_optimizer(one, TrainRecipe(learning_rate=0.01, weight_decay=0.3))
    for parameter in one.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name in ("log_decay", "angle", "low_rank", "entry", "log_step"):
        assert torch.equal(getattr(ssm, name), before[name]), name
    assert not torch.equal(ssm.exit, before["exit"])
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(ssm.entry)] == 0.005
    assert rates[id(ssm.log_step)] == 0.01
    train(one, steps=2, length=8)
    for name in ("log_decay", "angle", "low_rank"):
        assert torch.equal(getattr(ssm, name), before[name]), name
    assert not torch.equal(ssm.entry, before["entry"])
    ssm.angle.requires_grad_(True)
    with pytest.raises(ValueError, match=r"^spade: angle is frozen \(transition_rate: 0\) and asked for a gradient"):
        one(tokens(1, 3))


def test_what_is_kept_follows_every_change(monkeypatch):
    """In evaluation taps are made once; a write, a load, a cast and a step of training make them anew."""
    made = []
    by_powers = structured_state.taps_by_powers
    monkeypatch.setattr(structured_state, "taps_by_powers", lambda *x: (made.append(1), by_powers(*x))[1])
    one, ids = model().eval(), tokens(1, 100)
    first = one_pass(one, ids)
    one_pass(one, ids[:, :80])
    assert len(made) == 1
    # other lengths change no bit of what was asked for before
    one_pass(one, tokens(1, 300))
    assert torch.equal(one_pass(one, ids), first)
    assert len(made) == 2
    ssm = ssm_of(one)

    def is_new(changed: Tensor | None) -> None:
        fresh = copy.deepcopy(one)
        ssm_of(fresh)._kept.clear()
        again = one_pass(one, ids)
        assert torch.equal(again, one_pass(fresh, ids))
        state = one.init_state(1)
        close(one.prefill(ids, state, chunk=64)[0].detach(), again[:, -1].to(one.dtype), tolerance=1e-4)
        if changed is not None:
            assert not torch.equal(again, changed)

    with torch.no_grad():
        ssm.exit.mul_(1.5)
    is_new(first)
    one.load_state_dict(model(seed=5).state_dict())
    is_new(first)
    second = one_pass(one, ids)
    train(one, steps=1, length=70)
    is_new(second)
    is_new(None if one.float() is None else second.float())
    frozen = model(plan(transition_rate=0.0, entry_rate=0.0, step_rate=0.0)).train()
    frozen(ids, labels=ids).loss.backward()
    assert set(ssm_of(frozen)._kept) == {"discrete"}
    frozen.eval()
    assert not ssm_of(frozen)._kept


def test_sizes_that_memory_cannot_hold_are_named_before_any_work(monkeypatch):
    monkeypatch.setattr("swat_lm.ops.memory.available_bytes", lambda device: 2**20)
    with pytest.raises(
        ValueError, match=r"^spade: 16,384 taps of 32 channels need about .* GiB, and 0.0 GiB are free; read"
    ):
        model()(tokens(1, 10000))


def test_a_shared_bias_is_one_parameter(tmp_path):
    """Trained once, saved once, copied and loaded as one; layers that cannot share it are named."""
    one = model([*plan(), {"kind": "attention", "relative_bias": "own"}, "attention"], num_hidden_layers=4)
    names = [name for name, _ in one.named_parameters() if "relative" in name]
    assert names == ["model.layers.2.self_attn.relative_bias.table.weight", "model.shared.relative_bias.weight"]
    nn.init.normal_(one.model.shared["relative_bias"].weight)
    before = one.model.shared["relative_bias"].weight.clone()
    train(one, steps=1, length=9)
    assert not torch.equal(one.model.shared["relative_bias"].weight, before)
    ids = tokens(2, 11)
    expected = one_pass(one, ids)
    one.save_pretrained(tmp_path)
    loaded = SwatForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    other = copy.deepcopy(one)
    for same in (loaded, other):
        assert torch.equal(one_pass(same, ids), expected)
        assert fingerprint(same) == fingerprint(one)
        with torch.no_grad():
            same.model.shared["relative_bias"].weight.zero_()
        assert (one_pass(same, ids) - expected).abs().max() > 1e-3
    assert torch.equal(one_pass(one, ids), expected)
    with pytest.raises(ValueError, match="relative_bias: shared by layers of 4 and of 2 heads"):
        model([plan()[0], {"kind": "attention", "relative_bias": "shared", "num_attention_heads": 2}])


def test_what_is_frozen_is_saved_too(tmp_path):
    one = model(plan(step_rate=0.0)).eval()
    with torch.no_grad():
        ssm_of(one).log_step.sub_(0.5)
    one.save_pretrained(tmp_path)
    loaded = SwatForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(one_pass(loaded, tokens(1, 9)), one_pass(one, tokens(1, 9)))
    assert fingerprint(loaded) == fingerprint(one)
    assert fingerprint(loaded) != fingerprint(model(plan(step_rate=0.0)))


@pytest.mark.parametrize("changes", [{}, {"score_function": "sigmoid", "use_rotary": True, "learned_sink": False},
                                     {"learned_sink": True}], ids=str)  # fmt: skip
def test_both_ways(changes):
    """The definition for one layer, rows that are padded and packed, and named refusals of whatever goes on."""
    layers = [{"kind": "spade", "state_size": 8, "bidirectional": True},
              {"kind": "attention", "bidirectional": True, "relative_bias": "shared"}]  # fmt: skip
    one, ids = model(layers, **changes).eval(), tokens(2, 20)
    embedded = one.model.embed_tokens(ids).detach().requires_grad_()
    logits = one(inputs_embeds=embedded).logits
    (gradient,) = torch.autograd.grad(logits[0, 3].square().sum(), embedded)
    assert gradient[0].abs().amin(1).min() > 0
    assert not gradient[1].any()
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor([7, 1, 12]))[None].expand(2, -1)
    alone = torch.cat([one_pass(one, part) for part in ids.split([7, 1, 12], dim=1)], dim=1)
    close(one_pass(one, ids, document_ids=documents), alone, "packed")
    mask = torch.ones_like(ids)
    mask[0, :6] = mask[1, 15:] = 0
    padded = one_pass(one, ids, mask)
    close(padded[0, 6:], one_pass(one, ids[:1, 6:])[0], "left padding")
    close(padded[1, :15], one_pass(one, ids[1:, :15])[0], "right padding")
    for call in (
        lambda: one.init_state(1), lambda: one.init_carry("exact"), lambda: one(ids, use_cache=True),
        lambda: one.generate(ids, max_new_tokens=2, do_sample=False),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^layer 0 \(spade\): it looks both ways \(bidirectional\)"):
            call()
    # the window's definition, by its own relative bias: a token sees 3 on each side
    attention = one.model.layers[1].self_attn
    nn.init.normal_(one.model.shared["relative_bias"].weight)
    hidden = torch.randn(1, 11, 32, dtype=torch.float64, requires_grad=True)
    chunk = Chunk(torch.arange(11)[None])
    (gradient,) = torch.autograd.grad(attention(hidden, chunk).hidden[0, 5].square().sum(), hidden)
    assert gradient[0].any(dim=1).tolist() == [2 <= place <= 8 for place in range(11)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state_size": 7}, "state_size: expected an even number of at least 2"),
        ({"fusion": "mean"}, "fusion: expected 'concat' or 'add' or 'stack', got 'mean'"),
        ({"ssm": "s5"}, "ssm: expected 's4' or 's4d', got 's5'"),
        ({"taps": "fft"}, "taps: expected 'powers' or 'cauchy', got 'fft'"),
        ({"time_step_min": 0.2}, "time_step_min: expected 0 < time_step_min <= time_step_max, got 0.2, 0.1"),
        ({"step_rate": -1.0}, "step_rate: expected a number of at least 0, got -1.0"),
        ({"relative_bias": "all"}, "relative_bias: expected 'none' or 'own' or 'shared', got 'all'"),
        ({"sliding_window": None}, "relative_bias: holds a number for every distance in a window"),
        ({"attention_backend": "triton"}, "attention_backend: the kernels of 'triton' have no relative_bias, which is"),
        ({"bidirectional": True, "slopes": "balanced"}, "bidirectional: slopes and first tokens count back"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValueError, match=rf"^layers\[0\] \(spade\): {message}"):
        model(plan(**settings))


def test_its_training_step_is_one_graph():
    """Under `torch.compile`, with the same numbers."""
    layer = model().train().model.layers[0]
    hidden, chunk = torch.randn(2, 70, 32, dtype=torch.float64), Chunk(torch.arange(70)[None])
    compiled = torch.compile(lambda x: layer(x, chunk).hidden, backend="eager", fullgraph=True)
    assert torch.equal(compiled(hidden), layer(hidden, chunk).hidden)


def test_what_is_learned_per_head_starts_as_the_settings_say():
    """After a model was made without memory, as Hugging Face's loading does."""
    settings = {"learned_slopes": True, "learned_score_bias": True, "score_bias": -2.0, "slopes": "balanced"}
    made = model(plan(score_function="sigmoid", **settings), slopes="balanced")
    with torch.device("meta"):
        later = SwatForCausalLM(made.config)
    later.to_empty(device="cpu")
    for tensor in (*later.parameters(), *later.buffers()):
        tensor.detach().fill_(torch.nan)
    later.init_weights()
    want, found = (one.model.layers[0].self_attn.attention for one in (made, later))
    assert torch.equal(found.slopes.double(), want.slopes)
    assert torch.equal(found.score_bias.double(), want.score_bias)
    assert want.slopes.abs().min() > 0
    assert all(parameter.isfinite().all() for parameter in later.parameters())


def test_what_it_adds_to_the_stream_may_be_scaled():
    """By the configuration's `layer_scale` or the entry's."""
    for one in (model(layer_scale=0.25), model(plan(layer_scale=0.25))):
        layer = one.model.layers[0]
        for scale in (layer.mixer_scale, layer.feedforward_scale):
            assert (scale == 0.25).all()
            scale.data.zero_()
        hidden = torch.randn(1, 5, 32, dtype=torch.float64)
        assert torch.equal(layer(hidden, Chunk(torch.arange(5)[None])).hidden, hidden)


@torch.no_grad()
def test_what_is_kept_follows_changes_without_a_trace():
    """A write through `.data`, which no version counts, and parameters that are put in for one call."""
    one, ids = model().eval(), tokens(1, 20)
    state = one.init_state(1)
    one.prefill(ids, state)
    name, base = "model.layers.0.self_attn.ssm.exit", ssm_of(one).exit.clone()
    for factor in (1.0, 2.0, 3.0):
        found = torch.func.functional_call(one, {name: base * factor}, (ids,), {"use_cache": False}).logits
        fresh = copy.deepcopy(one)
        ssm_of(fresh).exit.copy_(base * factor)
        assert torch.equal(found, one_pass(fresh, ids)), factor
    first = one_pass(one, ids)
    for change in (lambda ssm: ssm.exit.data.mul_(2), lambda ssm: ssm.log_step.data.sub_(0.5)):
        change(ssm_of(one))
        found, state = one_pass(one, ids), one.init_state(1)
        assert not torch.equal(found, first)
        assert torch.equal(found, one_pass(copy.deepcopy(one), ids))
        close(one.prefill(ids, state)[0], found[:, -1])
        first = found


@torch.no_grad()
def test_what_is_kept_is_bounded(monkeypatch):
    """Powers once for spans of all lengths and for steps, and no more taps than may be kept."""
    one = model().eval()
    state = one.init_state(1)
    for length in (64, 1, 2, 3, 7, 20, 40):
        one.prefill(tokens(1, length), state)
    one.decode_step(tokens(1, 1), state)
    kept = ssm_of(one)._kept
    held = {x.data_ptr() for name, found in kept.items() if name[0] == "spans" for x in found[1].powers}
    held |= {found[1][0].data_ptr() for name, found in kept.items() if name[0] == "step"}
    assert len(held) == 7
    taps = 32 * 8
    monkeypatch.setattr(structured_state, "KEPT_BYTES", (256 + 128) * taps)
    want = {}
    for length in (100, 200, 400, 60, 100, 200, 400, 60):
        found = one_pass(one, tokens(1, length))
        assert torch.equal(want.setdefault(length, found), found)
        assert sum(found[1].nbytes for name, found in kept.items() if name[0] == "taps") <= (256 + 128) * taps
    assert ("taps", 64) in kept


def test_alone_it_takes_the_papers_softmax():
    """Beside T5's bias, whatever the configuration's windows are; what the entry says goes before that."""
    swat = {"score_function": "sigmoid", "slopes": "balanced", "score_bias": -1.0, "learned_slopes": True}

    def settings(**own):
        first, second = model([{"kind": "spade", "state_size": 8, **own}, "attention"], **swat).config.plan()
        assert {name: getattr(second.settings, name) for name in swat} == swat
        return {name: getattr(first.settings, name) for name in (*swat, "relative_bias")}

    paper = {"score_function": "softmax", "slopes": "none", "score_bias": 0.0, "learned_slopes": False}
    assert settings() == {**paper, "relative_bias": "shared"}
    assert settings(slopes="negative")["slopes"] == "negative"
    said = {"score_function": "sigmoid", "slopes": "balanced", "learned_slopes": True, "relative_bias": "none"}
    assert settings(**said) == {**said, "score_bias": -1.0}
    assert settings(learned_slopes=True)["slopes"] == "balanced"
