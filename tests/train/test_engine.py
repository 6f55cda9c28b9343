import pytest
import torch

from swat_lm.recipe import TrainRecipe
from swat_lm.train.engine import Engine, choose_precision, mesh_shape


@pytest.mark.parametrize(
    ("sharding", "replicas", "num_processes", "expected"),
    [
        ("auto", 1, 8, (1, 8)),
        ("full", 1, 8, (1, 8)),
        ("none", 1, 8, (8, 1)),
        ("hybrid", 2, 8, (2, 4)),
        ("hybrid", 8, 8, (8, 1)),
        ("auto", 1, 1, (1, 1)),
    ],
)
def test_mesh(sharding, replicas, num_processes, expected):
    assert mesh_shape(TrainRecipe(sharding=sharding, replicas=replicas), num_processes) == expected


def test_replicas_must_divide_the_processes():
    with pytest.raises(ValueError, match=r"replicas \(3\) must divide the number of processes \(8\)"):
        mesh_shape(TrainRecipe(sharding="hybrid", replicas=3), 8)


def test_precision_on_a_cpu():
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == "fp32"
    assert choose_precision("bf16", cpu) == "bf16"
    assert choose_precision("fp32", cpu) == "fp32"


@pytest.mark.parametrize("largest", [None, 1e-3, 1e3])
def test_clipping_is_torch_own(largest):
    model = torch.nn.Linear(5, 3)
    model(torch.randn(4, 5)).square().sum().backward()
    twin = torch.nn.Linear(5, 3)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.grad is not None
        other.grad = one.grad.clone()
    norm = Engine(TrainRecipe()).clip_gradients(model, largest)
    expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), largest or float("inf"))
    assert torch.equal(norm, expected)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(("rank", "expected"), [(0, range(0, 3)), (1, range(3, 6))])
def test_rows_of_a_process(rank, expected):
    engine = Engine(TrainRecipe(batch_size=6))
    engine.num_processes, engine.rank = 2, rank
    assert engine.rows() == expected


def test_rows_must_divide_evenly():
    engine = Engine(TrainRecipe(batch_size=6, micro_batch_size=2))
    assert engine.rows() == range(6)
    engine.num_processes = 4
    with pytest.raises(ValueError, match=r"batch_size \(6\) must be a multiple of the number of processes \(4\)"):
        engine.rows()
    engine.num_processes = 2
    with pytest.raises(ValueError, match=r"micro_batch_size \(2\) must divide the 3 rows"):
        engine.rows()
