"""What a compiled kernel uses, read from its cubin, and the limits it is held to."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from aot.toolchain import BAD_PTXAS_LINES, Built, cuobjdump, run

# CUDA C programming guide, table of technical specifications per compute capability: the most
# shared memory one block may use (bytes).
SHARED_LIMIT = {"80": 166912, "86": 101376, "89": 101376, "90": 232448}
SHARED_LIMIT |= {"100": 232448, "120": 101376}
RESERVED_SHARED = 1024  # of it the driver takes this much a block on sm_90 and later; in cubins too

# SASS mnemonics by what they stand for.
KINDS = {
    "HMMA": r"HMMA",  # mma.sync
    "HGMMA": r"HGMMA",  # wgmma
    "UTCMMA": r"UTC\w*MMA",  # tcgen05.mma
    "LDSM": r"LDSM",  # ldmatrix
    "LDGSTS": r"LDGSTS",  # cp.async
    "BULK": r"UTMALDG|UBLKCP|UTMASTG",  # bulk and tensor copies
    "LDL": r"LDL",  # spill loads
    "STL": r"STL",  # spill stores
    "BAR": r"BAR",
    # Loads through the cache of constants, which no acquire empties: what a launch writes must not
    # be read so, and nvcc decides by itself what it takes for constant.
    "LDG.CONSTANT": r"LDG\S*\.CONSTANT",
    "TRAP": r"BPT\.TRAP",  # of a kernel that another generation runs
    "RECIPROCAL": r"MUFU\.RCP",  # of a division: of integers, too, and then with twenty more
}
TENSOR_KINDS = ("HMMA", "HGMMA", "UTCMMA")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)


@dataclass(frozen=True)
class Need:
    """What a kernel is meant to be made of."""

    tensor: tuple[str, ...] = TENSOR_KINDS  # one of these must occur; empty: none is meant
    bulk: bool = False  # bulk copies are meant
    max_registers: int = 255
    max_spills: int = 0  # spill instructions of each sort that are put up with
    constant_loads: bool = True  # False: the kernel reads what its own launch wrote
    max_reciprocals: int | None = None


@dataclass(frozen=True)
class Usage:
    kernel: str
    arch: str
    registers: int
    stack: int
    shared: int  # static and dynamic, bytes
    counts: Counter = field(compare=False)
    ptxas_lines: tuple[str, ...] = ()

    def faults(self, need: Need) -> list[str]:
        """Every reason to reject this kernel, in words."""
        base = re.match(r"\d+", self.arch)[0]
        found = []
        spills = max(self.counts["LDL"], self.counts["STL"])
        if spills > need.max_spills or (self.stack and not need.max_spills):
            found.append(
                f"spills: {self.stack} bytes of stack, {self.counts['STL']} STL, "
                f"{self.counts['LDL']} LDL"
            )
        if self.shared > SHARED_LIMIT[base]:
            found.append(
                f"{self.shared} bytes of shared memory, sm_{base} has {SHARED_LIMIT[base]}"
            )
        if self.registers > need.max_registers:
            found.append(f"{self.registers} registers, at most {need.max_registers} are meant")
        if need.tensor and not any(self.counts[kind] for kind in need.tensor):
            found.append(f"no {' or '.join(need.tensor)} instruction")
        if not need.constant_loads and self.counts["LDG.CONSTANT"]:
            found.append(f"{self.counts['LDG.CONSTANT']} LDG.CONSTANT")
        if need.max_reciprocals is not None and self.counts["RECIPROCAL"] > need.max_reciprocals:
            count = self.counts["RECIPROCAL"]
            found.append(f"{count} MUFU.RCP, at most {need.max_reciprocals} are meant")
        if need.bulk and not self.counts["BULK"]:
            found.append("no bulk copy")
        found += [f"ptxas: {line}" for line in self.ptxas_lines]
        return found


def read(built: Built, arch: str, dynamic_shared: int = 0) -> list[Usage]:
    """The usage of every kernel in a cubin. The cubin does not know the dynamic shared memory."""
    table = run([cuobjdump(), "-res-usage", built.cubin])
    listing = run([cuobjdump(), "-sass", built.cubin])
    counts = {}
    for part in listing.split("Function : ")[1:]:
        opcodes = _INSTRUCTION.findall(part)
        counts[part.split()[0]] = Counter(
            kind for op in opcodes for kind, regex in KINDS.items() if re.match(regex, op)
        )
    bad = tuple(line.strip() for line in built.log.splitlines() if BAD_PTXAS_LINES.search(line))
    reserved = RESERVED_SHARED if int(re.match(r"\d+", arch)[0]) >= 90 else 0
    pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    return [
        Usage(
            kernel=m[1],
            arch=arch,
            registers=int(m[2]),
            stack=int(m[3]),
            shared=max(0, int(m[4]) - reserved) + dynamic_shared,
            counts=counts[m[1]],
            ptxas_lines=bad,
        )
        for m in re.finditer(pattern, table)
    ]


def table(rows: list[tuple[str, Usage, list[str]]]) -> str:
    """A plain-text table: one line a kernel and architecture, with its faults."""
    columns = ("HMMA", "HGMMA", "UTCMMA", "LDSM", "LDGSTS", "BULK", "STL", "LDL")
    head = f"{'kernel':44s} {'sm':5s} {'regs':>4s} {'stack':>5s} {'shared':>7s} "
    lines = [head + " ".join(f"{name:>6s}" for name in columns)]
    for label, usage, faults in rows:
        line = f"{label:44s} {usage.arch:5s} {usage.registers:4d} {usage.stack:5d} "
        line += f"{usage.shared:7d} " + " ".join(f"{usage.counts[c]:6d}" for c in columns)
        lines.append(line + (f"  FAULT {'; '.join(faults)}" if faults else ""))
    return "\n".join(lines)
