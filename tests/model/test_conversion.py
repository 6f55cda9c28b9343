"""Llama and Mistral weights: the same logits, gradients and cached tokens; and what cannot be taken over is named."""

import copy
import json

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from swat_lm import SwatForCausalLM
from swat_lm.model.conversion import convert, convert_config, convert_folder

from .models import VOCABULARY, close, tokens

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


def source_model(kind: str, **changes):
    torch.manual_seed(0)
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**{**SHAPE, "sliding_window": 7, **changes})).eval()
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})).eval()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 12}),
        ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 128}),
        ("llama", {"rope_parameters": YARN, "max_position_embeddings": 64}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    ],
)
def test_same_function(kind, changes):
    source, ids = source_model(kind, **changes), tokens(2, 40)
    # the sources start with biases of zero, which would prove nothing
    for name, parameter in source.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model = convert(source)
    theirs, ours = source(ids), model(ids)
    close(ours.logits, theirs.logits)
    loss = source(ids, labels=ids).loss
    loss.backward()
    our_loss = model(ids, labels=ids).loss
    close(our_loss, loss)
    our_loss.backward()
    gradients = {name: parameter.grad for name, parameter in source.named_parameters()}
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        close(parameter.grad, gradients[name])


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_same_cached_generation(kind):
    source, ids = source_model(kind), tokens(2, 11)
    model = convert(source)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), source.generate(ids, **options))


def test_folder_is_converted_with_its_tokenizer(tmp_path):
    source, ids = source_model("mistral"), tokens(1, 30)
    folder, out = tmp_path / "mistral", tmp_path / "swat"
    source.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    convert_folder(folder, out)
    model = SwatForCausalLM.from_pretrained(out)
    close(model(ids).logits, source(ids).logits)
    assert model.config.sliding_window == 7
    assert model.generation_config.eos_token_id == 2
    assert (out / "tokenizer.json").read_text() == "{}"
    assert {entry.name for entry in tmp_path.iterdir()} == {"mistral", "swat"}
    with pytest.raises(ValueError, match="not an empty folder"):
        convert_folder(folder, out)


def test_windowed_sigmoid_model_to_train_on(tmp_path):
    source, ids = source_model("llama").to(torch.bfloat16), tokens(1, 30)
    source.save_pretrained(tmp_path)
    options = {"score_function": "sigmoid", "slopes": "balanced", "score_bias": "-log(window)", "qk_norm": True}
    model = convert(tmp_path, window=5, **options)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, source.model.layers[0].self_attn.q_proj.weight)
    assert (model.config.sliding_window, model.config.attention_settings(0).score_function) == (5, "sigmoid")
    model.train()(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "expected a llama, mistral, .* or mamba2 model, got 'gpt2'$"),
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "hidden_act 'gelu'"),
        (LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "'dynamic'"),
    ],
)
def test_what_cannot_be_taken_over(config, message):
    with pytest.raises(ValueError, match=message):
        convert_config(config)


def test_dropout_is_left_out_and_said():
    source = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.1))
    with pytest.warns(UserWarning, match="source: attention_dropout 0.1 left out: layers here have no dropout"):
        convert(source)


def test_a_folder_without_weights_is_said_before_anything_else(tmp_path, recwarn):
    LlamaConfig(**SHAPE, attention_dropout=0.1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"source: {tmp_path} has no weights: expected model.safetensors, or shards"):
        convert(tmp_path)
    assert not recwarn.list


def test_arguments_that_mean_nothing(tmp_path):
    source = source_model("llama")
    source.save_pretrained(tmp_path)
    for place in (source, tmp_path):
        for wrong in (torch.int8, "int8", "auto", 16):
            with pytest.raises(ValueError, match=r"dtype: expected float32, bfloat16, float16 .* or None; got"):
                convert(place, dtype=wrong)
        assert convert(place, dtype="bfloat16").dtype == torch.bfloat16
        for wrong in (True, 2.5, "8", 0, [4, 4]):
            with pytest.raises(ValueError, match="window: expected 'keep', None for full attention or a whole number"):
                convert(place, window=wrong)
        with pytest.raises(ValueError, match="full_layers: expected none, odd"):
            convert(place, 4, full_layers=b"last")


def test_the_result_is_in_evaluation_mode(tmp_path):
    source = source_model("llama").train()
    source.save_pretrained(tmp_path)
    assert not any(model.training for model in (convert(source), convert(tmp_path)))
    assert source.training


