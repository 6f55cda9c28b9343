"""Blockwise layers give the gradients of whole rows, hold their inputs alone, and form nothing wide or square."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.model.execution.live_bytes import LiveBytes
from swat_lm.model.execution.unread import last_product, unread
from tests.layers.in_training import LENGTH, packed_rows, targets_of
from tests.layers.subject import Subject, close, gradients, name_of, tokens

EXACT = 1e-12
SUBJECTS = [
    Subject("sigmoid window", ["attention"]),
    Subject("sigmoid full", [{"kind": "attention", "sliding_window": None, "score_bias": -1.0}]),
    Subject("softmax, full and window, sinks and norms", [
        {"kind": "attention", "sliding_window": None, "score_function": "softmax", "slopes": "none",
         "learned_sink": True, "attn_logit_softcapping": 0.8, "norm_placement": "both"},
        {"kind": "attention", "sliding_window": 1, "score_function": "softmax", "slopes": "negative", "qk_norm": True,
         "qk_norm_over": "layer", "output_norm": True, "learned_sink": True, "attention_bias": True, "mlp_bias": True,
         "norm": "layer"},
        {"kind": "attention", "sliding_window": None, "score_function": "softmax", "slopes": "negative",
         "use_rotary": False, "qk_norm": True},
    ]),
]  # fmt: skip


@pytest.mark.parametrize("subject", SUBJECTS, ids=name_of)
def test_gradients_are_those_of_whole_rows(subject: Subject):
    model, ids, documents = subject.model().train(), tokens(3, LENGTH), packed_rows()
    mask = torch.ones_like(ids)
    mask[0, :9], mask[1, -8:], mask[2, 3:6] = 0, 0, 0
    inputs = [{"labels": ids}, {"shift_labels": targets_of(ids, documents), "document_ids": documents}]
    inputs += [{"shift_labels": targets_of(ids).masked_fill(mask == 0, -100), "attention_mask": mask}]
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()

    def learnt(one) -> dict[str, torch.Tensor]:
        loss = model(inputs_embeds=embedded, **one).loss
        embedded.grad = None
        model.model.embed_tokens.weight.grad = torch.zeros_like(model.model.embed_tokens.weight)
        found = gradients(model, loss)
        return found | {"loss": loss.detach(), "inputs": embedded.grad}

    expected = [learnt(one) for one in inputs]
    # ragged last blocks, blocks of queries and of keys of other sizes, one longer than the row
    for size, keys in ((5, 3), (7, 16), (LENGTH, 4), (50, 50)):
        model.set_execution("blockwise", block_size=size, key_block_size=keys)
        for one, right in zip(inputs, expected, strict=True):
            found = learnt(one)
            for name, gradient in right.items():
                close(found[name], gradient, f"gradient of {name}", EXACT)
    model.set_execution()
    found = learnt(inputs[0])
    for name, gradient in expected[0].items():
        assert torch.equal(found[name], gradient), name


WIDTH, INNER, TOKENS = 32, 128, 160


def wide(window: int | None) -> SwatForCausalLM:
    torch.manual_seed(0)
    config = SwatConfig(
        vocab_size=40, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=2,
        sliding_window=window,
    )  # fmt: skip
    return SwatForCausalLM(config).train()


@pytest.mark.parametrize("window", [None, 24])
def test_the_input_alone_is_held_and_nothing_wide_or_square_is_formed(window: int | None):
    model, ids = wide(window), tokens(1, TOKENS)
    parameters = {each.untyped_storage()._cdata for each in model.parameters()}
    found = {}
    # from any execution to any other
    blocks = {"block_size": 40, "key_block_size": 32}
    for name, settings in (
        ("blockwise", blocks),
        ("checkpoint", {}),
        ("plain", {}),
        ("checkpoint", {}),
        ("blockwise", blocks),
    ):
        model.set_execution(name, **settings)
        held, sizes = {}, []

        def hold(tensor: torch.Tensor, held=held) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                held[storage._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        hidden = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
        with LiveBytes(lambda tensor, sizes=sizes: sizes.append(tensor.numel())) as live:
            with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
                output = model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
            output.sum().backward()
        found[name] = sum(held.values()) / (4 * TOKENS * WIDTH), max(sizes), live.peak
    saved, largest, _ = found["blockwise"]
    # of two layers their inputs, and what the last norm holds: what came, what went, and a number a token
    assert saved == 2 + 2 + 1 / WIDTH
    assert largest < TOKENS * INNER
    assert found["plain"][0] > 20
    assert found["plain"][1] >= TOKENS * INNER
    # smaller blocks, less memory; and what is left grows with the row by hidden states only
    peaks = {}
    for size, length in ((80, TOKENS), (16, TOKENS), (80, 2 * TOKENS), (80, 4 * TOKENS)):
        model.set_execution("blockwise", block_size=size, key_block_size=32)
        with LiveBytes() as live:
            model(tokens(1, length), labels=tokens(1, length)).loss.backward()
        model.zero_grad(set_to_none=True)
        peaks[size, length] = live.peak
    assert peaks[16, TOKENS] < peaks[80, TOKENS]
    per_token = (peaks[80, 4 * TOKENS] - peaks[80, 2 * TOKENS]) / (2 * TOKENS) / 4
    # with a window keys and values are held of as many tokens as it sees
    assert per_token < (12 if window is None else 5) * WIDTH, per_token / WIDTH
    assert ids.shape[1] == TOKENS


def test_bfloat16_and_frozen_weights():
    full = {"kind": "attention", "sliding_window": None, "score_function": "softmax", "slopes": "none"}
    model, ids = Subject("both", [full, "attention"]).model(torch.float32).train(), tokens(2, LENGTH)
    model.model.layers[0].mlp.requires_grad_(False)
    found = []
    for name, settings in (("plain", {}), ("blockwise", {"block_size": 5, "key_block_size": 4})):
        model.set_execution(name, **settings)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        found.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
        model.zero_grad(set_to_none=True)
    assert found[0].keys() == found[1].keys()
    assert not any(name.startswith("model.layers.0.mlp") for name in found[0])
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_what_it_cannot_do_is_refused_by_name():
    mixture = Subject("mixture", ["attention", "mamba2"]).model()
    with pytest.raises(ValueError, match=r"layer 1 \(mamba2\) is no layer of the kind attention: take checkpoint"):
        mixture.set_execution("blockwise")
    first = Subject("first", [{"kind": "attention", "sliding_window": 4, "sinks": 2}]).model()
    with pytest.raises(ValueError, match=r"layer 0 \(attention\) keeps first tokens beside its window"):
        first.set_execution("blockwise")
    model, ids = SUBJECTS[0].model().train(), tokens(1, 9)
    with pytest.raises(ValueError, match=r"block_size must be at least 1; got 0"):
        model.set_execution("blockwise", block_size=0)
    model.set_execution("blockwise", block_size=4)
    with pytest.raises(ValueError, match="blockwise runs whole rows in training, without a cache or a carry"):
        model(ids, labels=ids, carry=model.init_carry())
    assert model.eval()(ids).logits.shape == (1, 9, 40)
    assert model.train()(ids).logits.shape == (1, 9, 40)


@pytest.mark.parametrize("window", [None, 24])
def test_evaluation_needs_less_than_training(window: int | None):
    model, ids = wide(window), tokens(1, 2 * TOKENS)
    model.eval()
    with torch.no_grad():
        expected = model(ids, labels=ids, return_logits=False).loss
    model.set_execution("blockwise", block_size=32, key_block_size=32)
    peaks = []
    for training in (True, False):
        model.train(training)
        with LiveBytes() as live, torch.set_grad_enabled(training):
            loss = model(ids, labels=ids, return_logits=False).loss
            if training:
                loss.backward()
        close(loss.detach(), expected, tolerance=1e-5)
        peaks.append(live.peak)
    assert peaks[1] < peaks[0]
    # a cache, and gradients outside of training, are those of whole rows
    assert model.generate(ids[:, :40], max_new_tokens=2, do_sample=False).shape == (1, 42)
    model(ids, labels=ids).loss.backward()
    model.set_execution()
    assert "forward" not in vars(model.model.layers[0])


def test_dropout_is_refused_where_keys_would_be_drawn_twice():
    ids = tokens(1, 20)
    for dropout in (0.0, 0.3):
        model = SUBJECTS[0].model(torch.float32)
        lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["k_proj"], lora_dropout=dropout)
        adapted = get_peft_model(model, lora).train()
        model.set_execution("blockwise", block_size=8)
        if not dropout:
            adapted(input_ids=ids, labels=ids).loss.backward()
            continue
        with pytest.raises(ValueError, match=r"k_proj\.lora_dropout\.default of a layer drops out with p=0\.3"):
            adapted(input_ids=ids, labels=ids)
        # nothing is computed twice without gradients
        with torch.no_grad():
            assert adapted(input_ids=ids, labels=ids).loss.isfinite()
        model.set_execution("checkpoint")
        adapted(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("setting", ["learned_slopes", "learned_score_bias"])
def test_what_full_attention_learns_of_scores_is_refused_before_any_work(setting: str):
    model = Subject("full", ["attention", {"kind": "attention", "sliding_window": None, setting: True}]).model()
    with pytest.raises(ValueError, match=rf"layer 1 \(attention\) has {setting} and no window.*take checkpoint"):
        model.set_execution("blockwise")
    # a window that is drawn away
    model, ids = Subject("drawn", [{"kind": "attention", setting: True}]).model().train(), tokens(1, 20)
    model.set_execution("blockwise", block_size=8)
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        layer.self_attn.window_in = lambda chunk: None
    with pytest.raises(ValueError, match=f"no gradient for {setting} without a window, and layer 0 has none"):
        model(ids, labels=ids)
    model.model.layers.requires_grad_(False)
    model(ids, labels=ids).loss.backward()


def test_the_last_product_comes_again_only_where_somebody_reads_it():
    model, ids = SUBJECTS[0].model().train(), tokens(2, 20)
    model.set_execution("blockwise", block_size=8)
    layer, numbers = model.model.layers[1], []
    linear = layer.mlp.down_proj
    with unread(layer):
        assert not linear(torch.ones(1, 3, linear.in_features, dtype=torch.float64)).any()
    assert "forward" not in vars(linear)
    assert last_product(layer) is linear
    assert last_product(SUBJECTS[2].model().model.layers[0]) is None, "a norm stands behind it"
    watching = linear.register_forward_hook(lambda module, given, result: numbers.append(result.detach()))
    assert last_product(layer) is None
    model(ids, labels=ids).loss.backward()
    # three blocks, from the first to the last and back
    assert len(numbers) == 6
    for first, again in zip(numbers[:3], reversed(numbers[3:]), strict=True):
        close(again, first, tolerance=EXACT)
    watching.remove()
    model(ids, labels=ids).loss.backward()
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["down_proj"]))
    assert last_product(layer) is None
