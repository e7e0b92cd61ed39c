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
        "specialised": [p.name for p in specialisation.kernel.params if _is_specialised(p, signature[p.name])],
        **_machine_code_facts(binary.asm["cubin"], has_main_loop=specialisation.operations_per_word is not None),
    }


def _is_specialised(parameter: Any, kind: str) -> bool:
    """Whether Triton compiles again for other values of an integer argument."""
    return re.fullmatch(r"[iu]\d+", kind) is not None and not parameter.do_not_specialize


def _as_bits(width: str) -> str:
    return re.sub(r"[ufs](\d+)$", r"b\1", width)


def _machine_code_facts(cubin: bytes, *, has_main_loop: bool) -> dict[str, int | None]:
    """Of what ptxas has made: registers, bytes of stack, where it would spill to; operations of the main loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output_of("cuobjdump", "-res-usage", file.name)
        loop = main_loop_operations(_output_of("nvdisasm", "-c", file.name)) if has_main_loop else None
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "spilled_nbytes": stack + local, "main_loop_operations": loop}


def _output_of(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def main_loop_operations(disassembly: str) -> int:
    """Arithmetic operations of one pass through the largest loop of a disassembly; where that has branches, of the
    shortest way: the one without masks."""
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
