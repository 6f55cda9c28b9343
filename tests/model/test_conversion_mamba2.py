"""Mamba-2 weights: the same logits and gradients, padded or not; the definition in float64; and what is refused."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

from swat_lm import SwatForCausalLM
from swat_lm.evaluate.windows import with_window
from swat_lm.model.conversion import convert, convert_config, convert_folder

from .models import VOCABULARY, close, tiny_model, tokens
from .test_conversion import source_model as llama_model

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 12,
    "n_groups": 1,
    "chunk_size": 16,
    "initializer_range": 0.3,
    "layer_norm_epsilon": 1e-3,
    "pad_token_id": 5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VARIANTS = [
    {},
    {"n_groups": 4, "use_bias": True, "conv_kernel": 3},
    {"tie_word_embeddings": True, "use_conv_bias": False},
    {"time_step_limit": (0.02, 0.5), "n_groups": 2},
    {"expand": 4, "num_heads": 8, "head_dim": 16, "time_step_limit": (0.05, math.inf), "hidden_act": "swish"},
]


def source_model(**changes) -> Mamba2ForCausalLM:
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(**{**SHAPE, **changes})).eval()
    # what starts at zero or one would prove nothing
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", ".D", "norm.weight", "norm_f.weight")):
            torch.nn.init.normal_(parameter, mean=0.3)
    return model


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ", ".join(changes) or "plain")
def test_same_function(changes):
    # token 5 is what the source calls padding, here it is text
    source, ids = source_model(**changes), torch.cat((tokens(2, 40), torch.full((2, 3), 5)), dim=1)
    model = convert(source)
    close(model(ids).logits, source(ids).logits, 1e-4)
    loss, ours = source(ids, labels=ids).loss, model(ids, labels=ids).loss
    close(ours, loss, 1e-4)
    loss.backward()
    ours.backward()
    names = {"backbone.embeddings": "model.embed_tokens", "backbone.norm_f": "model.norm", "backbone.": "model."}
    gradients = {}
    for name, parameter in source.named_parameters():
        for theirs, own in names.items():
            name = name.replace(theirs, own)
        gradients[name] = parameter.grad
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        close(parameter.grad, gradients[name], 1e-4)


def plain_logits(weights: dict[str, Tensor], config: Mamba2Config, ids: Tensor) -> Tensor:
    """One row `[T]` by the recurrence of arXiv 2405.21060, token by token and head by head."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt() * weight

    heads, size, state_size, groups = config.num_heads, config.head_dim, config.state_size, config.n_groups
    inner = heads * size
    hidden = weights["backbone.embeddings.weight"][ids]
    for layer in range(config.num_hidden_layers):
        own = {
            name.removeprefix(f"backbone.layers.{layer}."): one
            for name, one in weights.items()
            if name.startswith(f"backbone.layers.{layer}.")
        }
        projected = norm(hidden, own["norm.weight"]) @ own["mixer.in_proj.weight"].T + own.get("mixer.in_proj.bias", 0)
        gate, inputs, steps = projected.split([inner, inner + 2 * groups * state_size, heads], dim=-1)
        kernel = own["mixer.conv1d.weight"][:, 0]
        padded = F.pad(inputs, (0, 0, kernel.shape[1] - 1, 0))
        taps = [padded[shift : shift + len(ids)] * kernel[:, shift] for shift in range(kernel.shape[1])]
        mixed = F.silu(torch.stack(taps).sum(0) + own.get("mixer.conv1d.bias", 0))
        value, key, query = mixed.split([inner, groups * state_size, groups * state_size], dim=-1)
        step = F.softplus(steps + own["mixer.dt_bias"]).clamp(*config.time_step_limit)
        outputs = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            group = head // (heads // groups)
            read = slice(group * state_size, (group + 1) * state_size)
            state, found = hidden.new_zeros(size, state_size), []
            for token in range(len(ids)):
                decay = torch.exp(-step[token, head] * own["mixer.A_log"][head].exp())
                state = decay * state + step[token, head] * torch.outer(value[token, part], key[token, read])
                found.append(state @ query[token, read] + own["mixer.D"][head] * value[token, part])
            outputs.append(torch.stack(found))
        gated = (torch.cat(outputs, dim=-1) * F.silu(gate)).unflatten(-1, (groups, -1))
        normed = norm(gated, own["mixer.norm.weight"].unflatten(-1, (groups, -1))).flatten(-2)
        hidden = hidden + normed @ own["mixer.out_proj.weight"].T + own.get("mixer.out_proj.bias", 0)
    return norm(hidden, weights["backbone.norm_f.weight"]) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("changes", VARIANTS[1:4], ids=lambda changes: ", ".join(changes))
