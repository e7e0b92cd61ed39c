"""The machine that runs kernels' PTX on the host: what it computes, and what it refuses."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from ptx_fences import fenced_copy
from ptx_instructions import PtxError
from ptx_machine import launch
from ptx_program import parse

_KERNEL = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
.reqntid 64
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<19>;
	.reg .b64 	%rd<9>;
$L__func_begin0:
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r1, [kernel_param_1];
	mov.u32 	%r2, %ctaid.x;
	mov.u32 	%r3, %tid.x;
	mad.lo.s32 	%r4, %r2, 64, %r3;
	mad.wide.u32 	%rd2, %r4, 4, %rd1;
	ld.global.b32 {{ %r5 }}, [ %rd2 + 0 ];
{body}
	st.global.b32 [ %rd2 + 0 ], {{ %r5 }};
	ret;
$L__func_end0:
}}
"""


def run(body: str, values: torch.Tensor, argument: int = 0, shared_nbytes: int = 0) -> torch.Tensor:
    """A thread for each number, which is %r5: read before, written after. %rd2 is its address, %r1 the argument."""
    memory = fenced_copy(values.to(torch.int32))
    program = parse(_KERNEL.format(body=body))
    launch(program, [memory.data_ptr(), argument], nblocks=len(values) // 64, shared_nbytes=shared_nbytes)
    return memory


def numbers(nblocks: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(nblocks).integers(-(2**31), 2**31, 64 * nblocks)).to(torch.int32)


def test_threads_that_go_different_ways_meet_again() -> None:
    """A loop as long as each thread's number says, of more blocks than run at once; then an instruction for all."""
    body = """
    mov.b32 %r6, 0;
$L_again:
    setp.eq.b32 %p1, %r5, 0;
    @%p1 bra $L_out;
    add.s32 %r6, %r6, %r5;
    sub.s32 %r5, %r5, 1;
    bra.uni $L_again;
$L_out:
    bar.sync 0;
    add.s32 %r5, %r6, %r1;
"""
    values = torch.arange(64 * 150) % 23
    assert torch.equal(run(body, values, 1000), (values * (values + 1) // 2 + 1000).to(torch.int32))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("shr.s32 %r5, %r5, 3;", lambda x: x >> 3),
        ("shr.u32 %r5, %r5, 3;", lambda x: (x & 0xFFFFFFFF) >> 3),
        ("shr.u32 %r5, %r5, 32;", lambda x: 0 * x),
        ("shr.s32 %r5, %r5, 40;", lambda x: x >> 31),
        ("shl.b32 %r5, %r5, 5;", lambda x: x << 5),
        ("shl.b32 %r5, %r5, 32;", lambda x: 0 * x),
        ("bfe.u32 %r5, %r5, 4, 8;", lambda x: x >> 4 & 255),
        ("bfe.s32 %r5, %r5, 4, 8;", lambda x: (x >> 4 & 255) - 2 * (x >> 4 & 128)),
        ("prmt.b32 %r5, %r5, 0x55, 0xb104;", lambda x: 0x55 | (x & 255) << 8 | (x >> 8 & 255) << 16 | (x >> 31) << 24),
        ("lop3.b32 %r5, %r5, 0x0f0f0f0f, %r4, 0x96;", lambda x: x ^ 0x0F0F0F0F ^ torch.arange(64)),
        ("div.s32 %r5, %r5, -7;", lambda x: torch.div(x, -7, rounding_mode="trunc")),
        ("mul.wide.s32 %rd3, %r5, 7; shr.s64 %rd3, %rd3, 32; cvt.u32.u64 %r5, %rd3;", lambda x: x * 7 >> 32),
        ("min.u32 %r5, %r5, 9;", lambda x: torch.where(x < 0, 9, x.clamp(max=9))),
        ("cvt.u16.u32 %rs1, %r5; cvt.s32.s16 %r5, %rs1;", lambda x: (x << 48) >> 48),
        ("mov.b32 {%rs1, %rs2}, %r5; mov.b32 %r5, {%rs2, %rs1};", lambda x: x << 16 | (x >> 16 & 0xFFFF)),
        ("setp.lt.s32 %p1, %r5, 0; @!%p1 mov.b32 %r5, 5;", lambda x: torch.where(x < 0, x, 5)),
        ("setp.gt.u32 %p1, %r5, 9; selp.b32 %r5, 1, 2, %p1;", lambda x: torch.where((x < 0) | (x > 9), 1, 2)),
        ("shfl.sync.bfly.b32 %r5, %r5, 4, 31, -1;", lambda x: x[torch.arange(64) ^ 4]),
        ("cvt.rn.f32.u32 %r5, %r4; mul.f32 %r5, %r5, 0f3F000000;", lambda _: (torch.arange(64) / 2).view(torch.int32)),
        ("mul.f32 %r5, %r5, 0f7FC00001;", lambda x: 0 * x + 0x7FFFFFFF),
        ("and.b32 %r5, %r5, 0x807fffff; mul.f32 %r5, %r5, 0f40000000;", lambda x: (x & 2**23 - 1) << 1 | x >> 31 << 31),
    ],
)
def test_what_instructions_compute(body: str, expected: object) -> None:
    """Signs, widths, shifts by more than there are bits; denormals are not flushed, and there is one NaN."""
    values = numbers()
    assert callable(expected)
    wanted = expected(values.long())
    assert torch.equal(run(body.replace("; ", ";\n"), values), wanted.to(torch.int32))


def test_shared_memory_and_atomics_are_those_of_a_block_and_of_all() -> None:
    """Each block turns its numbers round; the first number becomes the XOR of all threads' own."""
    body = """
    shl.b32 %r6, %r3, 2;
    st.shared.b32 [ %r6 + 0 ], { %r5 };
    bar.sync 0;
    xor.b32 %r6, %r6, 252;
    ld.shared.b32 { %r5 }, [ %r6 + 0 ];
"""
    values = numbers(3)
    assert torch.equal(run(body, values, shared_nbytes=256), values.view(3, 64).flip(1).reshape(-1))
    added = run("setp.ne.b32 %p1, %r4, 0;\n@%p1 atom.global.gpu.relaxed.xor.b32 %r7, [ %rd1 + 0 ], %r5;\nret;", values)
    assert int(added[0]) == np.bitwise_xor.reduce(values.numpy())


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("ld.global.b64 { %rd3 }, [ %rd2 + 0 ];", "no multiples of 8"),
        ("ld.global.b32 { %r6 }, [ %rd2 + 4 ];", "0 after the beginning of a fence"),
        ("ld.global.b8 { %r6 }, [ %rd1 + -1 ];", "after the beginning of a fence"),
        ("st.global.v4.b32 [ %rd1 + 256 ], { %r5, %r5, %r5, %r5 };", "after the beginning of a fence"),
        ("ld.shared.b32 { %r6 }, [ %r3 + 64 ];", "outside the 64 bytes of shared memory"),
        ("setp.lt.s32 %p1, %r3, 7;\n@%p1 bra $L_out;\nbar.sync 0;\n$L_out:", "threads of a block are missing"),
        ("setp.lt.s32 %p1, %r3, 7;\n@%p1 shfl.sync.bfly.b32 %r5, %r5, 4, 31, -1;", "lanes of a warp are missing"),
        ("mul.ftz.f32 %r5, %r5, %r5;", "unknown here: ftz"),
        ("cvt.rna.tf32.f32 %r5, %r5;", "unknown here"),
        ("fma.rn.f32 %r5, %r5, %r5, %r5;", "fma"),
        ("add.s64 %rd3, %r5, 1;", "as int64"),
    ],
)
def test_what_a_kernel_must_not_do_is_an_error(body: str, why: str) -> None:
    """It names the instruction."""
    (last,) = [line for line in body.splitlines() if not line.startswith(("setp", "@%p1 bra", "$"))]
    with pytest.raises(PtxError, match=f"^'{re.escape(last.rstrip(';'))}'.*{why}"):
        run(body, numbers(), shared_nbytes=64)
