"""What the tests of the benchmark for GPUs share: small shapes, a clock that says what it likes, and defects."""

import torch

from benchmarks.gpu import device, peers
from benchmarks.gpu.candidates import Candidate, Inputs
from benchmarks.gpu.shapes import Shape

SHAPE = Shape(2, 4, 2, 150, 40, 8, torch.float32)
RINGS = Shape(64, 2, 1, 32, 8, 16, torch.float32)
ROOF = device.Roof(1e12, 1e11)


class FakeDevice:
    """A CPU whose clock says what it likes, after running what it should time."""

    torch_device = torch.device("cpu")
    cache_bytes = 2**10

    def __init__(self, seconds=lambda run: 0.01):
        self.seconds, self.runs = seconds, []

    def clock(self, run):
        run()
        self.runs.append(run)
        return self.seconds(run)

    def capture(self, run):
        run()
        return run

    def compile(self, function, thorough):
        return function

    def free(self):
        pass

    def forget_compiled(self):
        pass

    def describe(self):
        return {"name": "Fake H100", "driver_version": "1.2"}


def candidate(attend, name="swat-lm sigmoid", score_function="sigmoid", **more):
    return Candidate(name, attend, score_function, **more)


def wrapped(change):
    """The blocked backend with a defect."""
    exact = peers.ours("blocked")

    def build(shape, slopes, fake, thorough):
        (right,) = exact(shape, slopes, fake, thorough)
        return [candidate(lambda q, k, v: change(right.attend, q, k, v), has_slopes=True)]

    return build


def inputs():
    return Inputs(SHAPE, torch.device("cpu"), 2)


def built(peer, fake=None):
    shape_inputs = inputs()
    return peer(SHAPE, shape_inputs.slopes, fake or FakeDevice(), False), shape_inputs


def shift(attend, q, k, v):
    """A window that is one key too long, as a wrong convention makes it."""
    return attend(torch.cat((q[:, :1], q), 1), torch.cat((k[:, :1], k), 1), torch.cat((v[:, :1], v), 1))[:, 1:]


DEFECTS = {
    "the output is not finite": lambda attend, q, k, v: attend(q, k, v) / (v.sum() * 0),
    "the output is wrong": lambda attend, q, k, v: attend(q, k, v) * 1.001,
    "the gradient of the key is wrong": lambda attend, q, k, v: attend(q, k.detach() + 0.999 * (k - k.detach()), v),
    "the gradient of the value is wrong": lambda attend, q, k, v: attend(q, k, v.detach() + 1.1 * (v - v.detach())),
}
