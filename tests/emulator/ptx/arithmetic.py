"""Registers to registers: moves, conversions, integer and floating-point arithmetic, shuffles.

Most opcodes are a row of a table: a C++ template over the operands {0}, {1}, {2}, with {t} the C++
integer type and {w} the one of twice the width. Float operands arrive as C++ floats.
"""

from __future__ import annotations

from .types import Type, is_type

# Modifiers that change nothing here: the emulator rounds to nearest, keeps denormals, and computes
# the approximate functions with the C library.
FLOAT_MODIFIERS = {"rn", "ftz", "approx", "full"}

INTEGER = {
    "add": "({t})({0}) + ({t})({1})",
    "sub": "({t})({0}) - ({t})({1})",
    "and": "({t})({0}) & ({t})({1})",
    "or": "({t})({0}) | ({t})({1})",
    "xor": "({t})({0}) ^ ({t})({1})",
    "not": "~({t})({0})",
    "neg": "-({t})({0})",
    "abs": "ptx::absolute(({t})({0}))",
    "min": "std::min<{t}>({0}, {1})",
    "max": "std::max<{t}>({0}, {1})",
    "div": "ptx::divide(({t})({0}), ({t})({1}))",
    "rem": "ptx::remainder(({t})({0}), ({t})({1}))",
    "shl": "ptx::shift_left(({t})({0}), {1})",
    "shr": "ptx::shift_right(({t})({0}), {1})",
    "bfe": "ptx::bit_field_extract(({t})({0}), {1}, {2})",
    "bfi": "ptx::bit_field_insert(({t})({0}), ({t})({1}), {2}, {3})",
    "brev": "ptx::bit_reverse(({t})({0}))",
    "popc": "__builtin_popcountll(({t})({0}))",
    "clz": "ptx::leading_zeros(({t})({0}))",
    "prmt": "ptx::permute({0}, {1}, {2})",
    "lop3": "ptx::logic3({0}, {1}, {2}, {3})",
}
PREDICATE = {"not": "!{0}", "and": "{0} && {1}", "or": "{0} || {1}", "xor": "{0} != {1}"}
FLOAT = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "fma": "std::fma({0}, {1}, {2})",
    "mad": "std::fma({0}, {1}, {2})",
    "neg": "-{0}",
    "abs": "std::fabs({0})",
    "min": "std::fmin({0}, {1})",
    "max": "std::fmax({0}, {1})",
    "rcp": "1 / {0}",
    "sqrt": "std::sqrt({0})",
    "rsqrt": "1 / std::sqrt({0})",
    "ex2": "std::exp2({0})",
    "lg2": "std::log2({0})",
    "sin": "std::sin({0})",
    "cos": "std::cos({0})",
    "tanh": "std::tanh({0})",
    "copysign": "std::copysign({1}, {0})",
}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
UNORDERED = {name + "u": symbol for name, symbol in list(COMPARE.items())[:6]}
ROUND = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}


def as_float(kind: Type, bits: str) -> str:
    return f"ptx::from_{kind.name}({bits})"


def as_bits(kind: Type, value: str) -> str:
    return f"ptx::to_{kind.name}({value})"


def computed(f, i) -> str:
    """Any opcode of the tables above."""
    kind = i.type
    operands = [f.value(i, o) for o in i.operands[1:]]
    if kind.is_float:
        return _float(f, i, kind, operands)
    if i.opcode in ("shf",) or i.has("sat", "cc"):
        raise i.error("modifier not known in")
    table = PREDICATE if kind.name == "pred" else INTEGER
    if i.opcode not in table:
        raise i.error(f"no integer form of {i.opcode} is known")
    return f.set(i, i.operands[0], table[i.opcode].format(*operands, t=kind.integer))


def _float(f, i, kind: Type, operands: list[str]) -> str:
    _check(i, FLOAT_MODIFIERS | {"NaN", "sat"})
    if i.opcode not in FLOAT:
        raise i.error(f"no floating-point form of {i.opcode} is known")
    template = FLOAT[i.opcode]
    if i.has("NaN"):  # min.NaN: a NaN operand wins
        template = "ptx::" + {"min": "nan_min", "max": "nan_max"}[i.opcode] + "({0}, {1})"
    if i.has("sat"):
        template = f"ptx::saturate({template})"
    if kind.name == "bf16x2":
        arguments = ", ".join(f"float v{n}" for n in range(len(operands)))
        names = [f"v{n}" for n in range(len(operands))]
        each = f"[]({arguments}) {{ return {template.format(*names)}; }}"
        return f.set(i, i.operands[0], f"ptx::each_bf16({each}, {', '.join(operands)})")
    expression = template.format(*(as_float(kind, o) for o in operands))
    return f.set(i, i.operands[0], as_bits(kind, expression))


def _check(i, known: set[str]) -> None:
    for word in i.words[1:]:
        if word not in known and not is_type(word):
            raise i.error(f"modifier .{word} not known in")


def multiply(f, i) -> str:
    kind = i.type
    if kind.is_float:
        return computed(f, i)
    _check(i, {"lo", "hi", "wide"})
    a, b = (f"({kind.wide})({kind.integer})({f.value(i, o)})" for o in i.operands[1:3])
    if i.has("wide"):
        result, product = kind.wide, f"{a} * {b}"
    elif i.has("hi"):
        result, product = kind.integer, f"({kind.integer})(({a} * {b}) >> {kind.bits})"
    else:
        result, product = kind.integer, f"({kind.integer})({a} * {b})"
    if i.opcode == "mad":
        product = f"({product}) + ({result})({f.value(i, i.operands[3])})"
    return f.set(i, i.operands[0], product)


