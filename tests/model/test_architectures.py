"""Baselines from libraries: strict keys, our loss equal to theirs, counted sizes, and clear refusals."""

import importlib.util
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from swat_lm.evaluate.streaming_model import streaming_model
from swat_lm.model.architectures import (
    ARCHITECTURES,
    build_model,
    check_trainable,
    configure_model,
    count_model_parameters,
    exported_class,
    model_state_bytes,
    streaming_inputs,
    training_flops,
)
from swat_lm.model.configuration import SwatConfig

TINY = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mistral": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "sliding_window": 8,
    },
    "mamba2": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1,
        "chunk_size": 16,
    },
    "gated_deltanet": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}  # fmt: skip
"""On a CPU."""


def tiny(name: str, **changes: object):
    return configure_model({"architecture": name, **TINY[name], **changes}, 50)


@pytest.mark.parametrize("name", TINY)
def test_loss_is_the_librarys_own(name: str):
    torch.manual_seed(0)
    model = build_model(tiny(name)).eval()
    tokens = torch.randint(50, (2, 24))
    labels = tokens.clone()
    labels[0, :9] = -100
    library = exported_class(type(model))
    assert library.__module__.startswith("transformers.")
    theirs = library.forward(model, input_ids=tokens, labels=labels, use_cache=False).loss
    ours = model(input_ids=tokens, labels=labels, use_cache=False).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    # as the trainer divides: by the targets of the whole step
    divided = model(input_ids=tokens, labels=labels, num_items_in_batch=7.0).loss
    count = (labels[:, 1:] != -100).sum().item()
    assert divided.item() == pytest.approx(ours.item() * count / 7, rel=1e-5)

    ours.backward()
    gradients = [one.grad.clone() for one in model.parameters() if one.grad is not None]
    model.zero_grad()
    library.forward(model, input_ids=tokens, labels=labels, use_cache=False).loss.backward()
    for mine, other in zip(gradients, [one.grad for one in model.parameters() if one.grad is not None], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_separate_documents_do_not_see_each_other(name: str):
    torch.manual_seed(0)
    model = build_model(tiny(name)).eval()
    tokens = torch.randint(50, (2, 20))
    documents = torch.tensor([[0] * 7 + [1] * 13, [0] * 20], dtype=torch.int32)
    positions = torch.stack([torch.cat([torch.arange(7), torch.arange(13)]), torch.arange(20)])

    def loss_of_later(first: torch.Tensor) -> float:
        labels = first.clone()
        labels[:, :7] = -100
        return model(input_ids=first, labels=labels, position_ids=positions, document_ids=documents).loss.item()

    changed = tokens.clone()
    changed[0, :7] = (changed[0, :7] + 1) % 50
    assert loss_of_later(changed) == pytest.approx(loss_of_later(tokens), rel=1e-6)
    changed[1, :7] = (changed[1, :7] + 1) % 50
    assert loss_of_later(changed) != pytest.approx(loss_of_later(tokens), rel=1e-6)


def test_counts_and_formulas():
    for name in TINY:
        config = tiny(name)
        counted = count_model_parameters(config)
        model = build_model(config)
        assert counted.total == sum(one.numel() for one in model.parameters())
        assert counted.embedding == counted.output_embedding == 50 * 32
        flops = training_flops(config, 64)
        assert flops.method.startswith("formula" if name in ("llama", "mistral") else "estimate")
        assert flops.per_token > 5 * counted.non_embedding
    # the formula of Llama is that of our own twin
    ours = SwatConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50,
        sliding_window=None, score_function="softmax", slopes="none",
    )  # fmt: skip
    assert training_flops(tiny("llama"), 64) == training_flops(ours, 64)
    assert count_model_parameters(tiny("llama")) == count_model_parameters(ours)


def test_state_bytes():
    # keys and values of two layers of 32 channels
    assert model_state_bytes(tiny("llama"), 100) == 2 * 2 * 2 * 32 * 100
    assert model_state_bytes(tiny("mistral"), 100) == 2 * 2 * 2 * 32 * 8
    # state [4, 16, 8] and a convolution of 4 over 64 + 2 * 8 channels
    assert model_state_bytes(tiny("mamba2"), 100) == 2 * 2 * (4 * 16 * 8 + 4 * 80)
    # state [4, 8, 8] and a convolution of 4 over 16 + 16 + 32 channels
    assert model_state_bytes(tiny("gated_deltanet"), 100) == 2 * 2 * (4 * 8 * 8 + 4 * 64)


