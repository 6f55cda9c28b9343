"""Weights that keep float32 where a model is narrow: by a cast, by loading, by sharded training."""

from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.precise import Precise
from swat_lm.recipe import TrainRecipe
from swat_lm.train.engine import Engine
from tests.layers.subject import tokens

LAYERS = [
    {"kind": "spade", "state_size": 8, "step_rate": 0.0, "slopes": "none"},
    {"kind": "sparsek", "k": 4, "sliding_window": 4},
]
NAMES = {"exit", "skip", "log_step", "log_decay", "angle", "low_rank", "entry"}


def model() -> SwatForCausalLM:
    torch.manual_seed(0)
    config = SwatConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, layers=LAYERS,
    )  # fmt: skip
    return SwatForCausalLM(config)


def precise(one: SwatForCausalLM) -> dict[str, torch.Tensor]:
    ssm, sparsek = one.model.layers[0].self_attn.ssm, one.model.layers[1].self_attn
    held = dict(ssm.named_parameters()) | dict(ssm.named_buffers())
    assert held.keys() == NAMES
    return held | {"score": sparsek.score_proj.weight}


def same(one: SwatForCausalLM, other: SwatForCausalLM) -> None:
    assert one.dtype in (torch.bfloat16, torch.float16)
    assert one.model.layers[0].self_attn.attention.q_proj.weight.dtype == one.dtype
    for name, value in precise(one).items():
        assert torch.equal(value, precise(other)[name].float()), name
        assert value.dtype == torch.float32, name


def test_casts_and_loading_keep_them(tmp_path):
    whole = model()
    same(model().bfloat16(), whole)
    same(model().half(), whole)
    same(model().to(torch.bfloat16), whole)
    assert {value.dtype for value in precise(model().double()).values()} == {torch.float64}
    whole.save_pretrained(tmp_path / "whole")
    narrow = SwatForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    same(narrow, whole)
    narrow.save_pretrained(tmp_path / "narrow")
    same(SwatForCausalLM.from_pretrained(tmp_path / "narrow", dtype="auto"), whole)
    narrow.eval()
    assert torch.isfinite(narrow.generate(tokens(1, 9), max_new_tokens=3, do_sample=False)).all()


def test_what_they_compute_is_as_exact_as_in_a_wide_model():
    whole, narrow = model().eval(), model().bfloat16().eval()
    hidden, chunk = torch.randn(1, 256, 32).bfloat16(), Chunk(torch.arange(256)[None])
    with torch.no_grad():
        want, found = (one.model.layers[0].self_attn.ssm(hidden, chunk, None) for one in (whole.float(), narrow))
        assert torch.equal(found, want)
        mixers = [one.model.layers[1].self_attn for one in (whole, narrow)]
        want, found = (mixer._learned(hidden) for mixer in mixers)
        with torch.autocast("cpu", torch.bfloat16):
            under = mixers[1]._learned(hidden)
    assert found.dtype == torch.float32
    assert torch.equal(found, want)
    assert torch.equal(under, want)


@pytest.fixture
def one_process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_sharded_training_gathers_them_whole(one_process_group):
    """And the others as bf16, as they were."""
    engine = Engine(TrainRecipe(precision="bf16", batch_size=2))
    # what several processes do, in one
    engine.num_processes, engine.mesh_shape = 2, (1, 1)
    one, seen = engine.set_up(model()).train(), {}

    def look(module: nn.Module, arguments: tuple) -> None:
        seen.update({(type(module).__name__, name): tensor.dtype for name, tensor in module.named_parameters()})

    for module in one.modules():
        if isinstance(module, (Precise, nn.Linear)):
            module.register_forward_pre_hook(look)
    ids = tokens(2, 12)
    with engine.autocast():
        loss = one(ids, labels=ids).loss
    loss.backward()
    kinds = {name: {dtype for (kind, _), dtype in seen.items() if kind == name} for name, _ in seen}
    assert kinds == {
        "FSDPStructuredState": {torch.float32}, "FSDPPreciseLinear": {torch.float32}, "Linear": {torch.bfloat16},
    }  # fmt: skip
    assert all(parameter.grad is not None for parameter in one.model.layers[0].self_attn.ssm.parameters())
