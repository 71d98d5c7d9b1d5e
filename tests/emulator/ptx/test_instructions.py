"""How single PTX instructions are read, each against its definition in the PTX ISA."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from .. import build
from .parser import parse, split_operands
from .run import PtxKernel
from .translate import translate
from .types import TranslationError

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


def f32(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


NAN = f32(float("nan"))
ONES = 0xFFFFFFFF
# (instruction with %r0 = result and %r1.. = operands, operands, expected 32-bit result)
CASES = [
    ("add.s32 %r0, %r1, %r2", (5, ONES), 4),
    ("sub.u32 %r0, %r1, %r2", (3, 5), ONES - 1),
    ("mul.lo.u32 %r0, %r1, %r2", (0x10001, 0x10001), 0x20001),
    ("mul.hi.u32 %r0, %r1, %r2", (ONES, ONES), ONES - 1),
    ("mul.hi.s32 %r0, %r1, %r2", (ONES, ONES), 0),
    ("mad.lo.s32 %r0, %r1, %r2, %r3", (7, ONES, 10), 3),
    ("div.s32 %r0, %r1, %r2", (-7 & ONES, 2), -3 & ONES),
    ("rem.s32 %r0, %r1, %r2", (-7 & ONES, 2), ONES),
    ("shl.b32 %r0, %r1, %r2", (1, 31), 1 << 31),
    ("shl.b32 %r0, %r1, %r2", (1, 32), 0),
    ("shr.u32 %r0, %r1, %r2", (1 << 31, 31), 1),
    ("shr.s32 %r0, %r1, %r2", (1 << 31, 40), ONES),
    ("min.s32 %r0, %r1, %r2", (ONES, 1), ONES),
    ("min.u32 %r0, %r1, %r2", (ONES, 1), 1),
    ("abs.s32 %r0, %r1", (-5 & ONES,), 5),
    ("bfe.u32 %r0, %r1, %r2, %r3", (0xABCD1234, 8, 8), 0x12),
    ("bfe.s32 %r0, %r1, %r2, %r3", (0x8000, 8, 8), 0xFFFFFF80),
    ("bfi.b32 %r0, %r1, %r2, %r3, %r4", (0xFF, 0, 4, 4), 0xF0),
    ("brev.b32 %r0, %r1", (1,), 1 << 31),
    ("popc.b32 %r0, %r1", (0xF0F0,), 8),
    ("clz.b32 %r0, %r1", (0x00010000,), 15),
    ("prmt.b32 %r0, %r1, %r2, %r3", (0x33221100, 0x77665544, 0x7160), 0x77116600),
    ("prmt.b32 %r0, %r1, %r2, %r3", (0x00008000, 0, 0x0009), 0x000000FF),
    ("lop3.b32 %r0, %r1, %r2, %r3, 0xE8", (0b1100, 0b1010, 0b1001), 0b1000),
    ("shf.l.wrap.b32 %r0, %r1, %r2, %r3", (0x80000000, 1, 1), 3),
    ("shf.r.clamp.b32 %r0, %r1, %r2, %r3", (0, 7, 32), 7),
    ("add.f32 %r0, %r1, %r2", (f32(1.5), f32(2.25)), f32(3.75)),
    ("fma.rn.f32 %r0, %r1, %r2, %r3", (f32(3.0), f32(4.0), f32(-1.0)), f32(11.0)),
    ("ex2.approx.ftz.f32 %r0, %r1", (f32(3.0),), f32(8.0)),
    ("rsqrt.approx.f32 %r0, %r1", (f32(4.0),), f32(0.5)),
    ("max.f32 %r0, %r1, %r2", (NAN, f32(1.0)), f32(1.0)),
    ("add.sat.f32 %r0, %r1, %r2", (f32(0.75), f32(0.75)), f32(1.0)),
    ("neg.f32 %r0, %r1", (f32(2.0),), f32(-2.0)),
    ("cvt.rn.f32.s32 %r0, %r1", (-3 & ONES,), f32(-3.0)),
    ("cvt.rn.f32.u32 %r0, %r1", (3,), f32(3.0)),
    ("cvt.rzi.s32.f32 %r0, %r1", (f32(-2.7),), -2 & ONES),
    ("cvt.rni.s32.f32 %r0, %r1", (f32(2.5),), 2),
    ("cvt.rzi.u32.f32 %r0, %r1", (f32(-2.7),), 0),
    ("cvt.rzi.s32.f32 %r0, %r1", (f32(1e20),), 0x7FFFFFFF),
    ("cvt.rmi.f32.f32 %r0, %r1", (f32(-1.5),), f32(-2.0)),
    ("cvt.rn.bf16x2.f32 %r0, %r1, %r2", (f32(2.0), f32(1.0)), 0x40003F80),
    ("cvt.s32.s8 %r0, %r1", (0x80,), 0xFFFFFF80),
    ("mul.rn.bf16x2 %r0, %r1, %r2", (0x40003F80, 0x40404040), 0x40C04040),
    ("selp.b32 %r0, %r1, %r2, %p1", (1, 2), 1),
    ("@!%p1 mov.u32 %r0, %r1", (9,), 0),
]
COMPARISONS = [
    ("lt.s32", ONES, 1, True),
    ("lt.u32", ONES, 1, False),
    ("hs.u32", 5, 5, True),
    ("lt.f32", f32(-0.5), f32(0.25), True),
    ("ne.f32", NAN, f32(1.0), False),
    ("neu.f32", NAN, f32(1.0), True),
    ("geu.f32", NAN, f32(1.0), True),
    ("nan.f32", NAN, f32(1.0), True),
    ("num.f32", f32(2.0), f32(1.0), True),
]


def kernel_text(cases) -> str:
    """A kernel that runs every case and stores result i at out[i]."""
    lines = [".version 8.0", ".target sm_80", ".visible .entry check(.param .u64 out)", "{"]
    lines += [".reg .b32 %r<8>;", ".reg .b64 %rd<2>;", ".reg .pred %p<3>;"]
    lines += ["ld.param.u64 %rd1, [out];", "setp.eq.u32 %p1, 1, 1;"]
    for index, (instruction, operands, _) in enumerate(cases):
        lines.append("mov.u32 %r0, 0;")
        lines += [f"mov.u32 %r{n}, {value};" for n, value in enumerate(operands, 1)]
        lines += [f"{instruction};", f"st.global.u32 [%rd1+{4 * index}], %r0;"]
    return "\n".join([*lines, "ret;", "}"])


def run(text: str, count: int, **launch) -> np.ndarray:
    out = np.zeros(count, np.uint32)
    kernel = PtxKernel(text)
    kernel.configure(race=1)
    kernel.launch((1,), launch.pop("block", (1,)), [out], **launch)
    return out


def test_arithmetic():
    out = run(kernel_text(CASES), len(CASES))
    wrong = [
        f"{instruction} of {[hex(o) for o in operands]}: {got:#x}, expected {want:#x}"
        for (instruction, operands, want), got in zip(CASES, out.tolist(), strict=True)
        if got != want
    ]
    assert not wrong, "\n".join(wrong)


def test_comparisons():
    cases = [
        (f"setp.{op} %p2, %r1, %r2;\nselp.b32 %r0, 1, 0, %p2", (a, b), int(want))
        for op, a, b, want in COMPARISONS
    ]
    out = run(kernel_text(cases), len(cases)).tolist()
    assert out == [want for _, _, want in cases], list(zip(COMPARISONS, out, strict=True))


WARP = """.version 8.0
.target sm_80
.shared .align 16 .b8 tile[512];
.visible .entry check(.param .u64 out)
{
.reg .b32 %r<9>; .reg .b64 %rd<4>; .reg .pred %p<3>;
ld.param.u64 %rd1, [out];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
mov.u32 %r2, tile;
shl.b32 %r3, %r1, 2;
add.s32 %r3, %r3, %r2;
st.shared.u32 [%r3], %r1;
BARRIER
xor.b32 %r4, %r1, 4;
shl.b32 %r4, %r4, 2;
add.s32 %r4, %r4, %r2;
ld.shared.u32 %r5, [%r4];
{
.reg .b32 mine;
shfl.sync.down.b32 mine|%p1, %r1, 1, 31, -1;
selp.b32 mine, mine, 100, %p1;
add.s32 %r5, %r5, mine;
}
vote.sync.ballot.b32 %r6, %p1, -1;
popc.b32 %r7, %r6;
add.s32 %r5, %r5, %r7;
st.global.u32 [%rd3], %r5;
ret;
}
"""


def test_shared_memory_shuffles_votes_and_scopes():
    out = run(WARP.replace("BARRIER", "bar.sync 0;"), 64, block=(64,))
    lane = np.arange(64)
    following = np.where(lane % 32 == 31, 100, lane + 1)
    assert np.array_equal(out, (lane ^ 4) + following + 31)


def test_the_race_checker_names_the_ptx_line():
    text = WARP.replace("BARRIER", "")
    line = next(n for n, row in enumerate(text.splitlines(), 1) if "ld.shared" in row)
    with pytest.raises(build.EmulatorFault, match=rf"(race|uninitialised).*PTX line {line}"):
        run(text, 64, block=(64,))


STORE_BY_ALL = """.version 8.0
.target sm_80
.shared .align 4 .b8 word[4];
.visible .entry check(.param .u64 out)
{
.reg .b32 %r<4>; .reg .b64 %rd<2>;
ld.param.u64 %rd1, [out];
mov.u32 %r1, VALUE;
mov.u32 %r2, word;
st.shared.u32 [%r2], %r1;
bar.sync 0;
ld.shared.u32 %r3, [%r2];
st.global.u32 [%rd1], %r3;
ret;
}
"""


def test_one_value_stored_by_a_whole_warp_is_no_race():
    """Compilers store a reduced value from every lane that holds it."""
    assert run(STORE_BY_ALL.replace("VALUE", "7"), 1, block=(32,))[0] == 7
    for block, value in ((64, "7"), (32, "%laneid")):  # two warps; different values
        with pytest.raises(build.EmulatorFault, match="write after write"):
            run(STORE_BY_ALL.replace("VALUE", value), 1, block=(block,))


@pytest.mark.parametrize(
    "instruction, said",
    [
        ("frobnicate.u32 %r0, %r1", "unknown instruction: frobnicate"),
        ("add.rz.f32 %r0, %r1, %r2", "modifier .rz not known"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 %r0, %r1, %r1, %r1", "mma shape"),
        ("ld.global.L7::magic.u32 %r0, [%rd1]", "modifier .L7::magic not known"),
        ("mov.u32 %r0, %nonsense", "operand %nonsense not understood"),
        ("cp.async.mbarrier.arrive.b64 [%r1]", "cp.async on an mbarrier"),
    ],
)
def test_what_is_not_understood_stops_with_its_line(instruction, said):
    text = kernel_text([(instruction, (), 0)])
    line = next(n for n, row in enumerate(text.splitlines(), 1) if row.startswith(instruction))
    with pytest.raises(TranslationError, match=f"PTX line {line}: .*{said}"):
        translate(text)


def test_device_functions_are_refused():
    with pytest.raises(TranslationError, match="device functions"):
        translate(".version 8.0\n.visible .func f()\n{\nret;\n}\n")


def test_parameters_and_shared_variables_are_laid_out_as_in_cuda():
    text = """.shared .align 4 .b8 small[6];
    .shared .align 16 .b8 large[32];
    .extern .shared .align 16 .b8 dynamic[];
    .visible .entry k(.param .u32 n, .param .align 8 .b8 p[20], .param .u64 .ptr .global q) { ret; }
    """
    module = parse(text)
    assert module.shared == {"small": 0, "large": 16} and module.shared_bytes == 48
    assert module.extern_shared == ["dynamic"]
    entry = module.entries[0]
    assert entry.parameters == {"n": 0, "p": 8, "q": 32} and entry.parameter_bytes == 40
    assert split_operands("{a, b}, [c+4], d") == ["{a, b}", "[c+4]", "d"]