def test_gated_deltanet_has_neither_experts_nor_attention(tmp_path):
    torch.manual_seed(0)
    config = tiny("gated_deltanet")
    with torch.device("meta"):
        names = {type(module).__name__ for module in build_model(config).modules()}
    assert not any("Attention" in name or "Expert" in name for name in names)
    model = exported_class(type(build_model(config)))(config).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(50, (2, 30))
    with torch.no_grad():
        whole = again(input_ids=tokens).logits
        parts, held = [], None
        for start, end in ((0, 7), (7, 12), (12, 30)):
            extra = streaming_inputs(again.config, start, end - start, tokens.device)
            outputs = again(input_ids=tokens[:, start:end], past_key_values=held, use_cache=True, **extra)
            parts, held = [*parts, outputs.logits], outputs.past_key_values
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"architecture": "lama"}, "did you mean 'llama'"),
        ({"architecture": "mamba2", "statesize": 8}, "mamba2 has no key 'statesize'; did you mean 'state_size'"),
        ({"architecture": "llama", "slopes": "balanced"}, "llama has no key 'slopes'"),
        ({"architecture": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"architecture": "mamba2", "hidden_size": 32, "num_heads": 3, "head_dim": 16}, "must equal num_heads"),
        ({"architecture": "llama", **TINY["llama"], "vocab_size": 10}, "vocab_size 10 is smaller"),
        ({"architecture": "swat", "hiden_size": 32}, "did you mean 'hidden_size'"),
    ],
)
def test_wrong_recipes_are_named(model: dict, message: str):
    with pytest.raises(ValueError, match=message):
        configure_model(model, 50)


@pytest.mark.parametrize("name", TINY)
def test_every_baseline_reads_streams(name: str):
    torch.manual_seed(0)
    model = build_model(tiny(name))
    library = exported_class(type(model))(model.config).eval()
    streaming, tokens = streaming_model(library), torch.randint(50, (2, 40))
    state = streaming.start(2)
    parts = torch.cat([streaming.extend(part, state) for part in tokens.split((13, 5, 22), dim=1)], dim=1)
    with torch.no_grad():
        whole = library.base_model(input_ids=tokens, use_cache=False)[0]
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)
    if name in ("mamba2", "gated_deltanet"):
        assert streaming.state_bytes(state) == model_state_bytes(model.config, 40, dtype_bytes=4)


def test_what_cannot_be_trained_is_refused():
    for name in ("mamba2", "gated_deltanet"):
        with pytest.raises(ValueError, match=f"{name} cannot keep the documents.*concatenate"):
            check_trainable({"architecture": name}, "separate")
        check_trainable({"architecture": name}, "concatenate")
    check_trainable({"architecture": "llama"}, "separate")
    check_trainable({}, "separate")


def test_fla_says_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fla" else find(name))
    for name in ("retnet", "gla", "deltanet", "mamba"):
        with pytest.raises(ValueError, match=f"{name} needs flash-linear-attention.*pip install"):
            configure_model({"architecture": name}, 50)
        with pytest.raises(ValueError, match="flash-linear-attention"):
            check_trainable({"architecture": name}, "concatenate")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: sys.__spec__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gla runs on CUDA only"):
        check_trainable({"architecture": "gla"}, "concatenate")
    with pytest.raises(ValueError, match="pip uninstall flash-linear-attention"):
        check_trainable({"architecture": "gated_deltanet"}, "concatenate")


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed")
@pytest.mark.parametrize("name", [name for name, one in ARCHITECTURES.items() if one.requires])
def test_fla_models_can_be_counted_anywhere(name: str):
    config = configure_model({"architecture": name, "hidden_size": 64, "num_hidden_layers": 2}, 50)
    assert count_model_parameters(config).embedding == 50 * 64
    with pytest.raises(ValueError, match="has no key 'hiden_size'"):
        configure_model({"architecture": name, "hiden_size": 64}, 50)
