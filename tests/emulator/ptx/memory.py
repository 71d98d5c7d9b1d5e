"""Loads, stores, atomics and asynchronous copies.

Each access names its PTX line to the race checker, so that a report can be read beside the PTX.
"""

from __future__ import annotations

import re

from .sync import scope
from .types import is_type

_HINTS = re.compile(
    r"(L1::\w+|L2::\w+|ca|cg|cs|cv|lu|wb|wt|nc|weak|relaxed|volatile|acquire|release|acq_rel|"
    r"cta|cluster|gpu|sys|global|shared|shared::cta|shared::cluster|param|local|v2|v4|v8|"
    r"noftz)$"
)


def pointer(f, i, operand: str) -> str:
    """The host pointer of an operand [address], by the state space the opcode names."""
    if i.has("param"):
        inner = operand.strip("[] ")
        base = re.split(r"[+\s]", inner)[0]
        if base in f.entry.parameters:
            offset = inner[len(base) :].lstrip("+ ") or "0"
            return f"(uint8_t*)parameters + {f.entry.parameters[base]} + ({offset})"
    if i.has("shared", "shared::cta", "shared::cluster"):
        return f"emu::shared_ptr((uint32_t){f.address(i, operand)})"
    return f"(uint8_t*){f.address(i, operand)}"


def _check_hints(i) -> None:
    for word in i.words[1:]:
        if not is_type(word) and not _HINTS.match(word):
            raise i.error(f"modifier .{word} not known in")


def _seen(i, size: int, stored: list[str] | None = None) -> str:
    """Tell the race checker, for a store also whether its value is there already."""
    if i.has("param", "local"):
        return ""  # constant, or the thread's own
    what = f'"{i.opcode} at PTX line {i.line}"'
    if stored is None and i.has("nc"):
        return f"emu::access_constant(p, {size}, {what});"
    if stored is None:
        return f"emu::access(p, {size}, false, {what});"
    values = ", ".join(f"({i.type.register})({value})" for value in stored)
    return f"emu::access(p, {size}, true, {what}, ptx::holds(p, {values}));"


def _order(i, size: int) -> str:
    known = (("acq_rel", "kAcqRel"), ("acquire", "kAcquire"), ("release", "kRelease"))
    known += (("relaxed", "kRelaxed"), ("volatile", "kRelaxed"))
    for word, order in known:
        if i.has(word):
            return f"emu::atomic_order(p, {size}, emu::Order::{order}, {scope(i, 'kGpu')});"
    return ""


def load(f, i) -> str:
    from .translate import vector

    _check_hints(i)
    kind, targets = i.type, vector(i.operands[0])
    size = kind.bytes * len(targets)
    order = _order(i, size)
    # An ordered load may be a spin on a flag: let the others run.
    before = f"emu::yield(); {order}" if order else _seen(i, size)
    parts = [f"uint8_t* p = {pointer(f, i, i.operands[1])};", f"ptx::aligned(p, {size});", before]
    for n, target in enumerate(targets):
        if target != "_":
            loaded = f"ptx::load<{kind.register}>(p + {n * kind.bytes})"
            # A narrower value is widened by its own sign: ld.s8 into a 32-bit register.
            parts.append(f.set(i, target, f"({kind.integer}){loaded}"))
    return "{ " + " ".join(parts) + " }"


def store(f, i) -> str:
    _check_hints(i)
    kind, values = i.type, f.values(i, i.operands[1])
    size = kind.bytes * len(values)
    before = _order(i, size) or _seen(i, size, values)
    parts = [f"uint8_t* p = {pointer(f, i, i.operands[0])};", f"ptx::aligned(p, {size});", before]
    for n, value in enumerate(values):
        parts.append(f"ptx::store<{kind.register}>(p + {n * kind.bytes}, {value});")
    return "{ " + " ".join(parts) + " }"


_ATOMIC = {"add", "exch", "cas", "min", "max", "and", "or", "xor", "inc", "dec"}


