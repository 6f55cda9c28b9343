"""Taipan's layer: the equations against plain PyTorch, the gate's gradient, its budget, its noise, what it computes."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.selective_attention import SelectiveAttention
from swat_lm.layers.taipan import TaipanLayer
from swat_lm.model.pasts import Rows, SlotPast
from swat_lm.ops.noise import logistic
from tests.layers.in_slots import train_once
from tests.layers.subject import Subject, close, one_pass, tokens

LENGTH, WIDTH = 24, 64
SEED = torch.tensor([11, 12])


def subject(**own: Any) -> Subject:
    return Subject("taipan", [{"kind": "taipan", "sliding_window": 6, **own}])


def layer(dtype: torch.dtype = torch.float64, **own: Any) -> TaipanLayer:
    found = subject(**own).model(dtype).model.layers[1]
    assert isinstance(found, TaipanLayer)
    return found


def states(batch: int = 2, seed: int = 3) -> Tensor:
    return torch.randn(batch, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def places(seed: Tensor | None = None) -> Chunk:
    return Chunk(torch.arange(LENGTH)[None], seed=seed)


def shut(found: TaipanLayer, logit: float) -> None:
    """Give every token the same logits."""
    found.mixer.gate.out_proj.weight.data.zero_()
    found.mixer.gate.out_proj.bias.data.copy_(torch.tensor([-logit, logit]))


@pytest.mark.parametrize("execution", ["dense", "sparse"])
def test_a_shut_gate_leaves_the_feed_forward(execution):
    found, hidden = layer(execution=execution), states()
    shut(found, -1e4)
    output = found(hidden, places(), None).hidden
    assert torch.equal(output, hidden + found.mlp(found.post_attention_layernorm(hidden)))


@pytest.mark.parametrize("execution", ["dense", "sparse"])
def test_an_open_gate_is_full_attention_without_positions(execution):
    found, hidden = layer(execution=execution, sliding_window=LENGTH), states()
    shut(found, 1e4)
    mixer, normed = found.mixer, found.input_layernorm(hidden)
    query, key, value = (x.transpose(1, 2) for x in mixer.project(normed))
    heads = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    expected = mixer.o_proj(heads.transpose(1, 2).flatten(2))
    expected = expected + found.mlp(found.post_attention_layernorm(expected))
    close(found(hidden, places(), None).hidden, expected, tolerance=1e-12)


def test_tokens_that_are_not_chosen_pass_bit_for_bit():
    for execution in ("dense", "sparse"):
        found, hidden = layer(execution=execution), states()
        chosen = found.mixer.choose(found.mixer.gate(found.input_layernorm(hidden)), places(SEED)).chosen
        assert 0.2 < chosen.double().mean() < 0.9
        mixed, share, _ = found.mixer(found.input_layernorm(hidden), places(SEED), None)
        between = hidden * (1 - share) + mixed
        assert torch.equal(between[~chosen], hidden[~chosen])
        assert (between[chosen] != hidden[chosen]).any(dim=-1).all()


@pytest.mark.parametrize("own", [{}, {"score_function": "sigmoid"}, {"selection": "random", "capacity": 0.4}])
def test_sparse_is_dense(own):
    """In whole rows, packed ones and with holes; in gradients too where the choice itself has none."""
    ids, documents = tokens(2, LENGTH), torch.tensor([[0] * 9 + [1] * 10 + [-1] * 5, [-1] * 2 + [4] * 15 + [2] * 7])
    mask = (torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.3).long()
    mask[:, -1] = 1
    models = [subject(execution=execution, **own).model().train() for execution in ("dense", "sparse")]
    for given in ({}, {"document_ids": documents}, {"attention_mask": mask}):
        real = mask == 1 if "attention_mask" in given else documents >= 0 if given else slice(None)
        logits = [model(ids, use_cache=False, **given).logits[real] for model in models]
        close(*logits, tolerance=1e-12)
        if own.get("selection") != "random":
            continue
        for model, found in zip(models, logits, strict=True):
            model.zero_grad()
            found.pow(2).sum().backward()
        for (name, dense), (_, sparse) in zip(*(model.named_parameters() for model in models), strict=True):
            close(sparse.grad, dense.grad, name, tolerance=1e-12)


def test_dense_execution_alone_tells_the_gate_what_the_unchosen_missed():
    """For every token the gradient of its probability is alpha times what attention would have changed."""
    hidden = states()
    for execution in ("dense", "sparse"):
        found = layer(execution=execution)
        seen: list[Tensor] = []
        handle = found.mixer.gate.register_forward_hook(lambda _, __, logits, seen=seen: seen.append(logits) or logits)
        mixed, share, _ = found.mixer(found.input_layernorm(hidden), places(SEED), None)
        handle.remove()
        (gradient,) = torch.autograd.grad((hidden * (1 - share) + mixed).pow(2).sum(), seen)
        chosen = found.mixer.choose(seen[0], places(SEED)).chosen
        assert gradient[chosen].any(dim=-1).all()
        assert gradient[~chosen].any(dim=-1).all() == (execution == "dense")
        assert gradient[~chosen].any() == (execution == "dense")


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_budget_pulls_every_token_the_same_way(temperature):
    """Also those that are not chosen, where the paper's equation 3 has the wrong sign."""
    found = layer(temperature=temperature, capacity=0.15, budget_weight=3.0)
    logits = found.mixer.gate(found.input_layernorm(states())).detach().requires_grad_()
    choice = found.mixer.choose(logits, places(SEED))
    total, rows = found.mixer._say(choice, places(SEED)).losses["budget"]
    taken = choice.chosen.double().mean(dim=1)
    close(total, 3 * (0.15 - taken).square().sum())
    assert rows == 2
    (gradient,) = torch.autograd.grad(total, logits)
    noise = logistic(SEED[:, None], 1, torch.arange(LENGTH)[None])
    noisy = (logits[..., 1] - logits[..., 0]).detach() + noise
    assert torch.equal(choice.chosen, noisy > 0)
    probability = (noisy / temperature).sigmoid()
    slope = 3 * 2 * (taken - 0.15)[:, None] / LENGTH * probability * (1 - probability) / temperature
    close(gradient[..., 1], slope, tolerance=1e-12)
    close(gradient[..., 0], -slope, tolerance=1e-12)
    assert (gradient[..., 1] > 0).all()


