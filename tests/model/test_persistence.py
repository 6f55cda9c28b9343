"""Saving and loading: bit for bit, under any dtype, through the Auto classes, in any order of imports."""

import json
import os
import subprocess
import sys

import pytest
import torch

from swat_lm import SwatConfig, SwatForCausalLM, SwatModel

from .models import close, tiny_config, tiny_model, tokens


def test_save_and_load_is_bitwise(tmp_path):
    model, ids = tiny_model(slopes="3:1", score_bias="-log(window)", qk_norm=True), tokens(2, 30)
    model.save_pretrained(tmp_path)
    loaded = SwatForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert "slopes" not in loaded.state_dict()


# what was imported first, and how the Auto class was come by
ORDERS = [
    ("import swat_lm", "from transformers import AutoModelForCausalLM as A"),
    ("from swat_lm import SwatForCausalLM", "from transformers import AutoModelForCausalLM as A"),
    # these load the Auto classes while transformers is half imported
    ("import swat_lm", "from transformers import LlamaForCausalLM, AutoModelForCausalLM as A"),
    ("import transformers, swat_lm", "from transformers import GPT2LMHeadModel, AutoModelForCausalLM as A"),
    ("from swat_lm import window_attention", "from transformers import MistralModel, AutoModelForCausalLM as A"),
    ("from transformers import LlamaModel", "import swat_lm; from transformers import AutoModelForCausalLM as A"),
    # by its name, as pipelines, transformers' server and TRL look for it
    ("import swat_lm, transformers", "A = transformers.SwatForCausalLM"),
    ("import transformers, swat_lm", "from transformers.models.swat import SwatForCausalLM as A"),
    (
        "from swat_lm import SwatForCausalLM; from transformers import LlamaModel",
        "import transformers; A = transformers.SwatForCausalLM",
    ),
]
# every order in a process of its own, all forked from one that has imported what they have in common
IN_EVERY_ORDER = """
import gc, json, os, sys
# half of what an import costs is collecting in between
gc.disable()
import accelerate, huggingface_hub.hf_api, huggingface_hub.serialization, jinja2.ext, PIL.Image, safetensors.torch
import scipy.optimize, tokenizers, torch._dynamo, torch.distributed.checkpoint.hf_storage, torch.distributed.tensor
import torch.nn.attention.flex_attention
assert not {"transformers", "swat_lm"} & set(sys.modules)
folder, orders = sys.argv[1], json.loads(sys.argv[2])
for first, then in orders:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        exec(f"{first}\\n{then}\\nprint(type(A.from_pretrained({folder!r})).__name__, flush=True)")
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_auto_classes_know_the_model_in_any_order_of_imports(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", IN_EVERY_ORDER, str(tmp_path), json.dumps(ORDERS)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.stdout.split() == ["SwatForCausalLM"] * len(ORDERS), ran.stderr


# beside PyTorch no transformers, or an old one in a folder; each case in a process forked after `import torch`
OPERATOR = """
import os, sys, time
import torch
for name in ("transformers", "safetensors", "yaml", "swat_lm"):
    assert name not in sys.modules, name
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "huggingface_hub", "safetensors", "yaml"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
def without():
    began = time.process_time()
    import swat_lm
    print(time.process_time() - began < 2)
    for name in ("transformers", "safetensors", "yaml"):
        assert name not in sys.modules, name
    sys.meta_path.insert(0, Absent())
    x = torch.randn(1, 4, 2, 8)
    print(tuple(swat_lm.window_attention(x, x, x, window=2).shape))
def old():
    sys.path.insert(0, sys.argv[1])
    from swat_lm import window_attention
    from transformers.models.auto.configuration_auto import LOADED
    print(LOADED)
