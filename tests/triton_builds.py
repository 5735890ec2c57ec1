"""Compile Triton kernels for GPUs that are not present, and read the resources that the compiled code needs.

The arguments are those of a launch, tensors on any device (`meta` is enough): they are specialised as Triton would
specialise them at run time, so that what is compiled here is what a user's GPU would run.

What a compiled kernel takes is kept in `.pytest_cache`, by its source, arguments, options and Triton's version, so that
a second run compiles only what changed. What does not compile is not kept.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

CAPABILITIES = [90, *(pytest.param(chip, marks=pytest.mark.exhaustive) for chip in (80, 100))]
KEPT = Path(__file__).parent.parent / ".pytest_cache" / "triton_builds"
# Shared memory one block may use, in bytes: compute capability 8.0, 9.0 and 10.0 (CUDA programming guide).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Build:
    """The resources of one block, or of one thread, of a compiled kernel."""

    shared: int  # bytes per block
    registers: int  # per thread
    local: int  # bytes of local memory per thread: what did not fit into registers, and indexed arrays
    atomics: bool
    counted: int | None = None  # instructions of the longest loop, or of all code without one, if they were asked for


def require_compiler(capability: int) -> None:
    """Skip the calling test, with a reason, if kernels cannot be compiled for this GPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    for tool in ("ptxas-blackwell" if capability >= 100 else "ptxas", "cuobjdump"):
        if _tool(tool) is None:
            pytest.skip(f"{tool}, which compiling for sm_{capability} takes, is neither in Triton nor on the path")


def assert_builds(capability: int, launches: Iterable[Any], most: Mapping[str, int] | None = None) -> None:
    """Every kernel compiles without spilling, within the chip's shared memory, and adds without atomics.

    `most`: for some kernels, the most instructions of the longest loop, or of all code if there is no loop.
    """
    require_compiler(capability)
    most = most or {}
    for launch in launches:
        constants = {name: value for name, value in launch.arguments.items() if name.isupper()}
        types = [str(value.dtype) for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
        counted = launch.kernel.__name__ in most
        built = build(launch.kernel, launch.arguments, capability, counted, **launch.options)
        name = f"{launch.kernel.__name__} {constants} {types[0]} {launch.options} on sm_{capability}: {built}"
        assert built.local == 0, name
        assert built.shared <= SHARED_LIMIT[capability], name
        assert not built.atomics, name
        assert not counted or 0 < (built.counted or 0) <= most[launch.kernel.__name__], name


def build(kernel: Any, arguments: dict[str, Any], capability: int, counted: bool = False, **options: Any) -> Build:
    """Compile `kernel` (a `triton.jit` function) for `capability` (80, 90, 100); `options` as in a launch.

    `counted`: also count its instructions, which takes about a second.

    Raises RuntimeError if the compiled code does not list its resources.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialise and isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _type(value)
        if isinstance(value, torch.Tensor) or (specialise and isinstance(value, int) and value % 16 == 0):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    this = (
        *Build.__annotations__,  # other fields, other files
        triton.__version__,
        kernel.cache_key,
        capability,
        signature,
        constants,
        attributes,
        sorted(options.items()),
        counted,
    )
    kept = KEPT / (hashlib.sha256(repr(this).encode()).hexdigest() + ".json")
    if kept.exists():
        return Build(**json.loads(kept.read_text()))
    # Triton's own cache stays out of it: a warm one would hide an error of the compiler.
    with tempfile.TemporaryDirectory() as folder, _uncached(folder):
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        registers, local = _resources(compiled.asm["cubin"])
        # PTX: `atom` returns the old value, `red` does not. Either makes the order of a sum depend on the moment.
        atomics = re.search(r"\b(atom|red)\.(\w+\.)*global", compiled.asm["ptx"]) is not None
        number = _instructions(compiled.asm["cubin"]) if counted else None
        built = Build(compiled.metadata.shared, registers, local, atomics, number)
    KEPT.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(asdict(built)))
    part.replace(kept)  # several processes may write it
    return built


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    assert isinstance(value, float), f"no Triton type for {value!r}"
    return "fp32"


def _uncached(folder: str):
    from triton import knobs

    scope = knobs.cache.scope()

    class Scope:
        def __enter__(self):
            scope.__enter__()
            knobs.cache.dir = folder

        def __exit__(self, *error):
            return scope.__exit__(*error)

    return Scope()


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = _dump("-res-usage", file.name)
        numbers = {name: re.search(rf"\b{name}:(\d+)", report) for name in ("REG", "STACK", "LOCAL")}
        if None in numbers.values():
            raise RuntimeError(f"cuobjdump reports no resources:\n{report}")
        registers, stack, local = (int(match[1]) for match in numbers.values() if match)
        if stack + local == 0:  # the usual case; disassembling takes long
            return registers, 0
        code = _dump("-sass", file.name)
        if "EXIT" not in code:
            raise RuntimeError(f"cuobjdump reports no code:\n{report}")
        # ptxas sometimes reserves a frame that no instruction then loads from or stores to.
        return registers, stack + local if "LDL" in code or "STL" in code else 0


def _instructions(cubin: bytes) -> int:
    """How many instructions the longest loop has, or the whole code if it has no loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = re.findall(r"/\*([0-9a-f]{4,})\*/ +(\S.*?) *;", _dump("-sass", file.name))
    code = [(int(place, 16), text) for place, text in code if not text.startswith("NOP")]  # pads the end
    found = []
    for place, text in code:
        jump = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < place:
            found.append(sum(int(jump[1], 16) <= one <= place for one, _ in code))
    return max(found, default=len(code))


def _dump(option: str, file: str) -> str:
    return subprocess.run([_tool("cuobjdump"), option, file], capture_output=True, text=True, check=True).stdout


@functools.cache
def _tool(name: str) -> str | None:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else shutil.which(name)
