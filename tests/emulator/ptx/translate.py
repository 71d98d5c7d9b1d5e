"""One C++ function for each PTX entry: one statement for each instruction, in the same order.

Registers become local variables, all declared at the top (a goto may not jump over one), labels
become labels, and a predicate an `if`. ptx_support.h says how an entry is started.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from . import arithmetic, memory, sync, tensor
from .parser import (
    CloseScope,
    Entry,
    Instruction,
    Label,
    Local,
    Module,
    OpenScope,
    Registers,
    parse,
)
from .types import Type

Rule = Callable[["Function", Instruction], str]
RULES: dict[str, Rule] = {**arithmetic.RULES, **memory.RULES, **sync.RULES, **tensor.RULES}

SPECIAL = {
    "%laneid": "emu::cur->lane",
    "%warpid": "emu::cur->warp",
    "%cluster_ctarank": "emu::cur->cta_rank",
    "%cluster_ctaid.x": "emu::cur->cta_rank",
    "%cluster_nctarank": "emu::cur->cdim.x",
    "%cluster_nctaid.x": "emu::cur->cdim.x",
    "%clusterid.x": "(emu::cur->bid.x / emu::cur->cdim.x)",
    "%nclusterid.x": "(emu::cur->gdim.x / emu::cur->cdim.x)",
}
for _ptx, _name in (("tid", "tid"), ("ctaid", "bid"), ("ntid", "bdim"), ("nctaid", "gdim")):
    for _axis in "xyz":
        SPECIAL[f"%{_ptx}.{_axis}"] = f"emu::cur->{_name}.{_axis}"

_INTEGER = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?$")


class Function:
    """The translation of one entry; the rules call its methods."""

    def __init__(self, entry: Entry, symbols: dict[str, str]) -> None:
        self.entry = entry
        self.symbols = symbols
        self.locals: set[str] = set()
        self.declarations: list[str] = []
        self.lines: list[str] = []
        # A scope maps a register name, or the stem of a numbered family, to (variable, type).
        self.scopes: list[tuple[int, dict[str, tuple[str, Type]]]] = [(0, {})]
        self.scope_count = 0

    # ---- names ----------------------------------------------------------------------------------
    def register(self, name: str) -> tuple[str, Type] | None:
        family = re.sub(r"\d+$", "", name)
        number = name[len(family) :]
        for _, scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
            if number and family + "<" in scope:
                stem, kind = scope[family + "<"]
                return stem + number, kind
        return None

    def declare(self, statement: Registers) -> None:
        number, scope = self.scopes[-1]
        for name, count in statement.names:
            variable = f"r{number}_" + re.sub(r"\W", "_", name.lstrip("%"))
            kind = statement.type.register
            scope[name if count is None else name + "<"] = (variable, statement.type)
            family = [variable] if count is None else [f"{variable}{i}" for i in range(count)]
            for start in range(0, len(family), 10):
                row = ", ".join(f"{v} = 0" for v in family[start : start + 10])
                self.declarations.append(f"{kind} {row};")

    def label(self, name: str) -> str:
        # Labels of an inline-asm scope are its own; compiler labels ($L..) are the function's.
        number = 0 if name.startswith("$") else self.scopes[-1][0]
        return f"L{number}_" + re.sub(r"\W", "_", name)

    # ---- operands -------------------------------------------------------------------------------
    def value(self, i: Instruction, operand: str) -> str:
        """The bits of an operand as a C++ expression."""
        operand = operand.strip()
        if operand.startswith("!"):
            return f"!{self.value(i, operand[1:])}"
        if operand in SPECIAL:
            return SPECIAL[operand]
        if found := self.register(operand):
            return found[0]
        if operand[:2] in ("0f", "0F"):
            return f"0x{operand[2:]}u"
        if operand[:2] in ("0d", "0D"):
            return f"0x{operand[2:]}ull"
        if operand in self.locals:
            return f"(uint64_t){operand}"
        if operand in self.symbols:
            return self.symbols[operand]
        if operand in self.entry.parameters:
            return f"(uint64_t)(parameters + {self.entry.parameters[operand]})"
        if match := _INTEGER.match(operand):
            number = int(match[2], 0) * (-1 if match[1] else 1)
            return f"({number})" if abs(number) < 2**31 else f"({number % 2**64}ull)"
        raise i.error(f"operand {operand} not understood in")

    def values(self, i: Instruction, operand: str) -> list[str]:
        return [self.value(i, part) for part in vector(operand)]

    def set(self, i: Instruction, destination: str, expression: str) -> str:
        """Assign to a register; `_` discards."""
        if destination == "_":
            return f"(void)({expression});"
        found = self.register(destination)
        if not found:
            raise i.error(f"register {destination} is not declared in")
        return f"{found[0]} = ({expression});"

    def address(self, i: Instruction, operand: str) -> str:
        """[base+offset] as an integer expression."""
        inner = re.match(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]$", operand)
        if not inner:
            raise i.error(f"address {operand} not understood in")
        base = self.value(i, inner[1])
        return f"({base} + ({inner[2]}))" if inner[2] else f"({base})"

    # ---- statements -----------------------------------------------------------------------------
    def translate(self) -> str:
        for statement in self.entry.statements:
            if isinstance(statement, OpenScope):
                self.scope_count += 1
                self.scopes.append((self.scope_count, {}))
            elif isinstance(statement, CloseScope):
                self.scopes.pop()
            elif isinstance(statement, Registers):
                self.declare(statement)
            elif isinstance(statement, Local):
                bytes_ = f"alignas({statement.align}) uint8_t {statement.name}[{statement.bytes}];"
                self.declarations.append(bytes_)
                self.locals.add(statement.name)
            elif isinstance(statement, Label):
                self.lines.append(f"{self.label(statement.name)}:;")
            else:
                self.lines.append(self.instruction(statement))
        body = "\n  ".join([*self.declarations, *self.lines])
        name = self.entry.name
        return f"static void entry_{name}(const uint8_t* parameters) {{\n  {body}\n}}\n"

    def instruction(self, i: Instruction) -> str:
        rule = RULES.get(i.opcode)
        if rule is None:
            raise i.error("unknown instruction")
        code = sync.site(i) + rule(self, i)
        if not i.predicate:
            return code
        return f"if ({self.value(i, i.predicate)}) {{ {code} }}"


def vector(operand: str) -> list[str]:
    """{a, b} -> [a, b]; a -> [a]."""
    operand = operand.strip()
    if not operand.startswith("{"):
        return [operand]
    return [part.strip() for part in operand[1:-1].split(",")]


def translate(text: str, wanted: str = "") -> str:
    """C++ for the emulator: a function for each PTX entry whose name matches `wanted`."""
    module = parse(text)
    symbols = _symbols(module)
    parts = ['#include "ptx_support.h"\n']
    for entry in module.entries:
        if not re.search(wanted, entry.name):
            continue
        parts.append(Function(entry, symbols).translate())
        parts.append(f"PTX_ENTRY({entry.name}, {module.shared_bytes})\n")
    return "\n".join(parts)


def _symbols(module: Module) -> dict[str, str]:
    """Shared variables as 32-bit shared addresses: the static ones first, then the dynamic part."""
    symbols = {name: f"(emu::kSharedBase + {offset}u)" for name, offset in module.shared.items()}
    dynamic = f"emu::dyn_offset({module.shared_bytes})"
    return symbols | dict.fromkeys(module.extern_shared, dynamic)