def atomic(f, i) -> str:
    """atom d, [a], b[, c] and red [a], b"""
    operation = next((w for w in i.words if w in _ATOMIC), None)
    kind = i.type
    if operation is None or kind.name in ("bf16", "bf16x2", "f16", "f16x2"):
        raise i.error("atomic not known")
    known = {operation, "global", "shared", "shared::cta", "relaxed", "acquire", "release"}
    known |= {"acq_rel", "cta", "cluster", "gpu", "sys"}
    for word in i.words[1:]:
        if word not in known and not is_type(word):
            raise i.error(f"modifier .{word} not known in")
    operands = list(i.operands)
    target = operands.pop(0) if i.opcode == "atom" else "_"
    values = [f.value(i, o) for o in operands[1:]]
    relaxed = f"emu::atomic_order(p, {kind.bytes}, emu::Order::kRelaxed, {scope(i, 'kGpu')});"
    order = _order(i, kind.bytes) or relaxed
    type_name = {"f32": "float", "f64": "double"}.get(kind.name, kind.integer)
    if kind.is_float:
        values = [f"ptx::from_{kind.name}({v})" for v in values]
    call = f"ptx::atomic_{operation}<{type_name}>(p, {', '.join(values)})"
    call = f"ptx::to_{kind.name}({call})" if kind.is_float else call
    done = f.set(i, target, f"({kind.register}){call}")
    return f"{{ uint8_t* p = {pointer(f, i, operands[0])}; {order} {done} emu::yield(); }}"


def copy(f, i) -> str:
    """cp.async and cp.async.bulk in all their forms."""
    if i.words[1] != "async":
        raise i.error("copy not known")
    if i.has("bulk"):
        return _bulk(f, i)
    if i.has("mbarrier"):
        raise i.error("cp.async on an mbarrier is not translated")
    if i.has("commit_group"):
        return "emu::cp_commit();"
    if i.has("wait_group"):
        return f"emu::cp_wait({f.value(i, i.operands[0])});"
    if i.has("wait_all"):
        return "emu::cp_commit(); emu::cp_wait(0);"
    target, source = f.address(i, i.operands[0]), f.address(i, i.operands[1])
    size = f.value(i, i.operands[2])
    hinted = any(word == "L2::cache_hint" for word in i.words)
    rest = i.operands[3 : len(i.operands) - hinted]
    taken = f.value(i, rest[0]) if rest else size
    return f"emu::cp_async((uint32_t){target}, (const void*){source}, {size}, {taken});"


def _bulk(f, i) -> str:
    if i.has("commit_group"):
        return "emu::bulk_commit();"
    if i.has("wait_group"):
        return f"emu::bulk_wait({f.value(i, i.operands[0])}, {str(i.has('read')).lower()});"
    if i.has("tensor"):
        return _tensor(f, i)
    target, source = i.words[3], i.words[4]
    a, b, size = (
        f.address(i, i.operands[0]),
        f.address(i, i.operands[1]),
        f.value(i, i.operands[2]),
    )
    if target == "global" and source == "shared::cta":
        return f"emu::bulk_store((void*){a}, (uint32_t){b}, {size});"
    if target not in ("shared::cluster", "shared::cta"):
        raise i.error("bulk copy not known")
    bar = f.address(i, i.operands[3])
    if source == "shared::cta":
        return f"emu::bulk_to_cluster({a}, {b}, {size}, {bar});"
    mask = f.value(i, i.operands[4]) if i.has("multicast::cluster") else "0"
    return f"emu::bulk_load({a}, (const void*){b}, {size}, {bar}, {mask});"


def _tensor(f, i) -> str:
    """cp.async.bulk.tensor.Nd.shared::cluster.global.mbarrier [dst], [map, {x, y}], [bar]"""
    dimensions = int(i.words[4][0])
    if i.words[5] not in ("shared::cluster", "shared::cta") or i.words[6] != "global":
        raise i.error("tensor copy not known")
    if dimensions > 3 or i.has("im2col"):
        raise i.error("tensor copies of more than three dimensions are not translated")
    inner = re.match(r"\[\s*(\S+?)\s*,\s*\{(.*)\}\s*\]$", i.operands[1])
    map_ = f.value(i, inner[1])
    place = [f.value(i, c) for c in inner[2].split(",")] + ["0"] * (3 - dimensions)
    mask = f.value(i, i.operands[3]) if i.has("multicast::cluster") else "0"
    return (
        f"emu::tensor_load({f.address(i, i.operands[0])}, (const emu::TensorMap*)({map_}), "
        f"{', '.join(f'(int){c}' for c in place)}, {f.address(i, i.operands[2])}, {mask});"
    )


def none(f, i) -> str:
    return "(void)0;"


# Only hints: they change nothing that can be observed.
RULES = {
    "ld": load,
    "ldu": load,
    "st": store,
    "atom": atomic,
    "red": atomic,
    "cp": copy,
    "prefetch": none,
    "prefetchu": none,
    "discard": none,
    "applypriority": none,
    "createpolicy": none,
}