for case in (without, old):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        case()
        try:
            from swat_lm import SwatConfig
        except ImportError as error:
            print(error, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_the_operator_needs_pytorch_alone(tmp_path):
    """Beside an old transformers it works too; the model classes say what they need."""
    (tmp_path / "transformers" / "models" / "auto").mkdir(parents=True)
    for package in ("transformers", "transformers/models", "transformers/models/auto"):
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "transformers" / "models" / "auto" / "configuration_auto.py").write_text("LOADED = True\n")
    (tmp_path / "transformers-4.57.1.dist-info").mkdir()
    (tmp_path / "transformers-4.57.1.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 4.57.1\n")
    ran = subprocess.run([sys.executable, "-c", OPERATOR, str(tmp_path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    fast, shape, absent, loaded, old = ran.stdout.splitlines()
    assert (fast, shape, loaded) == ("True", "(1, 4, 2, 8)", "True")
    assert "pip install -e '.[model]'" in absent
    assert "need transformers 5.20 or newer, 4.57.1 is installed" in old


def test_bfloat16_keeps_slopes_and_angles_exact(tmp_path):
    model, ids = tiny_model(), tokens(1, 20)
    model.save_pretrained(tmp_path)
    loaded = SwatForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for layer, original in zip(loaded.model.stack, model.model.stack, strict=True):
        slopes, expected = layer.self_attn._slopes, original.self_attn._slopes
        assert slopes.dtype == torch.float32
        assert torch.equal(slopes, expected)
    positions = torch.tensor([[10**7]])
    for ours, other in zip(loaded.model.stack, model.model.stack, strict=True):
        cos, sin = ours.self_attn.rotary.angles(positions, torch.bfloat16)
        other_cos, other_sin = other.self_attn.rotary.angles(positions, torch.float32)
        assert torch.equal(cos, other_cos)
        assert torch.equal(sin, other_sin)
    assert loaded(ids).logits.dtype == torch.bfloat16
    # the error of bf16 weights, not of bf16 slopes
    difference = (loaded(ids).logits.float() - model(ids).logits).abs().max()
    assert difference < 0.05 * model(ids).logits.abs().max()


@pytest.mark.parametrize("learned_sink", [True, False])
def test_meta_initialisation_leaves_nothing_uninitialised(learned_sink):
    # without a sink no layer has parameters of its own, and all are started still
    config, ids = (
        tiny_config(output_projection_init_scale=0.5, score_function="softmax", learned_sink=learned_sink),
        tokens(1, 12),
    )
    with torch.device("meta"):
        model = SwatForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.init_weights()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    whole = SwatForCausalLM(config)
    whole.load_state_dict(model.state_dict())
    assert torch.equal(whole.eval()(ids).logits, model.eval()(ids).logits)
    for layer in model.model.stack:
        ratio = layer.self_attn.o_proj.weight.std() / layer.self_attn.q_proj.weight.std()
        assert 0.4 < ratio.item() < 0.6
        ratio = layer.mlp.down_proj.weight.std() / layer.mlp.up_proj.weight.std()
        assert 0.4 < ratio.item() < 0.6


def test_rotary_base_per_layer():
    config = {"rope_theta": [1e4, 10.0], "use_rotary": [True, True]}
    place = torch.tensor([[3]]), torch.float32
    first, second = (layer.self_attn.rotary.angles(*place) for layer in tiny_model(**config).model.stack)
    expected = [torch.cos(3.0 * base ** (-torch.arange(0, 8, 2) / 8.0)) for base in (1e4, 10.0)]
    close(first[0][0, 0], expected[0])
    close(second[0][0, 0], expected[1])
    assert tiny_model(use_rotary=[True, False]).model.stack[1].self_attn.rotary is None
    ids = tokens(1, 9)
    assert not torch.allclose(tiny_model(**config)(ids).logits, tiny_model()(ids).logits)


def test_tied_embeddings_are_stored_once(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = SwatForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


def test_nothing_is_done_for_no_tokens():
    model = tiny_model()
    assert model(torch.zeros(2, 0, dtype=torch.long)).logits.shape == (2, 0, 97)


def test_what_tools_find_the_classes_by_is_in_the_file_alone(tmp_path):
    """Manifests of checkpoints and keys of measurements are made of the values, and older ones lack it."""
    config = tiny_config()
    before = config.to_json_string(use_diff=False)
    config.save_pretrained(tmp_path)
    assert "auto_map" in json.loads((tmp_path / "config.json").read_text())
    assert config.to_json_string(use_diff=False) == before
    assert "auto_map" not in json.loads(SwatConfig.from_pretrained(tmp_path).to_json_string(use_diff=False))
    # which older versions of this folder have not, and load all the same
    values = json.loads((tmp_path / "config.json").read_text())
    del values["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert SwatConfig.from_pretrained(tmp_path).auto_map["AutoConfig"] == "modeling_swat.SwatConfig"


def test_base_model_gives_the_hidden_states():
    model, ids = tiny_model(), tokens(2, 12)
    hidden = model.model(ids).last_hidden_state
    assert isinstance(model.model, SwatModel)
    close(model.lm_head(hidden), model(ids).logits)
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == 3
    close(states[-1], hidden)
    close(states[0], model.model.embed_tokens(ids))


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "flex_attention"])
def test_other_attention_is_refused(tmp_path, implementation):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its own operator"):
        SwatForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    with pytest.raises(ValueError, match="its own operator"):
        model.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match="its own operator"):
        SwatForCausalLM(
            SwatConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, attn_implementation=implementation)
        )
    assert SwatForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"


def test_attention_weights_cannot_be_asked_for():
    with pytest.raises(ValueError, match="output_attentions"):
        tiny_model()(tokens(1, 4), output_attentions=True)
    with pytest.raises(TypeError, match="atention_mask"):
        tiny_model()(tokens(1, 4), atention_mask=torch.ones(1, 4))
