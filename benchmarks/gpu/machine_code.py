"""Compiles the kernels for GPUs that need not be there, and counts in the machine code what a kernel costs.

Registers, spills, shared memory, and the instructions of each loop over tiles. What a multiprocessor can issue of those
is a limit that no run passes, and it is known without one.
"""

import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from swat_lm.ops.triton.configurations import FUSED, Problem, Tile, is_one_loop
from swat_lm.ops.triton.precision import is_folded

KERNELS = ("forward", "backward query", "backward key", "backward key, five products")
# types of arguments in Triton's words
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32", "int64": "*i64"}
# what a call may ask for beside plain sigmoid attention with fast weights, and what each kernel is told of it
EXTRAS = ("exact", "ragged", "rotary", "skip", "softmax", "per_head")
_TYPE = re.compile(r"\*?(bf16|fp16|fp32|i32|i64|i1|u1)(:16)?")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(.*?);", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one kernel costs on one GPU."""

    instructions: Counter
    # of each loop that forms products, in the order of the code; instructions of one warp and one round
    loops: tuple[Counter, ...]
    registers: int
    shared_bytes: int
    ptx: str = ""

    @property
    def spills(self) -> int:
        """Stores of registers to memory; every one is read back."""
        return self.instructions["STL"]

    @property
    def tensor_core_products(self) -> int:
        """Products on tensor cores, of Hopper's kind or the older one."""
        return products_of(self.instructions)


def products_of(instructions: Counter) -> int:
    """Count instructions of the tensor cores."""
    return instructions["HGMMA"] + instructions["HMMA"]


def compile_kernel(
    kernel: Any,
    arguments: dict[str, Any],
    capability: int,
    num_warps: int,
    num_stages: int,
    most_registers: int | None = None,
) -> Compiled:
    """Compile for compute capability 80, 90, ...

    Args:
        kernel: a function under `triton.jit`.
        arguments: by name: a type in Triton's words ("*bf16", "i32", "fp32") is a runtime argument, one with ":16" is
            known to be a multiple of 16; anything else is a constant of the compiler, None included.
        capability: of the GPU, without the dot.
        num_warps, num_stages, most_registers: as in a launch, where the last is `maxnreg`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert set(arguments) == set(kernel.arg_names), set(arguments) ^ set(kernel.arg_names)
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        argument = arguments[name]
        if isinstance(argument, str) and _TYPE.fullmatch(argument):
            signature[name] = argument.removesuffix(":16")
            # tensors of PyTorch begin at multiples of 16 bytes
            if argument.endswith(":16") or argument.startswith("*"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(index,)] = argument
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": most_registers, **FUSED}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        code = _run("cuobjdump", "-sass", "-res-usage", binary)
    registers = re.search(r"REG:(\d+)", code)
    assert registers, code
    found = [(int(address, 16), opcode, rest) for address, opcode, rest in _INSTRUCTION.findall(code)]
    return Compiled(
        Counter(opcode for _, opcode, _ in found), _loops(found), int(registers[1]), compiled.metadata.shared,
        compiled.asm["ptx"],
    )  # fmt: skip


def compile_attention(name: str, problem: Problem, tile: Tile, extras: frozenset[str] = frozenset()) -> Compiled:
    """Compile one of KERNELS for a problem, a tile and some of EXTRAS."""
    from swat_lm.ops.triton import backward_kernels, forward

    kernels = {"forward": forward._forward, "backward query": backward_kernels.backward_query}
    kernel = kernels.get(name, backward_kernels.backward_key)
    arguments = _arguments(kernel, name, problem, tile, extras)
    major, minor = problem.capability
    return compile_kernel(kernel, arguments, 10 * major + minor, tile.warps, tile.stages, tile.registers)


def _arguments(kernel: Any, name: str, problem: Problem, tile: Tile, extras: frozenset[str]) -> dict[str, Any]:
    assert extras <= set(EXTRAS), extras
    pointer = POINTERS[str(problem.dtype).removeprefix("torch.")]
    softmax, ragged = "softmax" in extras, "ragged" in extras
    fast = problem.dtype != torch.float32 and not softmax and "exact" not in extras
    one_loop = is_one_loop(name, problem, tile)
    # a padded head is rotated back by a kernel of its own
    rotary = "rotary" in extras and (name == "forward" or problem.head_dim == problem.block_dim)
    values: dict[str, Any] = {
        "lse_ptr": "*fp32" if softmax or name == "forward" else None, "shift_ptr": "*fp32" if softmax else None,
        "slopes_ptr": "*fp32", "bias_ptr": "*fp32", "per_head_ptr": "*fp32", "rotated_ptr": pointer,
        "cos_ptr": "*fp32" if rotary else None, "sin_ptr": "*fp32" if rotary else None,
        "query_norms_ptr": "*fp32", "key_norms_ptr": "*fp32",
        "scale": "fp32", **dict.fromkeys(("offset", "window", "num_queries", "num_keys"), "i32"),
        "GROUP": problem.group, "HEAD_DIM": problem.head_dim, "BLOCK_DIM": problem.block_dim,
        "BLOCK_ROWS": tile.rows, "BLOCK_KEYS": tile.keys, "SOFTMAX": softmax, "FAST": fast,
        "FOLDED": is_folded(problem.head_dim**-0.5, fast, one_loop), "RAGGED": ragged, "ROTARY": rotary,
        "SKIP": "skip" in extras, "REGULAR_LAST": True, "HARDWARE": True,
        "ONE_LOOP": one_loop,
        "INPUT_PRECISION": "ieee" if problem.dtype == torch.float32 else "tf32",
        "PER_HEAD": "per_head" in extras, "QUERY": "five" in name,
        **dict.fromkeys(("lower_ptr", "last_ptr", "table_ptr"), "*i32" if ragged else None),
    }  # fmt: skip
    if "five" in name:
        values["grad_query_ptr"] = "*fp32"
    strides = {argument: "i32:16" for argument in kernel.arg_names if argument.startswith("stride_")}
    return {argument: {**values, **strides}.get(argument, pointer) for argument in kernel.arg_names}


def _loops(found: list[tuple[int, str, str]]) -> tuple[Counter, ...]:
    """The innermost loops that form products: what a branch goes back over."""
    place = {address: index for index, (address, _, _) in enumerate(found)}
    loops: list[tuple[int, int]] = []
    for index, (address, opcode, rest) in enumerate(found):
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode == "BRA" else None
        if target and int(target[1], 16) < address:
            begin = place[int(target[1], 16)]
            if products_of(Counter(opcode for _, opcode, _ in found[begin : index + 1])) and not any(
                begin <= other for other, _ in loops
            ):
                loops.append((begin, index))
    return tuple(Counter(opcode for _, opcode, _ in found[begin : end + 1]) for begin, end in loops)


def _run(tool: str, *arguments: Any) -> str:
    import triton.backends.nvidia

    program = Path(triton.backends.nvidia.__file__).parent / "bin" / tool
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True).stdout
