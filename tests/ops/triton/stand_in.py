"""A stand-in for a GPU: Triton's interpreter made to run what a GPU would run, and to refuse what one would.

Kernels get HARDWARE=True, the shipped tiles, bfloat16 and inline assembly. The programs of a launch run in a shuffled
order, new memory is full of NaN, and arithmetic on 16-bit numbers outside of products raises: the kernels promise none.
Not shown: speed, the compiler, what happens between programs at one time.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from benchmarks.gpu.machine_code import POINTERS
from swat_lm.ops import dispatch
from swat_lm.ops.triton import availability, configurations, decode
from swat_lm.ops.triton.availability import Gpu
from tests.ops.triton.instructions import TANH_ERROR, from_bfloat16, instructions, to_bfloat16, to_tf32
from tests.ops.triton.launch_memory import LaunchMemory

# of a GPU of each compute capability
MULTIPROCESSORS = {(8, 0): 108, (8, 6): 84, (9, 0): 132, (12, 0): 170}
# under which a pointer keeps the number of its tensor
_TENSOR = "tensor"
_HALVES = (tl.float16, tl.bfloat16)
_implicit_cvt = interpreter._implicit_cvt
_run = interpreter.InterpretedFunction.run


class Launch(NamedTuple):
    """One launch of a kernel."""

    module: str
    kernel: str
    # by name, in the words of compiling.py
    arguments: dict[str, Any]
    # num_warps, num_stages, maxnreg
    options: dict[str, Any]


@contextmanager
def standing_in(
    capability: tuple[int, int] = (9, 0),
    wide_window: int = configurations.WIDE_WINDOW,
    tanh_error: float = TANH_ERROR,
) -> Iterator[list[Launch]]:
    """Run kernels on CPU tensors as a GPU would; needs TRITON_INTERPRET=1. Yields the launches, as they come.

    Args:
        capability: one of `MULTIPROCESSORS`.
        wide_window: from which window on tiles are those of wide windows; less spares long sequences.
        tanh_error: of the hardware's tanh, relative.
    """
    gpu = Gpu(f"stand-in for capability {capability}", capability, MULTIPROCESSORS[capability])
    builder = interpreter.interpreter_builder
    launches: list[Launch] = []
    patches: list[tuple[object, str, object]] = [
        (builder, "__class__", _Builder),
        # checked there too, in half the time
        (builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False)),
        (interpreter, "_implicit_cvt", _argument),
        (interpreter.InterpretedFunction, "run", _recorded(launches)),
        (interpreter.InterpretedFunction, "__call__", _called),
        (interpreter.ReduceScanOpInterface, "check_tensor", _checked_reduction),
        (dispatch, "why_not", _why_not),
        (configurations, "WIDE_WINDOW", wide_window),
        *((module, "gpu_of", lambda device: gpu) for module in (availability, configurations, decode)),
        *((owner, name, _poisoned(getattr(owner, name))) for owner, name in _NEW_MEMORY),
    ]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(builder.codegen_fns, min_dot_size=_min_dot_size(gpu)))
        for owner, name, replacement in patches:
            stack.enter_context(_replaced(owner, name, replacement))
        builder.memory, builder.units = LaunchMemory(), instructions(tanh_error)
        yield launches


@contextmanager
def _replaced(owner: Any, name: str, replacement: object) -> Iterator[None]:
    before, is_own = getattr(owner, name), name in vars(owner) or name == "__class__"
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, before) if is_own else delattr(owner, name)


_NEW_MEMORY = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What a GPU's memory holds before it is written is not 0."""

    def poisoned(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor = make(*arguments, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    return poisoned


def _why_not(device: torch.device, dtype: torch.dtype, *rest: Any) -> str | None:
    return availability.why_not(device, torch.float16 if dtype == torch.bfloat16 else dtype, *rest)


def _min_dot_size(gpu: Gpu) -> Callable[..., tuple[int, int, int]]:
    return min_dot_size(GPUTarget("cuda", 10 * gpu.capability[0] + gpu.capability[1], 32))


def _argument(argument: Any) -> Any:
    """Turn what a launch is given into what a kernel sees: numbers are float32, not Python's."""
    if isinstance(argument, torch.Tensor):
        pointer = _implicit_cvt(argument)
        pointer.handle.set_attr(_TENSOR, interpreter.interpreter_builder.memory.add(argument))
        return pointer
    if isinstance(argument, float):
        return tl.tensor(TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
    return _implicit_cvt(argument)


def _recorded(launches: list[Launch]) -> Callable[..., None]:
    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        named = dict(zip(self.arg_names, arguments, strict=False)) | options
        own = {name: named.pop(name) for name in self.arg_names}
        fixed = self.kwargs.get("do_not_specialize") or ()
        described = {n: x if n.isupper() else _described(x, n not in fixed) for n, x in own.items()}
        options = {name: x for name, x in named.items() if x is not None}
        launches.append(Launch(self.fn.__module__, self.__name__, described, options))
        # Triton's compiler makes a constant of a 1
        own |= {name: tl.constexpr(1) for name, x in described.items() if x == 1 and not name.isupper()}
        _run(self, grid=grid, warmup=warmup, **own, **named)

    return run


def _described(argument: Any, is_special: bool) -> Any:
    """Return an argument as Triton's compiler is told of it."""
    if isinstance(argument, torch.Tensor):
        return POINTERS[str(argument.dtype).removeprefix("torch.")]
    if isinstance(argument, int):
        if is_special and argument == 1:
            return 1
        width = "i32" if -(2**31) <= argument < 2**31 else "i64"
        return f"{width}:16" if is_special and argument % 16 == 0 else width
    return "fp32" if isinstance(argument, float) else argument


_languages_of: set[int] = set()


def _called(self: Any, *arguments: Any, **options: Any) -> Any:
    """Call a function from a kernel; Triton itself would replace its language anew, which takes most of the time."""
    if id(self.fn.__globals__) not in _languages_of:
        interpreter._patch_lang(self.fn)
        _languages_of.add(id(self.fn.__globals__))
    return self.rewrite()(*arguments, **options)


def _checked_reduction(self: Any, inputs: tuple[Any, ...]) -> None:
    for x in inputs:
        _refuse_halves(x.handle)
        self.check_axis(x.shape, self.axis)


def _refuse_halves(*handles: TensorHandle) -> None:
    for handle in handles:
        if handle.dtype.scalar in _HALVES:
            raise TypeError(f"arithmetic on {handle.dtype.scalar}: kernels compute in float32 outside of products")


class _Results:
    def __init__(self, handle: TensorHandle) -> None:
        self._handle = handle

    def get_result(self, index: int) -> TensorHandle:
        assert index == 0
        return self._handle


class _Builder(InterpreterBuilder):
    """Of the operations of kernels, in numpy."""

    memory: LaunchMemory
    units: dict[str, Callable[[np.ndarray], np.ndarray]]

    def set_grid_dim(self, nx: int, ny: int, nz: int) -> None:
        super().set_grid_dim(nx, ny, nz)
        self._order = np.random.default_rng(nx * ny * nz).permutation(nx * ny * nz)
        self.memory.begin()
        _languages_of.clear()

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        _, ny, nz = self.grid_dim
        number = int(self._order[(x * ny + y) * nz + z])
        super().set_grid_idx(number // (ny * nz), number // nz % ny, number % nz)
        self.memory.begin_program(number + 1)

    def get_bf16(self, value: float) -> TensorHandle:
        return TensorHandle(to_bfloat16(np.array([value], dtype=np.float32)), tl.bfloat16)

    create_addptr = lambda self, ptr, offset: _of_tensor(ptr, InterpreterBuilder.create_addptr(self, ptr, offset))  # noqa: E731
    create_splat = lambda self, ret_ty, arg: _of_tensor(arg, InterpreterBuilder.create_splat(self, ret_ty, arg))  # noqa: E731
    create_broadcast = lambda self, arg, shape: _of_tensor(arg, InterpreterBuilder.create_broadcast(self, arg, shape))  # noqa: E731
    create_expand_dims = lambda self, arg, axis: _of_tensor(arg, InterpreterBuilder.create_expand_dims(self, arg, axis))  # noqa: E731

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        self.memory.load(ptrs.attr[_TENSOR], ptrs.data, mask.data, _num_bytes(ptrs))
        return super().create_masked_load(ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        self.memory.store(ptrs.attr[_TENSOR], ptrs.data, mask.data, _num_bytes(ptrs))
        return super().create_masked_store(ptrs, value, mask, cache_modifier, eviction_policy)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        _refuse_halves(val)
        self.memory.change(ptr.attr[_TENSOR], ptr.data, mask.data, _num_bytes(ptr))
        if sem in (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE):
            self.memory.acquire()
        return super().create_atomic_rmw(rmwOp, ptr, val, mask, sem, scope)

    def cast_impl(self, src, dst_type):
        pair = src.dtype.scalar, dst_type.scalar
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(from_bfloat16(src.data), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bfloat16(src.data), tl.bfloat16)
        if tl.bfloat16 in pair:
            raise NotImplementedError(f"a cast of {pair[0]} to {pair[1]}")
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if rounding_mode not in (None, ir.ROUNDING_MODE.RTNE):
            raise NotImplementedError(f"a cast that rounds by {rounding_mode}")
        return self.cast_impl(src, dst_type)

    def binary_op(self, lhs, rhs, op):
        _refuse_halves(lhs, rhs)
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg, op):
        _refuse_halves(arg)
        return super().unary_op(arg, op)

    create_add = lambda self, lhs, rhs: self._integers(lhs, rhs, np.add)  # noqa: E731
    create_sub = lambda self, lhs, rhs: self._integers(lhs, rhs, np.subtract)  # noqa: E731
    create_mul = lambda self, lhs, rhs: self._integers(lhs, rhs, np.multiply)  # noqa: E731

    def _integers(self, lhs, rhs, op):
        if lhs.data.dtype.itemsize == 8:
            return self.binary_op(lhs, rhs, op)
        exact = op(lhs.data.astype(np.int64), rhs.data.astype(np.int64))
        result = exact.astype(lhs.data.dtype)
        if (result != exact).any():
            raise OverflowError(f"{op.__name__} of {lhs.dtype.scalar} numbers leaves their range")
        return TensorHandle(result, lhs.dtype.scalar)

    # a maximum with a number that is none is the other one
    create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)  # noqa: E731
    create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)  # noqa: E731

    def create_clampf(self, arg, lo, hi, propagate_nans):
        _refuse_halves(arg, lo, hi)
        return super().create_clampf(arg, lo, hi, propagate_nans)

    def create_fma(self, x, y, z):
        _refuse_halves(x, y, z)
        return super().create_fma(x, y, z)

    def create_fabs(self, arg):
        _refuse_halves(arg)
        return super().create_fabs(arg)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right = (_factor(x, input_precision) for x in (a, b))
        return TensorHandle(np.matmul(left, right) + d.data, d.dtype.scalar)

    def create_inline_asm(self, inlineAsm, constraints, values, type, isPure, pack):
        name, _, operands = inlineAsm.partition(" ")
        if name not in self.units or (operands, constraints, pack) != ("$0, $1;", "=f,f", 1):
            raise NotImplementedError(f"inline assembly {inlineAsm!r} ({constraints}, {pack} at once)")
        (argument,) = values
        assert argument.dtype.scalar == type[0].scalar == tl.float32
        with np.errstate(all="ignore"):
            return _Results(TensorHandle(self.units[name](argument.data), tl.float32))


def _of_tensor(source: TensorHandle, result: TensorHandle) -> TensorHandle:
    """Let a pointer that is made of another belong to the same tensor."""
    if _TENSOR in source.attr:
        result.set_attr(_TENSOR, source.attr[_TENSOR])
    return result


def _num_bytes(pointers: TensorHandle) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _factor(x: TensorHandle, input_precision: Any) -> np.ndarray:
    """Return a product's factor as tensor cores read it."""
    kind = x.dtype.scalar
    if kind == tl.bfloat16:
        return from_bfloat16(x.data)
    if kind == tl.float32 and input_precision != ir.INPUT_PRECISION.IEEE:
        return to_tf32(x.data)
    assert kind in (tl.float16, tl.float32), f"a product of {kind}"
    return x.data.astype(np.float32)
