"""Models by name: any causal model, whole and in evaluation mode, or one line that says what is there instead."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, T5Config

from swat_lm import SwatForCausalLM
from swat_lm.cli.checkpoints import find_export, load_model
from swat_lm.model.loading import find_model_folder, load_causal_lm, model_type

from .models import tiny_model, tokens


def save_llama(folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    )
    model.save_pretrained(folder)
    return model


def test_any_causal_model_loads(tmp_path):
    ours, theirs = tiny_model(), save_llama(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "run" / "export")
    loaded = load_causal_lm(str(tmp_path / "run"), "cpu")
    assert isinstance(loaded, SwatForCausalLM)
    assert not loaded.training
    assert torch.equal(loaded(tokens(1, 9)).logits, ours(tokens(1, 9)).logits)
    other = load_causal_lm(str(tmp_path / "theirs"), "cpu")
    assert not other.training
    assert torch.equal(other(tokens(1, 9)).logits, theirs.eval()(tokens(1, 9)).logits)


def test_ours_are_demanded_where_they_are_needed(tmp_path):
    save_llama(tmp_path / "theirs")
    assert find_model_folder(str(tmp_path / "theirs")) == str(tmp_path / "theirs")
    for load in (find_export, load_model):
        with pytest.raises(ValueError, match="holds a llama model: convert it first"):
            load(str(tmp_path / "theirs"))
    with pytest.raises(ValueError, match="no checkpoint at nowhere"):
        find_export("nowhere")


def test_damaged_and_misfitting_weights(tmp_path):
    save_llama(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole, tensors = weights.read_bytes(), load_file(weights)
    missing = {name: one for name, one in tensors.items() if "q_proj" not in name}
    save_file(missing, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit: missing keys: model\.layers\.0\.self_attn\.q_proj\.weight"):
        load_causal_lm(str(tmp_path))
    misfit = {**tensors, "lm_head.weight": tensors["lm_head.weight"][:, :8].contiguous()}
    save_file(misfit, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit: mismatched keys: lm_head\.weight"):
        load_causal_lm(str(tmp_path))
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="the weights are damaged or cut short"):
        load_causal_lm(str(tmp_path))


def test_what_is_no_causal_model(tmp_path):
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="holds no causal language model that transformers knows"):
        load_causal_lm(str(tmp_path / "t5"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not a model configuration"):
        load_causal_lm(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(ValueError, match="it has no model_type"):
        load_causal_lm(str(tmp_path))
    BertConfig().save_pretrained(tmp_path / "bert")
    assert model_type(tmp_path / "bert") == "bert"
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_causal_lm(str(tmp_path / "bert"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nothing", "no checkpoint at ./nothing"),
        ("a/b/c", "no checkpoint at a/b/c"),
        ("nobody/nothing", "no checkpoint at nobody/nothing, and the hub gave no model of that name"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=message):
        load_causal_lm(name)


def test_devices(tmp_path):
    save_llama(tmp_path)
    with pytest.raises(ValueError, match="device nonsense"):
        load_causal_lm(str(tmp_path), "nonsense")


def test_models_of_a_library_that_is_not_there_name_it(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "gla"}')
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(ValueError, match=r"a gla model of flash-linear-attention: pip install -e '.\[fla\]'"):
        load_causal_lm(str(tmp_path))
