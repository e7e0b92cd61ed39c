"""Compile specialisations ahead of time and print, as JSON, what their machine code looks like.

    python compile_child.py '[["pack[fp32->bf16,aligned]", 90], ["crc32[small]", 80], ...]'

A process of its own, because in the tests' process Triton interprets. Needs no GPU.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import gpudcp_kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_ACCESS = re.compile(r"\b(ld|st)\.(?:\w+\.)*?global(?:\.\w+(?:::\w+)*)*?((?:\.v\d)?\.[bufs]\d+)\s")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
# A loop's moves, addresses and comparisons count; loads, branches and what runs on the uniform path do not.
_NOT_ARITHMETIC = ("LDG", "BRA", "NOP", "WARPSYNC", "BSSY", "BSYNC", "U")


def compile_one(specialisation: Any, architecture: int) -> dict[str, Any]:
    """The facts of one specialisation on one architecture."""
    names = specialisation.kernel.arg_names
    signature = {name: specialisation.signature.get(name, "constexpr") for name in names}
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in specialisation.divisible_by_16}
    source = ASTSource(specialisation.kernel, signature, dict(specialisation.constexprs), hints)
    target = GPUTarget("cuda", architecture, 32)
    binary = triton.compile(source, target=target, options={"num_warps": specialisation.num_warps})
    accesses = [(kind, width.lstrip(".")) for kind, width in _ACCESS.findall(binary.asm["ptx"])]
    return {
        "name": specialisation.name,
        "architecture": architecture,
        "loads": dict(Counter(_as_bits(width) for kind, width in accesses if kind == "ld")),
        "stores": dict(Counter(_as_bits(width) for kind, width in accesses if kind == "st")),
        **_ptxas_facts(binary.asm["ptx"], architecture),
        "main_loop_operations": _main_loop(binary.asm["cubin"]) if specialisation.operations_per_word else None,
    }


def _as_bits(width: str) -> str:
    return re.sub(r"[ufs](\d+)$", r"b\1", width)


def _ptxas_facts(ptx: str, architecture: int) -> dict[str, int]:
    """Registers and spilled bytes, as ptxas -v reports them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
        assert target is not None
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={target[1]}", str(path), "-o", f"{path}.cubin"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert registers is not None
    assert spills is not None
    return {"registers": int(registers[1]), "spilled_nbytes": int(spills[1]) + int(spills[2])}


def _main_loop(cubin: bytes) -> int:
    """Arithmetic operations of one pass through the largest loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([_TOOLS / "nvdisasm", "-c", file.name], check=True, capture_output=True, text=True).stdout
    return main_loop_operations(text)


def main_loop_operations(disassembly: str) -> int:
    """Likewise, of a disassembly; where the loop has branches, of the shortest way: the one without masks."""
    names: list[str] = []
    targets: dict[int, tuple[str, bool]] = {}
    labels: dict[str, int] = {}
    for line in disassembly.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(names)
        instruction = _INSTRUCTION.search(line)
        if instruction:
            branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if branch:
                targets[len(names)] = branch[1], instruction[1] is None
            names.append(instruction[2])
    loops = [range(labels[label], at) for at, (label, _) in targets.items() if labels[label] < at]
    loop = max(loops, key=len)
    shortest = {loop.stop: 0}
    for at in reversed(loop):
        ways = [shortest[at + 1]]
        if at in targets and labels[targets[at][0]] in range(at + 1, loop.stop + 1):
            label, is_certain = targets[at]
            ways = [shortest[labels[label]], *([] if is_certain else ways)]
        shortest[at] = min(ways) + (not names[at].startswith(_NOT_ARITHMETIC))
    return shortest[loop.start]


def all_specialisations() -> list[Any]:
    """Of every module of the package that lists some."""
    names = [f"gpudcp_kernels.{found.name}" for found in iter_modules(gpudcp_kernels.__path__)]
    return [each for name in names for each in getattr(importlib.import_module(name), "SPECIALISATIONS", [])]


def main() -> None:
    specialisations = {each.name: each for each in all_specialisations()}
    for name, architecture in json.loads(sys.argv[1]):
        print(json.dumps(compile_one(specialisations[name], architecture)), flush=True)


if __name__ == "__main__":
    main()