def test_damaged_checkpoints_leave_nothing_behind(tmp_path):
    source = source_model("llama")
    folder, out = tmp_path / "llama", tmp_path / "out"
    source.save_pretrained(folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        convert_folder(folder, out)
    with pytest.raises(ValueError, match="is not a checkpoint folder"):
        convert_folder(tmp_path / "nowhere", out)
    smaller = source_model("llama")
    del smaller.model.layers[1]
    smaller.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1"):
        convert_folder(folder, out)
    assert {entry.name for entry in tmp_path.iterdir()} == {"llama"}


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_sharded_folders_of_any_dtype(tmp_path, kind):
    source = source_model("llama")
    if kind == "phi3":
        torch.manual_seed(0)
        source = Phi3ForCausalLM(Phi3Config(**SHAPE, pad_token_id=0)).eval()
    halves = copy.deepcopy(source).to(torch.bfloat16)
    halves.save_pretrained(tmp_path / "halves", max_shard_size="10KB")
    assert len(list((tmp_path / "halves").glob("*.safetensors"))) > 1
    assert convert(tmp_path / "halves").dtype == torch.bfloat16
    ours = convert(tmp_path / "halves", dtype=torch.float32)
    assert ours.dtype == ours.config.dtype == torch.float32
    assert torch.equal(ours.model.norm.weight, halves.model.norm.weight.float())
    # copied into weights of float32
    source.load_state_dict(halves.state_dict())
    close(ours(tokens(1, 20)).logits, source(tokens(1, 20)).logits)
    close(convert(halves, dtype=torch.float32)(tokens(1, 20)).logits, ours(tokens(1, 20)).logits)


def test_numbers_that_follow_the_dtype(tmp_path):
    torch.manual_seed(0)
    # the root of 44 is another number in bfloat16, to which theirs is rounded
    changes = {"hidden_size": 44, "head_dim": 8, "num_hidden_layers": 1, "dtype": "bfloat16"}
    source = Gemma3ForCausalLM(Gemma3TextConfig(**{**SHAPE, **changes})).to(torch.bfloat16).eval()
    source.save_pretrained(tmp_path)
    theirs = Gemma3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    close(convert(tmp_path, dtype=torch.float32)(tokens(1, 20)).logits, theirs(tokens(1, 20)).logits)


def test_what_is_missing_of_a_folder_is_named_before_it_is_read(tmp_path, monkeypatch):
    folder, out = tmp_path / "llama", tmp_path / "out"
    source_model("llama").save_pretrained(folder, max_shard_size="10KB")
    monkeypatch.setattr("swat_lm.model.conversion.SwatForCausalLM", None)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    whole = second.read_bytes()
    for content in (whole[:-1], whole[:20], b""):
        second.write_bytes(content)
        with pytest.raises(ValueError, match=f"{second.name} cannot be read: the file is cut short"):
            convert_folder(folder, out)
    length = int.from_bytes(whole[:8], "little")
    for header in (b"[" * length, b'{"a": 1}'.ljust(length), b"\xff" * length):
        second.write_bytes(whole[:8] + header + whole[8 + length :])
        with pytest.raises(ValueError, match=f"{second.name} cannot be read: its header is damaged"):
            convert_folder(folder, out)
    second.write_bytes(whole)
    first.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"lacks 1 file of weights .* names: {first.name}"):
        convert_folder(folder, out)
    (tmp_path / "elsewhere").rename(first)
    index = folder / "model.safetensors.index.json"
    map_of_all = index.read_text()
    for damaged in ('{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "{}"):
        index.write_text(damaged)
        with pytest.raises(ValueError, match=r"index\.json is damaged: expected weight_map to name the file"):
            convert_folder(folder, out)
    index.unlink()
    with pytest.raises(ValueError, match=rf"llama has no weights: .*; {first.name}, .* without an index; fetch"):
        convert_folder(folder, out)
    index.write_text(map_of_all)
    vocabulary = {"model": {"vocab": {str(number): number for number in range(VOCABULARY + 1)}}}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match=f"has {VOCABULARY + 1} tokens, the model {VOCABULARY}"):
        convert_folder(folder, out)
    (folder / "tokenizer.json").unlink()
    settings = json.loads((folder / "config.json").read_text())
    quantised = {**settings, "quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ValueError, match=r"are quantised \(fp8\)"):
        convert_folder(folder, out)
    assert not out.exists()
