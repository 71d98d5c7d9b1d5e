"""What one round of the inner loops issues, counted: integers must not crowd the tensor cores."""

from __future__ import annotations

import pytest

from aot import loops, toolchain, triton_cases

needs_cuobjdump = pytest.mark.skipif(
    toolchain.triton_tools() is None, reason="cuobjdump of the triton wheel is not here"
)

# Counted 91, 221 and 467 (3.7.1); 205, 537 and, for half as many keys and queries, 396 before rows
# were divided once a step, and masks, scale and rescaling taken out or shared.
MOST = {
    "wgrad n=1536 k=512 bf16": 120,
    "wgrad_t n=97 k=512 bf16": 260,
    "attention t=916 head=64 bf16": 520,
}


@needs_cuobjdump
@pytest.mark.parametrize("label", MOST)
def test_instructions_of_a_step(label):
    (case,) = [case for case in triton_cases.cases() if case.label == label]
    (loop,) = loops.of_kernel(case.compile("90").built)
    assert loop.tensor >= 4
    assert loop.instructions <= MOST[label], loop.opcodes.most_common(12)


def test_only_innermost_loops_are_counted():
    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/              @!P0 HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0030*/               @P1 BRA 0x20 ;
        /*0040*/               @P2 BRA 0x10 ;
        /*0050*/                   BRA 0x50;
        /*0060*/                   BRA 0x80 ;
    """
    (inner,) = loops.loops(listing)
    assert (inner.start, inner.instructions, inner.tensor, inner.integer) == (0x20, 2, 1, 0)
