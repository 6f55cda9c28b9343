"""Compiles kernels for GPUs that are not there, and counts what matters in the machine code: spills and products."""

import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

# types of arguments in Triton's words
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32", "int64": "*i64"}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one kernel costs on one GPU."""

    instructions: Counter
    registers: int
    shared_bytes: int
    ptx: str

    @property
    def spills(self) -> int:
        """Stores of registers to memory; every one is read back."""
        return self.instructions["STL"]

    @property
    def tensor_core_products(self) -> int:
        """Products on tensor cores, of Hopper's kind or the older one."""
        return self.instructions["HGMMA"] + self.instructions["HMMA"]


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
        if isinstance(argument, str) and re.fullmatch(r"\*?(bf16|fp16|fp32|i32|i64|i1|u1)(:16)?", argument):
            signature[name] = argument.removesuffix(":16")
            # tensors of PyTorch begin at multiples of 16 bytes
            if argument.endswith(":16") or argument.startswith("*"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(index,)] = argument
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": most_registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        code = _run("cuobjdump", "-sass", binary)
        usage = _run("cuobjdump", "-res-usage", binary)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    opcode = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
    return Compiled(Counter(opcode.findall(code)), int(registers[1]), compiled.metadata.shared, compiled.asm["ptx"])


def _run(tool: str, *arguments: Any) -> str:
    import triton.backends.nvidia

    program = Path(triton.backends.nvidia.__file__).parent / "bin" / tool
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True).stdout