def move(f, i) -> str:
    """Also packs {a, b} into a wide register and unpacks one."""
    from .translate import vector

    kind, (to, source) = i.type, i.operands
    targets, sources = vector(to), vector(source)
    if len(targets) > 1:
        part = kind.bits // len(targets)
        value = f.value(i, source)
        pieces = [
            f.set(i, target, f"(uint{part}_t)(whole >> {part * n})")
            for n, target in enumerate(targets)
            if target != "_"
        ]
        return f"{{ {kind.register} whole = {value}; {' '.join(pieces)} }}"
    if len(sources) > 1:
        part = kind.bits // len(sources)
        pieces = [
            f"({kind.register})(uint{part}_t)({f.value(i, s)}) << {part * n}"
            for n, s in enumerate(sources)
        ]
        return f.set(i, to, " | ".join(pieces))
    value = f.value(i, source)
    return f.set(i, to, f"{value} != 0" if kind.name == "pred" else f"({kind.register})({value})")


def compare(f, i) -> str:
    """setp.lt[.and|or|xor].type p[|q], a, b[, c]"""
    kind, relation = i.type, i.words[1]
    a, b = (f.value(i, o) for o in i.operands[1:3])
    if kind.is_float:
        a, b = as_float(kind, a), as_float(kind, b)
        if relation in ("num", "nan"):
            unordered = f"(std::isnan({a}) || std::isnan({b}))"
            result = unordered if relation == "nan" else f"!{unordered}"
        elif relation in UNORDERED:
            result = f"(std::isnan({a}) || std::isnan({b}) || {a} {UNORDERED[relation]} {b})"
        else:  # C++'s != is true of NaN, PTX's ordered ne is false
            guard = f" && !std::isnan({a}) && !std::isnan({b})" if relation == "ne" else ""
            result = f"({a} {COMPARE[relation]} {b}{guard})"
    elif relation in COMPARE:
        result = f"(({kind.integer})({a}) {COMPARE[relation]} ({kind.integer})({b}))"
    else:
        raise i.error(f"comparison .{relation} not known in")
    p, _, q = i.operands[0].partition("|")
    combine = {"and": "{} && {}", "or": "{} || {}", "xor": "{} != {}"}
    joined = next((combine[w] for w in i.words[2:] if w in combine), None)
    if joined:
        third = f.value(i, i.operands[3])
        first = joined.format(result, third)
        second = joined.format(f"!{result}", third)
    else:
        first, second = result, f"!{result}"
    if q:
        saved = f"bool first = {first}, second = {second};"
        return f"{{ {saved} {f.set(i, p, 'first')} {f.set(i, q, 'second')} }}"
    return f.set(i, p, first)


def select(f, i) -> str:
    a, b, p = (f.value(i, o) for o in i.operands[1:])
    kind = i.type.register
    return f.set(i, i.operands[0], f"{p} ? ({kind})({a}) : ({kind})({b})")


def convert(f, i) -> str:
    """cvt[.rounding].to.from"""
    _check(i, {"rn", "rz", "ftz", "sat", *ROUND})
    to, source = i.types[:2]
    value = f.value(i, i.operands[1])
    if to.name == "bf16x2":  # d, high, low
        low = as_float(source, f.value(i, i.operands[2]))
        high = as_float(source, value)
        if i.has("rz", "sat"):
            raise i.error("rounding not known in")
        return f.set(i, i.operands[0], f"ptx::pack_bf16({low}, {high})")
    if source.is_float:
        value = as_float(source, value)
        rounding = next((ROUND[w] for w in i.words if w in ROUND), None)
        if rounding:
            value = f"{rounding}({value})"
        if to.is_float:
            if i.has("rz"):
                raise i.error("rounding not known in")
            value = f"ptx::saturate({value})" if i.has("sat") else value
            return f.set(i, i.operands[0], as_bits(to, value))
        if not rounding:
            raise i.error("no rounding to an integer named in")
        return f.set(i, i.operands[0], f"ptx::to_integer<{to.integer}>({value})")
    if i.has("sat"):
        raise i.error("modifier .sat not known in")
    value = f"({source.integer})({value})"
    if to.is_float:
        return f.set(i, i.operands[0], as_bits(to, value))
    return f.set(i, i.operands[0], f"({to.integer}){value}")


def convert_address(f, i) -> str:
    """cvta[.to].space: shared addresses are a 32-bit window, all others are plain pointers."""
    value = f.value(i, i.operands[1])
    if not i.has("shared", "shared::cta"):
        return f.set(i, i.operands[0], value)
    if i.has("to"):
        return f.set(i, i.operands[0], f"emu::cvta_shared((const void*){value})")
    return f.set(i, i.operands[0], f"(uint64_t)emu::shared_ptr((uint32_t){value})")


def funnel_shift(f, i) -> str:
    """shf.l|r.wrap|clamp.b32 d, low, high, amount"""
    low, high, amount = (f.value(i, o) for o in i.operands[1:])
    name = "ptx::funnel_" + ("left" if i.has("l") else "right")
    return f.set(i, i.operands[0], f"{name}({low}, {high}, {amount}, {int(i.has('clamp'))})")


RULES = dict.fromkeys([*INTEGER, *FLOAT], computed) | {
    "mul": multiply,
    "mad": multiply,
    "mov": move,
    "setp": compare,
    "selp": select,
    "cvt": convert,
    "cvta": convert_address,
    "shf": funnel_shift,
}
