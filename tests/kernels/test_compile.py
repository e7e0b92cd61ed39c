"""Every specialisation, compiled ahead of time without a GPU: its PTX and what ptxas says are what its record says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from compile_child import all_specialisations, main_loop_operations
from gpudcp_kernels.specialisation import Specialisation

_KERNELS = Path(__file__).parents[2] / "kernels"
_CHILD = Path(__file__).with_name("compile_child.py")
_STEPS = 32  # words of a lane in one pass of the CRC's loop
ARCHITECTURES = (80, 90, 100)
SPECIALISATIONS: dict[str, Specialisation] = {each.name: each for each in all_specialisations()}

Facts = dict[str, Any]
Compiler = Callable[[Iterable[tuple[str, int]]], list[Facts]]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    """Compiles (specialisation, architecture) pairs in child processes, one for every core this process may use."""
    cache = tmp_path_factory.mktemp("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(_KERNELS), os.environ.get("PYTHONPATH"))))
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path}

    def compile_pairs(pairs: Iterable[tuple[str, int]]) -> list[Facts]:
        shares = [list(pairs)[start :: _cores()] for start in range(_cores())]
        children = [
            subprocess.Popen(
                [sys.executable, str(_CHILD), json.dumps(share)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for share in shares
        ]
        lines = []
        for child in children:
            output, errors = child.communicate(timeout=600)
            assert child.returncode == 0, errors
            lines += output.splitlines()
        return [json.loads(line) for line in lines]

    return compile_pairs


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def problems_of(specialisation: Specialisation, facts: Facts) -> list[str]:
    """What the machine code of one architecture has against its record."""
    where = f"{specialisation.name} for sm_{facts['architecture']}"
    problems = []
    if facts["registers"] > specialisation.max_registers:
        problems.append(f"{where}: {facts['registers']} registers, at most {specialisation.max_registers}")
    if facts["spilled_nbytes"]:
        problems.append(f"{where}: {facts['spilled_nbytes']} bytes spilled")
    problems += [f"{where}: compiled again for other values of {name}" for name in facts["specialised"]]
    for kind, expected in (("loads", specialisation.loads), ("stores", specialisation.stores)):
        if expected is not None and expected not in facts[kind]:
            problems.append(f"{where}: no {kind} of {expected}, only {facts[kind]}")
        # Numbers of the tables are loaded as b64.
        wider = [width for width in facts[kind] if width != "b64" and _bits(width) > _bits(expected or "b0")]
        if wider:
            problems.append(f"{where}: {kind} of {wider}, wider than {expected}")
    if specialisation.operations_per_word is not None:
        operations = facts["main_loop_operations"] / _STEPS
        if operations > specialisation.operations_per_word:
            problems.append(f"{where}: {operations} operations a word, at most {specialisation.operations_per_word}")
    return problems


def _bits(width: str) -> int:
    found = re.fullmatch(r"(?:v(\d)\.)?b(\d+)", width)
    assert found is not None
    return int(found[1] or 1) * int(found[2])


def _all_problems(all_facts: Iterable[Facts]) -> list[str]:
    return [problem for facts in all_facts for problem in problems_of(SPECIALISATIONS[facts["name"]], facts)]


def _is_sample(name: str) -> bool:
    """The CRC, and one cast and one move of every other kernel."""
    return name.startswith("crc32") or any(cast in name for cast in ("fp32->bf16", "b32->b32"))


def test_a_sample_of_the_specialisations_compiles_for_sm_90_to_what_its_records_say(compiled: Compiler) -> None:
    """Widths of loads and stores on the main path, registers, no spills, operations a word."""
    sample = [(name, 90) for name in SPECIALISATIONS if _is_sample(name)]
    all_facts = compiled(sample)
    assert len(all_facts) == len(sample)
    assert _all_problems(all_facts) == []


@pytest.mark.slow
def test_every_specialisation_compiles_for_every_architecture_to_what_its_record_says(compiled: Compiler) -> None:
    """sm_80, sm_90 and sm_100."""
    pairs = [(name, architecture) for name in SPECIALISATIONS for architecture in ARCHITECTURES]
    all_facts = compiled(pairs)
    assert len(all_facts) == len(pairs)
    assert _all_problems(all_facts) == []


def test_what_a_record_does_not_allow_is_found() -> None:
    """Each kind of problem by itself, and none where there is none."""
    record = Specialisation(
        name="some",
        kernel=None,
        signature={"table_ptr": "*i64"},
        constexprs={},
        num_warps=4,
        loads="b32",
        stores="b8",
        max_registers=40,
        operations_per_word=2,
    )
    right: Facts = {
        "name": "some",
        "architecture": 90,
        "registers": 40,
        "spilled_nbytes": 0,
        "specialised": [],
        "loads": {"b32": 4, "b64": 2},
        "stores": {"b8": 1},
        "main_loop_operations": 64,
    }
    assert problems_of(record, right) == []
    wrong: dict[str, Facts] = {
        "41 registers, at most 40": {"registers": 41},
        "8 bytes spilled": {"spilled_nbytes": 8},
        "compiled again for other values of count": {"specialised": ["count"]},
        "no loads of b32": {"loads": {"b8": 4}},
        "wider than b8": {"stores": {"b8": 1, "v4.b32": 1}},
        "3.0 operations a word, at most 2": {"main_loop_operations": 96},
    }
    for text, facts in wrong.items():
        (problem,) = problems_of(record, right | facts)
        assert text in problem


def test_names_of_specialisations_are_their_own() -> None:
    """Two of one name would hide each other from these checks."""
    assert len(SPECIALISATIONS) == len(all_specialisations())


def test_operations_of_a_loop_are_those_of_its_shortest_way() -> None:
    """The longest loop counts; a branch of it that has more operations does not, nor do loads and branches."""
    disassembly = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   ISETP.GE.AND P0, PT, R3, R4, PT ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*0040*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0050*/               @P1 LDG.E R5, desc[UR4][R2.64] ;
        /*0060*/                   SEL R5, R5, RZ, P1 ;
        /*0070*/                   LOP3.LUT R5, R5, R6, RZ, 0x3c, !PT ;
.L_x_2:
        /*0080*/                   LOP3.LUT R7, R7, R5, RZ, 0x3c, !PT ;
        /*0090*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*00a0*/               @P0 BRA `(.L_x_0) ;
.L_x_3:
        /*00b0*/                   IADD3 R1, R1, 0x1, RZ ;
        /*00c0*/                   BRA `(.L_x_3);
"""
    assert main_loop_operations(disassembly) == 2