def test_the_budget_counts_real_tokens_of_rows_that_have_any():
    model, ids = subject().model().train(), tokens(3, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :9], mask[2] = 0, 0
    padded = model(ids, attention_mask=mask, use_cache=False).auxiliary
    alone = [model(ids[:1], use_cache=False).auxiliary, model(ids[1:2, 9:], use_cache=False).auxiliary]
    for index, said in enumerate(padded):
        total, rows = said.losses["budget"]
        assert rows == 2
        close(total, torch.stack([one[index].losses["budget"][0] for one in alone]).sum())


@pytest.mark.parametrize("capacity", [0.1, 0.3, 0.6])
def test_training_keeps_the_budget(capacity):
    """With noise, which is what it counts."""
    assert abs(trained_share(capacity, 20.0) - capacity) < 0.06


def test_a_budget_without_weight_is_none():
    assert abs(trained_share(0.1, 0.0) - 0.1) > 0.2


def trained_share(capacity: float, weight: float) -> float:
    """Of the tokens chosen in the last steps of a short training on cross-entropy and budget."""
    torch.manual_seed(0)
    config = SwatConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        layers=[{"kind": "taipan", "sliding_window": 16, "capacity": capacity, "budget_weight": weight}],
    )  # fmt: skip
    model, ids = SwatForCausalLM(config).train(), tokens(4, 48)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    found = []
    for step in range(40):
        output = model(ids, labels=ids, noise_seed=step)
        total, rows = output.auxiliary[0].losses["budget"]
        (output.loss + total / rows).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(output.auxiliary[0].metrics["selected"].item())
    assert capacity < found[0] < 1
    return sum(found[-12:]) / 12


def test_noise_is_of_the_row_the_layer_and_the_position():
    model, ids = subject().model().train(), tokens(1, LENGTH).expand(2, -1)
    mixers = [one.mixer for one in model.model.layers]
    logits = torch.zeros(2, LENGTH, 2, dtype=torch.float64)

    def chosen(mixer: SelectiveAttention, seed: Tensor, first: int = 0) -> Tensor:
        return mixer.choose(logits, Chunk(first + torch.arange(LENGTH)[None], seed=seed)).chosen

    one = chosen(mixers[0], SEED)
    assert torch.equal(one, chosen(mixers[0], SEED))
    assert torch.equal(one[:, 5:], chosen(mixers[0], SEED, 5)[:, :-5])
    for other in (chosen(mixers[1], SEED), chosen(mixers[0], SEED + 1), chosen(mixers[0], SEED, 1), one.flip(0)):
        assert 0.25 < (one != other).double().mean() < 0.75
    # as a model draws it: from PyTorch's generator, and anew for every pass
    torch.manual_seed(4)
    first, second = (model(ids, noise_seed=None, use_cache=False).logits for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(model(ids, noise_seed=None, use_cache=False).logits, first)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(one_pass(model.eval(), ids, noise_seed=3), one_pass(model, ids, noise_seed=None))


def test_documents_of_a_row_draw_what_each_draws_alone():
    """A position is counted from the document's start, so packing changes no choice: outputs, and how many."""
    model, ids = subject(execution="sparse").model().train(), tokens(1, LENGTH)
    sizes = [9, 1, 14]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))[None]
    seed = torch.tensor([17])
    parts = [model(part, use_cache=False, noise_seed=seed) for part in ids.split(sizes, dim=1)]
    packed = model(ids, document_ids=documents, use_cache=False, noise_seed=seed)
    close(packed.logits, torch.cat([part.logits for part in parts], dim=1), tolerance=1e-12)
    taken = sum(size * part.auxiliary[0].metrics["selected"].item() for size, part in zip(sizes, parts, strict=True))
    assert packed.auxiliary[0].metrics["selected"].item() * LENGTH == pytest.approx(taken)
    quiet = model.eval()(ids, document_ids=documents, use_cache=False).logits
    assert not torch.allclose(packed.logits, quiet)


