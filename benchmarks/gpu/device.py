"""The card that is measured: its clock, its graphs, its own rates and its name. Tests put another one in its place."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch._functorch.config

from benchmarks import measure

# cycles, about 30 ms: a Python call of an operator takes longer than some of the kernels that it queues
HEAD_START = 50_000_000
# dense bfloat16 TFLOP/s with fp32 sums, of NVIDIA's data sheets, for the share of the peak that others quote as MFU
PEAK_TFLOPS = {"H200": 989.4, "H100 PCIe": 756.0, "H100": 989.4, "A100": 312.0, "B200": 2250.0, "L40S": 362.0}


class Device(Protocol):
    """What the benchmark asks of a device."""

    torch_device: torch.device
    cache_bytes: int

    def clock(self, run: Callable[[], Any]) -> float:
        """Run once; seconds on the device."""
        ...

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Return something that repeats a run without the cost of launching it."""
        ...

    def compile(self, function: Callable, thorough: bool) -> Callable:
        """Return the function as the device's compiler makes it."""
        ...

    def free(self) -> None:
        """Give unused memory back."""
        ...

    def forget_compiled(self) -> None:
        """Drop what the compiler has made for earlier shapes."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name, driver and what else a figure depends on."""
        ...


class CudaDevice:
    """The current NVIDIA GPU."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.torch_device)
        self.cache_bytes = self.properties.L2_cache_size

    def clock(self, run: Callable[[], Any]) -> float:
        """Run once; seconds on the GPU, which does not wait for the host meanwhile."""
        return measure.cuda_clock(run, HEAD_START)

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Record the run in a CUDA graph, after a warm-up on a side stream."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def compile(self, function: Callable, thorough: bool) -> Callable:
        """Compile for the shapes at hand; thorough lets the compiler search for tiles."""
        return compile_to_repeat(function, mode="max-autotune-no-cudagraphs" if thorough else None)

    def free(self) -> None:
        """Empty PyTorch's cache of memory."""
        torch.cuda.empty_cache()

    def forget_compiled(self) -> None:
        """Begin anew: after eight versions of a function torch.compile would run it uncompiled, an unfair peer."""
        torch.compiler.reset()

    def describe(self) -> dict[str, Any]:
        """What nvidia-smi and PyTorch say."""
        fields = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
        query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", self._uuid()]
        try:
            said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
        except (OSError, subprocess.CalledProcessError):
            said = ["unknown"] * len(fields)
        return {
            "name": self.properties.name,
            "capability": f"{self.properties.major}.{self.properties.minor}",
            "multiprocessors": self.properties.multi_processor_count,
            "memory_gib": round(self.properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            **{field.replace(".", "_"): value for field, value in zip(fields, said, strict=True)},
        }

    def _uuid(self) -> str:
        return f"GPU-{self.properties.uuid}"


@dataclass(frozen=True)
class Roof:
    """What the card itself reaches in the same run."""

    flops_per_second: float
    """Of a large bfloat16 product."""
    bytes_per_second: float
    """Of a large copy, bytes read and bytes written together."""


def compile_to_repeat(function: Callable, **options: Any) -> Callable:
    """Compile for the shapes at hand, so that one backward pass can be taken many times.

    Compiled backward passes reuse the memory of what the forward saved, and then refuse to run a second time.
    """
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False, **options)


def measure_roof(device: Device, size: int = 8192, copy_bytes: int = 2**30, rounds: int = 5, repeats: int = 10) -> Roof:
    """Time square products and copies, both far larger than any cache."""
    a, b = (torch.randn(size, size, device=device.torch_device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=product)

    def copy() -> None:
        for _ in range(repeats):
            target.copy_(source)

    timings = measure.take_turns({"product": multiply, "copy": copy}, rounds, clock=device.clock)
    return Roof(repeats * 2 * size**3 / timings["product"].median, repeats * 2 * copy_bytes / timings["copy"].median)


def peak_flops(name: str) -> float | None:
    """The data sheet's dense bfloat16 rate of a card; None for one that is not in the table."""
    found = [tflops for part, tflops in PEAK_TFLOPS.items() if part in name]
    return found[0] * 1e12 if found else None
