"""The example layer of docs/extending.md, taken from the page as a reader would, keeps the contract and trains."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from torch import nn

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.layers import LAYERS, Layer
from swat_lm.layers.base import Output, Shared, StateTensor
from swat_lm.layers.chunk import Chunk
from swat_lm.model.recipe_fields import config_from_recipe
from tests.layers.contract import CHECKS, Check, Subject, name_of

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Code on the page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> ModuleType:
    """The example as a file of its own."""
    (code,) = blocks("python")
    path = tmp_path_factory.mktemp("example") / "example_average.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[path.stem]


@pytest.fixture
def kind(written, monkeypatch) -> type[Layer]:
    """The example with its row in the table."""
    monkeypatch.setitem(LAYERS, "average", written.AverageLayer)
    return written.AverageLayer


@pytest.mark.parametrize("plan", [["average"], ["average", "attention"]], ids="-".join)
@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_the_example_keeps_the_contract(check: Check, plan: list[str], kind, tmp_path):
    check(Subject("-".join(plan), plan), tmp_path)


def test_the_example_is_its_equation(kind):
    torch.manual_seed(0)
    layer = kind(kind.Settings(), 8, 1e-6).double()
    layer.init_weights(Shared())
    hidden, average = torch.randn(2, 9, 8, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.float64)
    memory = 1 / (1 - layer.decay_logit.sigmoid())
    torch.testing.assert_close(memory[[0, -1]].tolist(), [2.0, 256.0], rtol=1e-5, atol=0)
    output = layer(hidden, Chunk(torch.arange(9)[None])).hidden
    for place in range(9):
        value, gate = layer.in_proj(layer.norm(hidden[:, place])).chunk(2, dim=-1)
        average = average + (value - average) / memory
        expected = hidden[:, place] + layer.out_proj(nn.functional.silu(gate) * average)
        torch.testing.assert_close(output[:, place], expected)


def test_the_plan_on_the_page(kind):
    (plan,) = blocks("yaml")
    config = config_from_recipe(yaml.safe_load(plan)["model"], 259)
    assert [entry.kind.name for entry in config.plan()] == 4 * ["average", "average", "attention"]
    assert config.plan()[1].settings.longest_memory == 1024
    assert SwatConfig.from_dict(config.to_dict()).layers == config.layers
    # started by the layer, not left at zero
    model = SwatForCausalLM(SwatConfig(hidden_size=64, num_hidden_layers=1, layers=["average"], vocab_size=9))
    assert len(set(model.model.layers[0].decay_logit.tolist())) == 64


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"longest_memory": 1}, r"layers\[0\] \(average\): longest_memory: expected at least 2, got 1"),
        ({"longest_memry": 9}, r"layers\[0\] \(average\): unknown setting 'longest_memry'; did you mean 'longest_mem"),
        ({"longest_memory": "long"}, r"layers\[0\] \(average\): longest_memory must be a finite number; got 'long'"),
        (
            {"sliding_window": 5},
            r"layers\[0\] \(average\): 'sliding_window' is a setting of attention, .*not of average",
        ),
    ],
)
def test_its_settings_are_checked(kind, entry, message):
    with pytest.raises(ValueError, match=message):
        SwatConfig(hidden_size=64, num_hidden_layers=2, layers=[{"kind": "average", **entry}])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (StateTensor("average", (64,)), "average: expected `items` of at least 1 for a window"),
        (StateTensor("average", (64,), "summary", 3), "got summary with items=3"),
        (StateTensor("average", (64,), "sumary"), "average: expected window, growing or summary, got 'sumary'"),
    ],
)
def test_a_state_that_cannot_be_is_named(kind, spec, message, monkeypatch):
    model = Subject("average", ["average"]).model()
    monkeypatch.setattr(kind, "state_spec", lambda self: (spec,))
    for begin in (model.init_state, model.init_carry):
        with pytest.raises(ValueError, match=f"^state_spec: .*{message}"):
            begin()
    monkeypatch.setattr(
        kind, "state_spec", lambda self: (StateTensor("x", (), "growing"), StateTensor("x", (), "growing"))
    )
    with pytest.raises(ValueError, match="state_spec: expected different names"):
        model.init_state()


def test_a_layer_that_drops_its_past_is_named(kind, monkeypatch):
    model, ids = Subject("average", ["average"]).model(), torch.arange(5)[None]
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *given: Output(forward(*given).hidden))
    with pytest.raises(AssertionError, match=r"layer 0 \(average\) got a past and returned none"):
        model.prefill(ids, model.init_state())
    assert model(ids, use_cache=False).logits.isfinite().all()