def test_recomputation_draws_what_the_pass_drew():
    model, ids = subject(execution="sparse").model().train(), tokens(2, LENGTH)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(7)
        output = model(ids, labels=ids, noise_seed=None)
        said = sum(one.losses["budget"][0] for one in output.auxiliary)
        (output.loss + said).backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    for name, gradient in found[0].items():
        close(found[1][name], gradient, name)


def test_no_token_reaches_back_after_training():
    for execution in ("dense", "sparse"):
        model, ids = subject(execution=execution).model(), tokens(2, LENGTH)
        train_once(model)
        for training in (False, True):
            model.train(training)
            changed = ids.clone()
            changed[:, 15] = (changed[:, 15] + 1) % 40
            before, after = (model(one, use_cache=False).logits for one in (ids, changed))
            assert torch.equal(before[:, :15], after[:, :15])
            assert not torch.equal(before[:, 15:], after[:, 15:])


def test_a_step_computes_queries_where_the_gate_opens():
    """And keeps the keys and values of all; a row is the same bit for bit whatever the others do, where asked for."""
    model = subject().model(torch.float32)
    counted: list[int] = []
    for one in model.model.layers:
        one.mixer.q_proj.register_forward_hook(lambda _, given, __: counted.append(given[0].shape[0]))
    state, ids = model.init_state(4), tokens(4, 30)
    for token in ids.split(1, dim=1):
        model.decode_step(token, state)
    kept = [tensor.clone() for tensor in state.snapshot(torch.arange(4)).values()]
    assert all(tensor.flatten(1).any(dim=1).all() for tensor in kept if tensor.is_floating_point())
    assert 0.2 * 240 < sum(counted) < 0.9 * 240
    found, hidden = layer(torch.float32), states().float()[:, :5].flatten(0, 1)[:, None]
    spec = {one.name: one for one in found.state_spec()}

    def stepped(rows: Tensor) -> Tensor:
        kept = {name: torch.zeros(10, one.items, *one.shape) for name, one in spec.items()}
        place = torch.zeros(len(rows), dtype=torch.long)
        past = SlotPast(kept, spec, Rows(torch.arange(len(rows)), place, 1, 0))
        with torch.no_grad():
            return found.step(rows, Chunk(place[:, None], batch_invariant=True), past)

    own = stepped(hidden)[0]
    for seed in range(5):
        others = torch.randn(9, 1, WIDTH, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(stepped(torch.cat((hidden[:1], others)))[0], own)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"capacity": 0.0}, r"layers\[0\] \(taipan\): capacity: expected a share .* above 0 and below 1.*, got 0.0"),
        ({"capacity": 1.0}, "capacity: expected a share"),
        ({"capacity": -0.1}, "capacity: expected a share"),
        ({"capacity": math.nan}, "capacity: expected a share"),
        ({"execution": "sparse", "sliding_window": None}, "execution: 'sparse' gathers the rows of a window"),
        ({"execution": "sparse", "selection": "all"}, "execution: 'sparse' leaves out rows"),
        ({"execution": "fast"}, "execution: expected 'dense' or 'sparse', got 'fast'"),
        ({"selection": "topk"}, "selection: expected 'gate' or 'random' or 'all', got 'topk'"),
        ({"budget_weight": -1.0}, "budget_weight: expected a number of at least 0, got -1.0"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"gate_layers": 3}, "gate_layers: expected 1 or 2, got 3"),
        ({"num_attention_heads": 5}, "num_attention_heads: 5 heads do not divide hidden_size 64"),
        ({"sliding_window": 0}, "sliding_window: expected at least 1"),
        ({"slopes": "balanced"}, "'slopes' is a setting of attention.*, not of taipan"),
    ],
)
def test_what_cannot_be_is_named(own, said):
    with pytest.raises(ValueError, match=said):
        subject(**own).config().plan()


def test_a_seed_of_another_shape_is_named():
    model, ids = subject().model().train(), tokens(2, 5)
    for seed in (torch.tensor([1]), torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match=r"noise_seed: expected a whole number or int64 \[2\]"):
            model(ids, noise_seed=seed)


def test_the_paper_s_softmax_stands_unless_the_entry_says_otherwise():
    plan = Subject("", ["taipan", {"kind": "taipan", "score_function": "sigmoid"}, "attention"]).config().plan()
    assert [entry.settings.score_function for entry in plan] == ["softmax", "sigmoid", "sigmoid"]
    assert [entry.layer_type for entry in plan] == ["sliding_attention"] * 3


def test_the_gate_begins_between_its_capacity_and_all():
    for capacity in (0.1, 0.15, 0.6):
        torch.manual_seed(0)
        config = subject(capacity=capacity).config(initializer_range=0.02)
        model = SwatForCausalLM(config).train()
        said = model(tokens(4, 200), noise_seed=1, use_cache=False).auxiliary
        for one in said:
            assert one.metrics["selected"].item() == pytest.approx((1 + capacity) / 2, abs=0.06)
