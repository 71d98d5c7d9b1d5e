"""Matrix loads and stores, mma.sync and wgmma."""

from __future__ import annotations

import re


def _floats(f, i, operand: str) -> str:
    return ", ".join(f"ptx::from_f32({v})" for v in f.values(i, operand))


def _bits(f, i, operand: str) -> str:
    return ", ".join(f.values(i, operand))


def _results(f, i, operand: str, template: str) -> str:
    from .translate import vector

    return " ".join(f.set(i, d, template.format(n)) for n, d in enumerate(vector(operand)))


def matrix(f, i) -> str:
    """ldmatrix and stmatrix of 8x8 matrices of 16-bit elements"""
    if not i.has("m8n8") or not i.has("b16"):
        raise i.error("matrix shape not known")
    load = i.opcode == "ldmatrix"
    registers, place = i.operands if load else i.operands[::-1]
    count = {"x1": 1, "x2": 2, "x4": 4}[next(w for w in i.words if re.match(r"x\d$", w))]
    transposed = str(i.has("trans")).lower()
    address = f"(uint32_t){f.address(i, place)}"
    if load:
        call = f"uint32_t m[{count}]; emu::ldmatrix({address}, m, {count}, {transposed});"
        return f"{{ {call} {_results(f, i, registers, 'm[{}]')} }}"
    values = f"const uint32_t m[] = {{{_bits(f, i, registers)}}};"
    return f"{{ {values} emu::stmatrix({address}, m, {count}, {transposed}); }}"


def mma(f, i) -> str:
    if ".".join(i.words[1:]) != "sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32":
        raise i.error("mma shape not known")
    d, a, b, c = i.operands
    return (
        f"{{ float d[4]; const float c[] = {{{_floats(f, i, c)}}}; "
        f"const uint32_t a[] = {{{_bits(f, i, a)}}}, b[] = {{{_bits(f, i, b)}}}; "
        f"emu::mma_m16n8k16_bf16(d, a, b, c); {_results(f, i, d, 'ptx::to_f32(d[{}])')} }}"
    )


def wgmma(f, i) -> str:
    """The products, and fence, commit_group and wait_group.

    NOTE: results reach the registers at once, so a missing wait_group that guards nothing but
    registers shows only at source level (where they are NaN until the wait) and as ptxas C7517.
    """
    if i.words[1] == "fence":
        return "emu::wgmma_fence();"
    if i.words[1] == "commit_group":
        return "emu::wgmma_commit();"
    if i.words[1] == "wait_group":
        return f"emu::wgmma_wait({f.value(i, i.operands[0])});"
    shape = re.match(r"m64n(\d+)k16$", i.words[4]) if len(i.words) > 4 else None
    if not shape or i.words[5:] != ("f32", "bf16", "bf16"):
        raise i.error("wgmma shape not known")
    d, a, b, scale_d, negate_a, negate_b, *transposed = i.operands
    in_registers = a.startswith("{")
    trans_a, trans_b = ("0", transposed[0]) if in_registers else transposed
    n = int(shape[1])
    declared = f"float d[{n // 2}] = {{{_floats(f, i, d)}}};"
    if in_registers:
        declared += f" const uint32_t a[] = {{{_bits(f, i, a)}}};"
    arguments = (
        f"{{d, {'a' if in_registers else 'nullptr'}, {'0' if in_registers else f.value(i, a)}, "
        f"{f.value(i, b)}, {n}, ({f.value(i, scale_d)}) != 0, {trans_a}, {trans_b}, "
        f"{int(negate_a == '-1')}, {int(negate_b == '-1')}}}"
    )
    results = _results(f, i, d, "ptx::to_f32(d[{}])")
    return f"{{ {declared} emu::wgmma_now({arguments}); {results} }}"


RULES = {"ldmatrix": matrix, "stmatrix": matrix, "mma": mma, "wgmma": wgmma}