def test_the_definition_in_float64(changes):
    # transformers itself rounds to float32 within, so it cannot be the measure
    source, ids = source_model(**changes).double(), tokens(1, 21)
    model = convert(source)
    assert model.dtype == torch.float64
    weights = {name: one.detach().clone().requires_grad_() for name, one in source.state_dict().items()}
    if source.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["backbone.embeddings.weight"]
    expected = plain_logits(weights, source.config, ids[0])[None]
    actual = model(ids).logits
    close(actual, expected, 1e-10)
    measure = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (expected * measure).sum().backward()
    (actual * measure).sum().backward()
    close(model.model.embed_tokens.weight.grad, weights["backbone.embeddings.weight"].grad, 1e-10)
    for name, parameter in model.model.layers.named_parameters():
        close(parameter.grad, weights[f"backbone.layers.{name}"].grad, 1e-10)


def test_left_padding():
    source, ids = source_model(n_groups=2), tokens(2, 30)
    model = convert(source)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    theirs, ours = source(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits
    close(ours[0, 11:], theirs[0, 11:], 1e-4)
    close(ours[1], theirs[1], 1e-4)
    # with biases the source's convolution sees that of the padding; here padding is nothing
    biased = source_model(use_bias=True)
    ours = convert(biased)(ids, attention_mask=mask).logits
    close(ours[0, 11:], biased(ids[:1, 11:]).logits[0], 1e-4)


def test_same_generation():
    source, ids = source_model(), tokens(2, 11)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    assert torch.equal(convert(source).generate(ids, **options), source.generate(ids, **options))


@pytest.mark.parametrize("changes", VARIANTS[2:], ids=lambda changes: ", ".join(changes))
def test_folder(tmp_path, changes):
    source, ids = source_model(**changes), tokens(1, 30)
    folder, out = tmp_path / "mamba", tmp_path / "swat"
    source.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    convert_folder(folder, out)
    assert (out / "tokenizer.json").read_text() == "{}"
    model = SwatForCausalLM.from_pretrained(out)
    close(model(ids).logits, source(ids).logits, 1e-4)
    # ours by its own names, whoever loads it; and what is saved again is the same model
    again = AutoModelForCausalLM.from_pretrained(out)
    again.save_pretrained(tmp_path / "again")
    again = SwatForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.plan() == convert_config(source.config).plan()
    assert again.generation_config.eos_token_id == 2
    assert again.generation_config.pad_token_id == 5


def test_half_precision_stays(tmp_path):
    source = source_model().to(torch.bfloat16)
    source.save_pretrained(tmp_path)
    for model in (convert(tmp_path), convert(source)):
        assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
        assert torch.equal(model.model.layers[1].mixer.A_log, source.backbone.layers[1].mixer.A_log)
        assert model.lm_head.weight.data_ptr() != source.lm_head.weight.data_ptr()


def test_damaged_weights_are_named(tmp_path):
    source = source_model()
    del source.backbone.layers[1]
    source.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing: backbone\.layers\.1\."):
        convert(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 8}, "window is a setting of attention.*, of which a Mamba-2 model has no layer; leave it out"),
        ({"window": None}, "window is a setting of attention"),
        (
            {"score_function": "softmax"},
            "changes: score_function is a setting of attention.*, of which a Mamba-2 model",
        ),
        ({"num_attention_heads": 4}, "changes: num_attention_heads is a setting of attention"),
        ({"hidden_size": 64}, "changes: hidden_size would change the shapes of the weights"),
        ({"layers": ["attention"]}, "changes: layers makes layer 0 attention, the source's is mamba2"),
        ({"layers": [{"kind": "mamba2", "state_size": 3}]}, r"changes: layers makes mixer\.\S+ of layer 0 "),
        ({"n_groups": 2}, "changes: unknown key 'n_groups'"),
    ],
)
def test_changes_without_meaning(options, message):
    with pytest.raises(ValueError, match=message):
        convert_config(Mamba2Config(**{**SHAPE, "head_dim": 8}), **options)


def test_other_activations():
    with pytest.raises(ValueError, match="hidden_act 'gelu' is not supported"):
        convert_config(Mamba2Config(**SHAPE, hidden_act="gelu"))


def test_a_plan_for_llama():
    source, ids = llama_model("llama"), tokens(1, 30)
    model = convert(source, layers=[{"kind": "attention", "sliding_window": 4}, "attention"])
    assert [model.config.window(layer) for layer in range(2)] == [4, None]
    close(model(ids).logits[:, :4], source(ids).logits[:, :4])
    with pytest.raises(ValueError, match="layers makes layer 1 mamba2, the source's is attention"):
        convert(source, layers=["attention", "mamba2"])


def test_no_window_to_change():
    with pytest.raises(ValueError, match="no layer of attention"):
        with_window(convert(source_model()), 8)
    with pytest.raises(ValueError, match="a Mamba-2 model has no layer"):
        with_window(source_model(), 8)
    mixed = tiny_model(layers=["mamba2", "attention"], num_hidden_layers=2)
    assert [with_window(copy.deepcopy(mixed), 3).config.window(layer) for layer in range(2)] == [None, 3]
