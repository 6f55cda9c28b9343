"""The distributed engine under the training loop, and the only file that knows torch.distributed.

One process: plain PyTorch, no process group. Several (`torchrun`): FSDP2 `fully_shard` over a mesh [replicas, shards],
so that replicated, fully sharded and hybrid runs are one code path. Checkpoints are DCP's, which reshard on loading.
"""

import atexit
import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from swat_lm.data import Batch
from swat_lm.layers.precise import Precise
from swat_lm.model.execution.chunks import ReverseChunks
from swat_lm.recipe import TrainRecipe
from swat_lm.train.plain_reading import PlainPlanner, PlainReader

if sys.platform != "win32":
    import resource

__all__ = ["Engine", "choose_precision", "mesh_shape"]

Result = TypeVar("Result")


@contextmanager
def single_process_notice_ignored() -> Iterator[None]:
    """DCP warns whenever it runs without a process group, which here is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


class Engine:
    """This process's place among all processes and what they do together.

    The process group comes from torchrun's environment (NCCL for CUDA tensors, gloo for CPU tensors) unless there is
    one already, and stays until the process ends, because torchrun's rendezvous serves only one per process.
    """

    def __init__(self, train: TrainRecipe) -> None:
        self.train = train
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        on_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
        if on_cuda:
            torch.cuda.set_device(self.device)
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # one process may tokenise the whole data while the others wait
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timedelta(hours=2))
            atexit.register(dist.destroy_process_group)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.num_processes = dist.get_world_size() if dist.is_initialized() else 1
        self.is_main = self.rank == 0
        self.precision = choose_precision(train.precision, self.device)
        self.mesh_shape = mesh_shape(train, self.num_processes)
        self.is_last_micro_batch = True

    def rows(self) -> range:
        """The rows of the global batch that this process computes.

        Raises ValueError if the batch does not divide evenly.
        """
        share, rest = divmod(self.train.batch_size, self.num_processes)
        if rest:
            raise ValueError(
                f"train.batch_size ({self.train.batch_size}) must be a multiple of the number of processes "
                f"({self.num_processes})"
            )
        micro = self.train.micro_batch_size
        if micro is not None and share % micro:
            raise ValueError(
                f"train.micro_batch_size ({micro}) must divide the {share} rows that each of {self.num_processes} "
                f"processes has of train.batch_size ({self.train.batch_size})"
            )
        return range(self.rank * share, (self.rank + 1) * share)

    def set_up(self, model: nn.Module) -> nn.Module:
        """Make a model built on the CPU ready to train here: compiled, sharded, on the device.

        Every process must have built the same weights (same seed, on the CPU, where equal seeds give equal weights
        whatever the device and the number of processes). The layers are the modules named in `_no_split_modules`.
        """
        names = set(model._no_split_modules or ())  # type: ignore[arg-type,union-attr]
        layers = [module for module in model.modules() if type(module).__name__ in names]
        if not layers:
            raise ValueError(f"{type(model).__name__}._no_split_modules names none of its modules: cannot shard it")
        if self.train.compile:
            for layer in layers:
                layer.compile()
        if self.num_processes == 1:
            return model.to(self.device)
        mesh = init_device_mesh(self.device.type, self.mesh_shape, mesh_dim_names=("replicate", "shard"))
        mesh = mesh if self.mesh_shape[0] > 1 else mesh["shard"]
        # autocast rules the arithmetic, as on one process; bf16 here halves what the all-gathers move
        moved = torch.bfloat16 if self.precision == "bf16" else None
        policy = MixedPrecisionPolicy(moved, torch.float32, cast_forward_inputs=False)
        whole = MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)
        for module in model.modules():
            if isinstance(module, Precise):
                fully_shard(module, mesh=mesh, mp_policy=whole)
        for module in (*layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        execution = getattr(model, "execution", None)
        if isinstance(execution, ReverseChunks):
            execution.before_backward = partial(self.before_chunk, model)
        return model

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes: bf16 autocast or nothing."""
        is_narrow = self.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if is_narrow else nullcontext()

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """This process's rows in parts of `micro_batch_size`, on the device."""
        return [part.to(self.device) for part in batch.split(self.train.micro_batch_size or len(batch.input_ids))]

    def accumulate(self, model: nn.Module, last: bool) -> None:
        """Before a micro-batch: replicas exchange gradients only after the last one of a step."""
        self.is_last_micro_batch = last
        if isinstance(model, FSDPModule):
            model.set_requires_all_reduce(last)
            model.set_is_last_backward(last)

    def before_chunk(self, model: nn.Module, last: bool) -> None:
        """Before a chunk goes backward: gradients of a micro-batch are reduced with its last chunk, all of them."""
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(last)
        model.set_requires_all_reduce(last and self.is_last_micro_batch)
        model.set_is_last_backward(last and self.is_last_micro_batch)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.num_processes > 1:
            dist.all_reduce(values)
        return values

    def clip_gradients(self, model: nn.Module, largest: float | None) -> Tensor:
        """Scale the gradients to a global 2-norm of at most `largest`; returns the norm before, a scalar."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if largest is not None:
            # as torch's own clip_grad_norm_, on a norm that is already whole
            factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
            for gradient in gradients:
                local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                local.mul_(factor.to(local.device))
        return norm

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Run `action` on the main process only; every process gets its result or raises its OSError or ValueError."""
        if self.num_processes == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome = [action(), None]
            except (OSError, ValueError) as error:
                outcome = [None, error]
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if outcome[1] is not None:
            # so that what all processes raise need be told by one only
            outcome[1].from_main_process = True
            raise outcome[1]
        return outcome[0]

    def on_main_only(self, action: Callable[[], Result]) -> Result | None:
        """As `on_main`, for results that stay there: the others get None."""
        kept: list[Result] = []
        self.on_main(lambda: kept.append(action()))
        return kept[0] if kept else None

    @single_process_notice_ignored()
    def write_state(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write weights, optimizer state and what the objective keeps into an existing folder, each process its part.

        Raises OSError.
        """
        weights, state = get_state_dict(model, optimizer)
        kept = {"objective": dict(objective)} if objective else {}
        try:
            dcp_save(
                {"model": weights, "optimizer": state, **kept},
                storage_writer=FileSystemWriter(folder, single_file_per_rank=True, sync_files=True),
                no_dist=self.num_processes == 1,
            )
        except CheckpointException as error:
            raise system_error([cause for cause, _ in error.failures.values()]) from error

    def read_state(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Read what `write_state` wrote, on any number of processes; raises ValueError naming the folder.

        Returns of the objective's state, whose names and shapes `objective` tells, what the checkpoint has: one that
        an earlier version wrote has none.
        """
        held = names_in(folder)
        weights, state = get_state_dict(model, optimizer)
        kept = {name: tensor.clone() for name, tensor in (objective or {}).items() if f"objective.{name}" in held}
        fill(
            {"model": weights, "optimizer": state, **({"objective": kept} if kept else {})},
            folder,
            alone=self.num_processes == 1,
        )
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        return kept

    def read_weights(self, folder: Path, model: nn.Module) -> None:
        """Read the weights alone of what `write_state` wrote into a model on the CPU that is not set up yet.

        Each process reads all of them. Raises ValueError naming the folder.
        """
        names_in(folder)
        weights = get_model_state_dict(model)
        fill({"model": weights}, folder, alone=True)
        set_model_state_dict(model, weights)

    def whole_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights on the CPU of the main process, by name; empty on the others."""
        return cast(
            dict[str, Tensor],
            get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)),
        )

    def peak_memory_bytes(self) -> int | None:
        """Most memory in use so far: of the device for CUDA, else of this process; None where unknown (Windows)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform == "win32":
            return None
        # macOS counts bytes, Linux KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@single_process_notice_ignored()
def fill(parts: dict[str, Any], folder: Path, alone: bool) -> None:
    """Read parts of a checkpoint into tensors, with the other processes or `alone`; ValueError names the folder."""
    try:
        dcp_load(parts, storage_reader=PlainReader(folder), planner=PlainPlanner(), no_dist=alone)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(f"cannot read checkpoint {folder}: {str(cause).splitlines()[0]}") from error


def names_in(folder: Path) -> frozenset[str]:
    """The names of all that a checkpoint holds; raises ValueError naming the folder."""
    try:
        # DCP would report an unreadable index in several lines and tracebacks
        return frozenset(PlainReader(folder).read_metadata().state_dict_metadata)
    except (UnpicklingError, EOFError, AttributeError, OSError) as error:
        raise ValueError(f"cannot read checkpoint {folder}: {error}") from error


def choose_precision(wanted: str, device: torch.device) -> str:
    """`fp32` or `bf16`; `auto` is bf16 only on CUDA hardware that computes in it.

    A CPU stays fp32: without AMX or AVX512-BF16 its bf16 matrix products are many times slower.
    """
    if wanted != "auto":
        return wanted
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "fp32"


def mesh_shape(train: TrainRecipe, num_processes: int) -> tuple[int, int]:
    """(replicas, shards) of the process mesh. Raises ValueError if `replicas` does not divide the processes."""
    if train.sharding == "none":
        return num_processes, 1
    if train.sharding != "hybrid":
        return 1, num_processes
    if num_processes % train.replicas:
        raise ValueError(
            f"train.replicas ({train.replicas}) must divide the number of processes ({num_processes}) under "
            "train.sharding=hybrid"
        )
    return train.replicas, num_processes // train.replicas


def system_error(errors: Sequence[BaseException]) -> OSError:
    """The first OSError with a number among errors and what they come from.

    torch's file writer only says that a file is shorter than it should be, and keeps the system's reason behind that.
    Where there is none, an input/output error with the first error's words.
    """
    for error in errors:
        reason, seen = error, set()
        while reason is not None and id(reason) not in seen:
            if isinstance(reason, OSError) and reason.errno is not None:
                return reason
            seen.add(id(reason))
            reason = reason.__cause__ or reason.__context__
    words = str(errors[0]).splitlines()
    return OSError(errno.EIO, words[0] if words else type(errors[0]).__name__)
