"""Instructions of the loops of a compiled kernel, counted in its machine code.

    cd tests; PYTHONPATH=.. python -m aot.loops attention 90

prints a line a loop that holds tensor-core instructions (fp32: multiply-adds): how many
instructions one round issues, how many of them are integer, and the tensor-core ones.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass

from aot import toolchain
from aot.resources import KINDS, TENSOR_KINDS

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_TENSOR = re.compile("|".join(KINDS[kind] for kind in TENSOR_KINDS))
# Integer arithmetic and what only moves or compares integers; I2F and the like convert.
_INTEGER = re.compile(
    r"U?(?:IMAD|IADD|ISETP|LEA|LOP3|SHF|SEL|PRMT|IABS|IMNMX|VIADD|VIMNMX|I2F|F2I)"
)


@dataclass(frozen=True)
class Loop:
    """One loop, without the loops within it."""

    start: int
    opcodes: Counter

    @property
    def instructions(self) -> int:
        return self.opcodes.total()

    def count(self, pattern: re.Pattern) -> int:
        return sum(n for op, n in self.opcodes.items() if pattern.match(op))

    @property
    def integer(self) -> int:
        return self.count(_INTEGER)

    @property
    def tensor(self) -> int:
        return self.count(_TENSOR)


def loops(listing: str) -> list[Loop]:
    """The innermost loops of one function's SASS: backward branches that enclose no other."""
    code = [(int(m[1], 16), m[2], m[3]) for m in _LINE.finditer(listing)]
    spans = []
    for at, opcode, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            spans.append((int(target[1], 16), at))
    inner = [
        (a, b)
        for a, b in spans
        if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)
    ]
    return [Loop(a, Counter(op for at, op, _ in code if a <= at <= b)) for a, b in inner]


def of_kernel(built: toolchain.Built) -> list[Loop]:
    """The loops of a cubin of one kernel that multiply on tensor cores."""
    from aot.resources import cuobjdump, run

    return [loop for loop in loops(run([cuobjdump(), "-sass", built.cubin])) if loop.tensor]


if __name__ == "__main__":
    from aot import triton_cases

    wanted, arch = sys.argv[1:3]
    for case in triton_cases.cases(thorough=True):
        if wanted in case.label and arch in case.archs:
            made = case.compile(arch)
            for loop in of_kernel(made.built):
                print(
                    f"{case.label} sm_{arch}: {loop.instructions} instructions, "
                    f"{loop.integer} integer, {loop.tensor} tensor, {made.warps} warps"
                )
