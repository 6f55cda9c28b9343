"""Steps that are recorded once and done again: the same tokens, slots and counts as calls, in memory that stays."""

from collections.abc import Callable

import pytest
import torch

from swat_lm.serve.engine import Engine, Event, Generation
from swat_lm.serve.requests import Limits
from swat_lm.serve.sampling import Sampling
from swat_lm.serve.stepping import GraphedSteps
from tests.serve.test_engine import Letters, built, engine_of, prompts, run


def called_again(function: Callable[[], None]) -> Callable[[], None]:
    """Stands for a graph: what it recorded is done again."""
    function()
    return function


def talk(engine: Engine) -> list[Event]:
    """Requests that come, fork and end at different times, so that batches have all sizes."""
    for key, prompt in enumerate(prompts(6, seed=3)):
        engine.submit(Generation(key, prompt, Sampling(seed=key, max_tokens=3 + 2 * key, n=1 + key % 2)))
    return run(engine)


@pytest.mark.parametrize("plan", ["windows", "recurrence"])
def test_a_recorded_step_is_a_step(plan: str):
    model = built(plan)
    plain, graphed = engine_of(model, slots=6), engine_of(model, slots=6)
    graphed.steps = GraphedSteps(model, graphed.slots, graphed.batches, called_again)
    addresses = {size: logits.data_ptr() for size, logits in graphed.steps._logits.items()}
    assert set(addresses) == {1, 2, 4, 6}
    assert int(graphed.slots.position.max()) == 0
    assert talk(graphed) == talk(plain)
    assert {size: logits.data_ptr() for size, logits in graphed.steps._logits.items()} == addresses
    assert graphed.slots.fullest >= int(graphed.slots.position.max())


def test_what_cannot_be_recorded_is_refused():
    full, windows = built("full"), built("windows")
    with pytest.raises(ValueError, match="keeps all it has seen"):
        GraphedSteps(full, full.init_state(4, capacity=20), (1, 2), called_again)
    with pytest.raises(ValueError, match="at least two slots"):
        GraphedSteps(windows, windows.init_state(1), (1,), called_again)
    with pytest.raises(ValueError, match="graphs: expected a model on a CUDA device, got cpu"):
        Engine(windows, Limits(2, 10, 8), Letters(), graphs=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that PyTorch can use")
@pytest.mark.parametrize("plan", ["windows", "recurrence"])
def test_graphs_on_a_gpu(plan: str):
    model = built(plan).cuda()
    limits = Limits(6, 12, 7)
    plain, graphed = Engine(model, limits, Letters()), Engine(model, limits, Letters(), graphs=True)
    assert talk(graphed) == talk(plain)
    before = torch.cuda.memory_stats()["num_device_alloc"]
    talk(graphed)
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
